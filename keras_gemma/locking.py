"""Locks on files and folders, which the system releases when their holder dies, however it dies."""

import contextlib
import os
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

SECONDS_BETWEEN_TRIES = 0.05


class InUseError(OSError):
    """Another process or thread is writing the same file or folder."""


@contextlib.contextmanager
def locked(lock_file, path, wait=False):
    """Holds a lock until the end of the block.

    Process ids do not serve: in containers, every process has the same. A lock file that a dead process left is taken
    over.

    Args:
        lock_file: path of the file that is locked. It is made, and removed at the end.
        path: what the lock protects, for the message.
        wait: bool. Waits until the lock is free.

    Yields:
        bool. Whether there is a lock: some network file systems have none, and nothing is known about others there.

    Raises:
        InUseError: if another process or thread holds the lock, and `wait` is false.
    """
    while (file := _lock(lock_file)) is None:
        if not wait:
            raise InUseError(f"`{path}` is being written by another process or thread. Wait until it has finished.")
        time.sleep(SECONDS_BETWEEN_TRIES)
    try:
        yield file >= 0
    finally:
        _unlock(lock_file, file)


def _lock(lock_file):
    """Descriptor of the file, locked; `None` if another one has it; -1 where there are no locks."""
    file = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(file)
        # Its last holder may have removed it in the meantime: then it is not the one that others will find.
        if os.path.exists(lock_file) and os.path.samestat(os.fstat(file), os.stat(lock_file)):
            return file
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass
    except OSError:
        os.close(file)
        with contextlib.suppress(OSError):
            os.remove(lock_file)
        return -1
    os.close(file)
    return None


def _take(file):
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)


def _unlock(lock_file, file):
    if file < 0:
        return
    if fcntl:
        # While it is still locked: a file that is removed later might be that of the next holder.
        with contextlib.suppress(OSError):
            os.remove(lock_file)
        # Closing is not enough where a forked process has the file open, too.
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)
    else:
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
        os.close(file)
        # Windows removes no file that another process has open.
        with contextlib.suppress(OSError):
            os.remove(lock_file)
