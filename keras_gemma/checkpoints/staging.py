"""A path that gets its name when all that belongs there is written."""

import contextlib
import os
import pathlib
import re
import shutil


@contextlib.contextmanager
def staged(target):
    """A temporary path beside the target, which gets its name at the end, or is removed where an error is raised.

    What a process that is gone left there unfinished is removed first.

    Args:
        target: path of a file or folder that does not exist yet. Its parents are made, and removed with the rest.

    Yields:
        A `pathlib.Path` that does not exist yet.
    """
    target = pathlib.Path(target).absolute()
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    staging = target.with_name(f".unfinished-{os.getpid()}-{target.name}")
    try:
        yield staging
        os.rename(staging, target)
    except BaseException:
        _remove(staging)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def _remove_abandoned(target):
    of_target = re.compile(rf"\.unfinished-(\d+)-{re.escape(target.name)}")
    for path in list(target.parent.iterdir()):
        named = of_target.fullmatch(path.name)
        if named and not _is_alive(int(named[1])):
            _remove(path)


def _is_alive(process):
    if os.name != "posix":
        # There is no harmless signal elsewhere.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
