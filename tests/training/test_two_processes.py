"""Two processes that train and save together, and go on together after both were killed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("Several processes are JAX's.", allow_module_level=True)
pytest.importorskip("orbax.checkpoint")

RUN = Path(__file__).parent / "run_on_two.py"


def run(folder, last_step=0):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, RUN, folder, str(port)]
    both = [
        subprocess.Popen([*command, str(process), str(last_step)], env=env, stderr=subprocess.PIPE, text=True)
        for process in (0, 1)
    ]
    return [(process.communicate(timeout=300)[1], process.returncode) for process in both]


def losses(folder, process):
    return (folder / f"losses_{process}.txt").read_text().splitlines()


@pytest.mark.slow
def test_two_processes_go_on_together(tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for folder in (unbroken, killed):
        folder.mkdir()
    for errors, status in run(unbroken):
        assert status == 0, errors
    for last_step in (5, 4):
        assert any(status == -9 for _, status in run(killed, last_step))
    for errors, status in run(killed):
        assert status == 0, errors
    for process in (0, 1):
        assert set(losses(killed, process)) == set(losses(unbroken, process))
        weights, others = (np.load(folder / f"weights_{process}.npz") for folder in (killed, unbroken))
        assert all(weights[name].tobytes() == others[name].tobytes() for name in others.files)
    host_files = sorted(path.name for path in (killed / "checkpoints" / "12" / "hosts").glob("*.json"))
    assert host_files == ["process_0.json", "process_1.json"]
