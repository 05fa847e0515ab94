"""Several writers and one target: live work is never touched, what the dead left never blocks.

In containers every process is number 1, so that each process here says that it is.
"""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from keras_gemma.locking import InUseError
from keras_gemma.locking import locked
from keras_gemma.staging import staged
from keras_gemma.staging import write_file

# It writes half of its work, says so, and finishes when it is told to.
WRITER = """
import os, sys
os.getpid = lambda: 1
from keras_gemma.staging import staged
with staged(sys.argv[1], replace=len(sys.argv) > 2) as unfinished:
    unfinished.write_text("half")
    print(unfinished.name, flush=True)
    sys.stdin.readline()
    with unfinished.open("a") as file:
        file.write(" and half")
"""


@pytest.fixture
def start():
    processes = []

    def started(*args):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", WRITER, *map(str, args)], **pipes)
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def _finish(process):
    process.communicate("\n", timeout=20)
    assert process.returncode == 0


def test_a_target_has_one_writer_and_its_work_is_left_alone(tmp_path, monkeypatch, start):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    target = tmp_path / "made" / "target"
    alive, name = start(target)
    with pytest.raises(InUseError, match=r"made/target` is being written by another"), staged(target):
        pass
    assert (target.parent / name).read_text() == "half"
    with staged(target.with_name("other")) as other:
        other.mkdir()
    _finish(alive)
    assert target.read_text() == "half and half"
    with pytest.raises(FileExistsError, match="target"), staged(target):
        pass
    assert {path.name for path in target.parent.iterdir()} == {"target", "other"}


def test_what_the_dead_left_is_removed(tmp_path, start):
    target = tmp_path / "target"
    dead, name = start(target)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    earlier = tmp_path / ".unfinished-1-target"
    earlier.mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {name, earlier.name, ".target.lock"}
    with staged(target) as unfinished:
        unfinished.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_writers_of_a_file_that_is_replaced_take_turns(tmp_path, start):
    target = tmp_path / "file"
    write_file(target, "old")
    alive, name = start(target, "replace")
    later = threading.Thread(target=write_file, args=(target, b"last"))
    later.start()
    time.sleep(0.2)
    assert target.read_text() == "old" and (tmp_path / name).exists()
    _finish(alive)
    later.join()
    assert target.read_text() == "last" and os.listdir(tmp_path) == ["file"]


def test_many_threads_hold_a_lock_one_after_another(tmp_path):
    held, most = [], []

    def hold():
        for _ in range(20):
            with locked(tmp_path / "lock", "it", wait=True) as alone:
                held.append(alone)
                most.append(len(held))
                held.pop()

    threads = [threading.Thread(target=hold) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) == 120 and not os.listdir(tmp_path)


def test_a_failure_removes_all_that_was_made(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "a" / "b") as unfinished:
        unfinished.mkdir()
        raise RuntimeError
    assert not os.listdir(tmp_path)
