"""Training, generation and files on meshes of eight devices. The checks themselves stand in `eight_devices.py`."""

import subprocess
import sys
from pathlib import Path

import keras
import pytest

CHECKS = Path(__file__).parent / "eight_devices.py"


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX distributes")
@pytest.mark.parametrize(
    "checks",
    [
        ["every_mesh_trains_and_generates_as_one_device_does"],
        [
            "batches_of_any_size_are_predicted_and_evaluated",
            "adapters_and_8_bit_weights_lie_on_the_mesh",
            "files_of_one_mesh_load_on_others",
            "a_run_goes_on_on_another_mesh",
        ],
    ],
    ids=["training and generating", "rows, adapters and files"],
)
def test_on_eight_devices(checks):
    done = subprocess.run(
        [sys.executable, CHECKS, *checks], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
