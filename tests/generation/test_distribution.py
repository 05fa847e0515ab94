"""Generation under `keras.distribution`, on four devices that XLA makes of one CPU."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[2]

# A batch of three on two rows of devices, so that it must be filled up.
SCRIPT = """
import keras, numpy as np
from generation.conftest import build, random_prompts, rows_of, tokens_of
from keras_gemma.models import GemmaBackbone

from keras_gemma.generation import Request, Sampling, resolve_sampler

inputs = tokens_of(random_prompts(5, 1, 9), 20)
expected = rows_of(build().generate(inputs, stop_token_ids=None))

def continued(model):
    sampling = Sampling(resolve_sampler("greedy"))
    request = Request(random_prompts(5, 1, 9), [4] * 3, [], sampling.sampler, sampling.values, continuations=2)
    return model.engine.generate(request)[0]

continuations = continued(build())

mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"])
layout_map = GemmaBackbone.get_layout_map(mesh)
for distribution in (
    keras.distribution.DataParallel(),
    keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch"),
):
    with distribution.scope():
        model = build()
        rows = rows_of(model.generate(inputs, stop_token_ids=None))
        assert continued(model) == continuations, distribution
    assert rows == expected, (distribution, rows, expected)
"""


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX distributes")
def test_distributed_rows_are_the_rows_of_one_device():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
