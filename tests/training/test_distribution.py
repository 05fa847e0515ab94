"""`fit` under `keras.distribution`, on four devices that XLA makes of one CPU."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[2]

# The vocabulary and the feed-forward are cut in two, the rows too; two microbatches; blocks scanned and not.
SCRIPT = """
import keras
import numpy as np
from keras_gemma.models import GemmaBackbone, GemmaCausalLM
from keras_gemma.training import NextTokenLoss

SHAPE = dict(vocabulary_size=64, num_layers=2, num_query_heads=2, num_key_value_heads=1, hidden_dim=8,
             intermediate_dim=16, head_dim=4)
rng = np.random.default_rng(0)
ids = rng.integers(3, 64, (8, 9)).astype("int32")
x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((8, 8), "int32")}
weights = rng.uniform(0, 1, (8, 8)).astype("float32")

def trained(**kwargs):
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM(GemmaBackbone(**SHAPE, **kwargs))
    model.compile(keras.optimizers.SGD(0.5), loss=NextTokenLoss(z_loss=0.01), gradient_accumulation_steps=2)
    history = model.fit(x, ids[:, 1:], sample_weight=weights, batch_size=8, epochs=2, verbose=0).history
    return model, history

expected, expected_history = trained()
mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"])
layout_map = GemmaBackbone.get_layout_map(mesh)
for distribution, kwargs in (
    (keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch"), {}),
    (keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch"),
     {"scan_layers": True, "recompute": "block"}),
):
    with distribution.scope():
        model, history = trained(**kwargs)
        table = model.backbone.token_embedding.embeddings.value
        assert table.addressable_shards[0].data.shape == (32, 4), table.sharding
    for name in ("loss", "perplexity", "token_accuracy", "gradient_norm"):
        np.testing.assert_allclose(history[name], expected_history[name], rtol=1e-4, err_msg=name)
    for weight, wanted in zip(model.get_weights(), expected.get_weights()):
        np.testing.assert_allclose(weight, wanted, atol=1e-5)
"""


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX distributes")
def test_distributed_steps_are_those_of_one_device():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
