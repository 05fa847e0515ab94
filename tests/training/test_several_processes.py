"""A small Gemma that several processes train: one is killed, the others stop, and the run goes on to the same bits."""

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

RUN = Path(__file__).parent / "run_on_several.py"


def run(folder, count, victim=None, last_step=0):
    """Exit statuses and what was written to the standard error. The victim kills itself after its last step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = []
    for process in range(count):
        last = last_step if process == victim else 0
        # Where nobody dies a busy machine may stand still for a while.
        heartbeat = 900 if victim is None else 20
        command = [sys.executable, RUN, folder, *map(str, (port, count, process, last, heartbeat))]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=600)[1] for process in started]
    return [process.returncode for process in started], "\n\n".join(errors)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_run_goes_on_exactly_whichever_process_was_killed(tmp_path, count):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for folder in (unbroken, killed):
        folder.mkdir()
    statuses, errors = run(unbroken, count)
    assert not any(statuses), errors
    for victim in (count - 1, 0):
        statuses, errors = run(killed, count, victim, last_step=3)
        assert statuses[victim] == -9 and all(statuses), errors
    statuses, errors = run(killed, count)
    assert not any(statuses), errors
    for process in range(count):
        found, expected = ((folder / f"losses_{process}.txt").read_text() for folder in (killed, unbroken))
        assert set(found.splitlines()) == set(expected.splitlines())
        assert len(found.splitlines()) < 2 * len(expected.splitlines()), "every run began anew"
        weights, others = (np.load(folder / f"weights_{process}.npz") for folder in (killed, unbroken))
        assert all(weights[name].tobytes() == others[name].tobytes() for name in others.files)
