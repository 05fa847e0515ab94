"""Processes of which one dies, freezes or fails: the others end with an error instead of waiting for it."""

import signal
import time
from pathlib import Path

import keras
import local_processes
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("Several processes are JAX's.", allow_module_level=True)

STOPPED = Path(__file__).parent / "stopped.py"


@pytest.mark.parametrize(
    ("count", "victim", "how"),
    [
        (2, 1, "killed"),
        pytest.param(2, 0, "killed", marks=pytest.mark.slow),
        pytest.param(4, 0, "killed", marks=pytest.mark.slow),
        pytest.param(4, 3, "killed", marks=pytest.mark.slow),
        pytest.param(2, 0, "frozen", marks=pytest.mark.slow),
        pytest.param(2, 1, "frozen", marks=pytest.mark.slow),
        pytest.param(2, 0, "failed", marks=pytest.mark.slow),
        pytest.param(2, 1, "failed", marks=pytest.mark.slow),
    ],
)
def test_the_others_stop_within_a_minute(tmp_path, count, victim, how):
    started, logs = local_processes.start(count, STOPPED, tmp_path, victim, how)
    try:
        until(lambda: all("met" in log.read_text() for log in logs), 120, logs)
        others = [process for process in started if process is not started[victim]]
        until(lambda: all(process.poll() is not None for process in others), 60, logs)
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
    for process, log in enumerate(logs):
        assert "went on" not in log.read_text()
        if process != victim:
            assert started[process].returncode not in (0, -signal.SIGKILL)


def until(condition, seconds, logs):
    # Counted in naps and not by a clock: a machine that stands still for a while makes nobody late.
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("\n\n".join(log.read_text() for log in logs))
