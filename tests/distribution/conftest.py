import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

# Programs are run a few times only: compiling them fast is what counts.
XLA_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
CHECKS = Path(__file__).parent / "eight_devices.py"


@pytest.fixture
def on_eight_devices():
    """`on_eight_devices(*names)` runs checks of `eight_devices.py` in a process of their own."""
    if keras.backend.backend() != "jax":
        pytest.skip("Only JAX distributes.")

    def run(*names):
        environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": XLA_FLAGS}
        command = [sys.executable, CHECKS, *names]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout

    return run
