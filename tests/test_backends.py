"""Runs the tests marked `multi_backend` once more on each of the other backends, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parent.parent
OTHERS = {"jax", "tensorflow", "torch"} - {keras.backend.backend()}
# What a plain run leaves out stays left out.
MARKERS = "multi_backend and not slow and not tpu and not gpu and not network and not benchmark"


@pytest.mark.parametrize("backend", sorted(OTHERS))
def test_the_same_on(backend):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-m", MARKERS, "tests"],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": backend},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, f"tests fail on {backend}:\n{done.stdout}"
