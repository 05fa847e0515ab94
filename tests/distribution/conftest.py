import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

# Programs are run a few times only: compiling them fast is what counts.
XLA_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FOLDER = Path(__file__).parent


@pytest.fixture
def on_eight_devices():
    """`on_eight_devices(*names)` runs checks of `eight_devices.py`, or another file, in a process of their own."""
    if keras.backend.backend() != "jax":
        pytest.skip("Only JAX distributes.")

    def run(*names, file="eight_devices.py"):
        environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": XLA_FLAGS}
        command = [sys.executable, FOLDER / file, *names]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout

    return run
