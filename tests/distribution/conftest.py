import subprocess
import sys
from pathlib import Path

import keras
import pytest

CHECKS = Path(__file__).parent / "eight_devices.py"


@pytest.fixture
def on_eight_devices():
    """`on_eight_devices(*names)` runs checks of `eight_devices.py` in a process of their own."""
    if keras.backend.backend() != "jax":
        pytest.skip("Only JAX distributes.")

    def run(*names):
        done = subprocess.run(
            [sys.executable, CHECKS, *names], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout

    return run
