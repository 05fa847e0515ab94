import os
import subprocess
import sys
from pathlib import Path

import keras
import local_processes
import pytest

# Programs are run a few times only: compiling them fast is what counts.
XLA_FLAGS = "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0"
FOLDER = Path(__file__).parent


@pytest.fixture
def on_eight_devices():
    """`on_eight_devices(*names)` runs checks of `eight_devices.py`, or another file, in a process of their own."""
    if keras.backend.backend() != "jax":
        pytest.skip("Only JAX distributes.")

    def run(*names, file="eight_devices.py"):
        environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": XLA_FLAGS.format(8)}
        command = [sys.executable, FOLDER / file, *names]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout

    return run


@pytest.fixture
def on_processes(tmp_path):
    """`on_processes(count, *names, devices=2)` runs checks of `processes.py` in processes with so many devices each."""

    def run(count, *names, devices=2):
        program = FOLDER / "processes.py"
        flags = XLA_FLAGS.format(devices)
        statuses, output = local_processes.run(count, program, tmp_path, tmp_path, *names, seconds=900, XLA_FLAGS=flags)
        print(output)
        assert not any(statuses), output

    return run
