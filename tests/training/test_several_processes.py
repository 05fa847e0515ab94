"""A small Gemma that several processes train: one is killed, the others stop, and the run goes on to the same bits."""

from pathlib import Path

import keras
import local_processes
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("Several processes are JAX's.", allow_module_level=True)
pytest.importorskip("orbax.checkpoint")

RUN = Path(__file__).parent / "run_on_several.py"


def run(folder, count, own_shares, victim=-1, save_every=2, **environment):
    """Exit statuses and all that was written. The victim kills itself after some steps."""
    # Where nobody dies a busy machine may stand still for a while.
    heartbeat = 900 if victim < 0 else 20
    arguments = (folder, victim, heartbeat, own_shares, save_every)
    return local_processes.run(count, RUN, folder, *arguments, seconds=600, **environment)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "own_shares"), [(2, 0), (4, 0), (2, 1)])
def test_a_run_goes_on_exactly_whichever_process_was_killed(tmp_path, count, own_shares):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for folder in (unbroken, killed):
        folder.mkdir()
    statuses, output = run(unbroken, count, own_shares)
    assert not any(statuses), output
    for victim in (count - 1, 0):
        statuses, output = run(killed, count, own_shares, victim)
        assert statuses[victim] == -9 and all(statuses), output
    statuses, output = run(killed, count, own_shares)
    assert not any(statuses), output
    for process in range(count):
        found, expected = ((folder / f"losses_{process}.txt").read_text() for folder in (killed, unbroken))
        assert set(found.splitlines()) == set(expected.splitlines())
        assert len(found.splitlines()) < 2 * len(expected.splitlines()), "every run began anew"
        weights, others = (np.load(folder / f"weights_{process}.npz") for folder in (killed, unbroken))
        assert all(weights[name].tobytes() == others[name].tobytes() for name in others.files)
    host_files = sorted(path.name for path in (killed / "checkpoints").glob("*/hosts/*.json"))
    assert set(host_files) == {f"process_{process}.json" for process in range(count)}


@pytest.mark.slow
def test_processes_with_several_devices_save_after_every_step(tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    statuses, output = run(tmp_path, 2, own_shares=0, save_every=1, XLA_FLAGS=flags)
    assert not any(statuses), output
    assert len((tmp_path / "losses_0.txt").read_text().splitlines()) == 8
