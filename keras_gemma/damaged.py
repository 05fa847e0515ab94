"""One error for files that are not what their format says, whatever the library that reads them raises."""

import contextlib

LONGEST_REASON = 500
# What is no damage: a file that is not there or may not be read, a package that is not installed, a lack of memory.
NO_DAMAGE = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, MemoryError)


class DamagedFileError(ValueError):
    """A file is truncated, damaged, or not of its format.

    Attributes:
        file: string, its path.
        place: string, where in the file; `None` where it is not known.
        reason: string.
    """

    def __init__(self, file, reason, kind="", place=None):
        self.file, self.place, self.reason = str(file), place, reason
        what = f"is truncated, damaged or no {kind}" if kind else "is damaged"
        super().__init__(f"`{file}` {what}{f' where it keeps `{place}`' if place else ''}: {reason}")


@contextlib.contextmanager
def reading(file, kind="", place=None):
    """Raises all that a library raises inside as a `DamagedFileError`.

    Args:
        file: path that the error names.
        kind: optional string, the name of the format with "file" behind it.
        place: optional string, what is being read in the file.
    """
    try:
        yield
    except (DamagedFileError, *NO_DAMAGE):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and f"`{file}" in str(error):
            # Said already, and better.
            raise
        raise DamagedFileError(file, _reason(error), kind, place) from error


def _reason(error):
    text = " ".join(str(error).split())[:LONGEST_REASON]
    if isinstance(error, KeyError):
        return f"it lacks {text}"
    if isinstance(error, RecursionError):
        return "its parts are nested too deeply"
    # The others speak of Python, not of files.
    if text and isinstance(error, (ValueError, OSError, RuntimeError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
