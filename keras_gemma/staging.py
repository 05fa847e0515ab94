"""A path that gets its name when all that belongs there is written."""

import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil

from keras_gemma.locking import locked

PREFIX = ".unfinished-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries that write files themselves say it in words: NumPy's `tofile`, TensorStore.
FULL_IN_WORDS = re.compile(r"No space left|\d+ requested and \d+ written|File too large|quota exceeded")


class FullDiskError(OSError):
    """There is no room for a file or folder."""

    def __init__(self, target, reason):
        super().__init__(f"`{target}` could not be written: no space left on the disk. Nothing was changed. ({reason})")
        self.errno, self.reason = errno.ENOSPC, reason


@contextlib.contextmanager
def staged(target, replace=False):
    """A temporary path beside the target, which gets its name at the end, or is removed where an error is raised.

    What a process that is gone left there unfinished is removed first. What a process that is alive writes there is
    left alone.

    Args:
        target: path of a file or folder. Its parents are made, and removed with the rest.
        replace: bool. Whether the target is a file that may exist, which is replaced at the end. Those who write the
            same file take turns then.

    Yields:
        A `pathlib.Path` that does not exist yet.

    Raises:
        FileExistsError: for a target that exists, unless it is replaced.
        InUseError: if another process or thread is writing the target, unless it is replaced.
        OSError: for a disk without room.
    """
    target = pathlib.Path(target).absolute()
    _refuse_files_for_folders(target)
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f"{PREFIX}{secrets.token_hex(8)}-{target.name}")
    try:
        with locked(target.with_name(f".{target.name}.lock"), target, wait=replace) as alone:
            if not replace and os.path.lexists(target):
                raise FileExistsError(f"The target must not exist yet. Received: `{target}`")
            if alone:
                _remove_unfinished(target)
            try:
                with naming_full_disks(target):
                    yield staging
                    os.replace(staging, target)
            except BaseException:
                _remove(staging)
                raise
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


@contextlib.contextmanager
def naming_full_disks(target):
    """Says in a sentence that there was no room for a target."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if getattr(error, "errno", None) not in FULL and not FULL_IN_WORDS.search(str(error)):
            raise
        raise FullDiskError(target, getattr(error, "reason", error)) from error


def write_file(path, content):
    """Writes a whole file, bytes or a string, that appears or replaces another when it is complete."""
    with staged(path, replace=True) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def _refuse_files_for_folders(target):
    for parent in target.parents:
        if parent.exists():
            if not parent.is_dir():
                raise NotADirectoryError(f"`{target}` could not be written: `{parent}` is a file, not a folder.")
            return


def _remove_unfinished(target):
    for path in list(target.parent.iterdir()):
        token, _, name = path.name.removeprefix(PREFIX).partition("-")
        if path.name.startswith(PREFIX) and name == target.name and token:
            _remove(path)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
