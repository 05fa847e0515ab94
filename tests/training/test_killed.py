"""Runs that are killed with SIGKILL again and again end like a run that never was, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("Its processes run on JAX.", allow_module_level=True)
pytest.importorskip("orbax.checkpoint")

RUN = Path(__file__).parent / "run.py"
LIMIT = 120


class Runs:
    """Starts runs in processes of their own."""

    def __init__(self, cache):
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._server = subprocess.Popen(
            [sys.executable, RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def run(self, folder, data, kill_when=None):
        """Runs until the end, or until `kill_when()` holds; returns whether it came to its end."""
        self._server.stdin.write(f"{folder} {data}\n")
        self._server.stdin.flush()
        process = int(self._server.stdout.readline())
        if kill_when is not None:
            _wait_for(lambda: kill_when() or (folder / "history.json").exists())
            os.kill(process, signal.SIGKILL)
        status = int(self._server.stdout.readline())
        assert status in (0, signal.SIGKILL), f"the run failed with {status}"
        return (folder / "history.json").exists()

    def close(self):
        self._server.stdin.close()
        self._server.wait(LIMIT)


def _wait_for(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("cache"))
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def unbroken(runs, tmp_path_factory):
    """`unbroken(data)`: the folder of a run that was never killed."""
    done = {}

    def run(data):
        if data not in done:
            done[data] = tmp_path_factory.mktemp(data)
            assert runs.run(done[data], data)
        return done[data]

    return run


def losses(folder):
    path = folder / "losses.txt"
    return path.read_text().splitlines() if path.exists() else []


def saving(folder):
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def moment(folder, chance):
    """A moment to kill at: after some more steps and some milliseconds, or in the midst of saving."""
    known, more, pause = len(losses(folder)), chance.randint(1, 8), chance.uniform(0, 0.05)
    if chance.random() < 0.3:
        return lambda: len(losses(folder)) > known and saving(folder)
    return lambda: len(losses(folder)) >= known + more and not time.sleep(pause)


def kill_and_go_on(runs, folder, data, kills, seed):
    chance = random.Random(seed)
    killed = sum(not runs.run(folder, data, kill_when=moment(folder, chance)) for _ in range(kills))
    if killed == kills:
        assert runs.run(folder, data)
    return killed


def assert_equal_to_the_bit(folder, unbroken):
    expected = dict(line.rsplit(" ", 1) for line in losses(unbroken))
    found = [line.rsplit(" ", 1) for line in losses(folder)]
    assert {place for place, _ in found} == set(expected)
    assert [line for line in found if expected[line[0]] != line[1]] == []
    assert json.loads((folder / "history.json").read_text()) == json.loads((unbroken / "history.json").read_text())
    weights, others = np.load(folder / "weights.npz"), np.load(unbroken / "weights.npz")
    assert weights.files == others.files
    assert all(weights[name].tobytes() == others[name].tobytes() for name in weights.files)


@pytest.mark.parametrize(
    "data, kills",
    [
        ("mixture", 1),
        *(pytest.param(data, 2, marks=pytest.mark.slow) for data in ("arrays", "grain", "packed")),
    ],
)
def test_a_killed_run_goes_on_exactly(runs, unbroken, tmp_path, data, kills):
    kill_and_go_on(runs, tmp_path, data, kills, seed=1)
    assert_equal_to_the_bit(tmp_path, unbroken(data))


def test_killed_while_saving(runs, unbroken, tmp_path):
    for _ in range(2):
        runs.run(tmp_path, "mixture", kill_when=lambda: saving(tmp_path))
        assert saving(tmp_path), "killed too late"
    assert runs.run(tmp_path, "mixture")
    assert_equal_to_the_bit(tmp_path, unbroken("mixture"))
    assert not saving(tmp_path), "what was half written stays"


@pytest.mark.slow
@pytest.mark.parametrize("data", ["arrays", "grain"])
def test_killed_thirty_times_at_random_moments(runs, unbroken, tmp_path, data):
    killed = 0
    for seed in range(100):
        folder = tmp_path / str(seed)
        folder.mkdir()
        killed += kill_and_go_on(runs, folder, data, kills=5, seed=seed)
        assert_equal_to_the_bit(folder, unbroken(data))
        if killed >= 30:
            break
    assert killed >= 30
