"""Files that may be compressed, `.gz` or `.zst`, as bytes, or as files that can be read in any order."""

import gzip
import os
import shutil
import tempfile
import weakref
import zlib
from pathlib import Path

from keras_gemma.data.extras import required

SUFFIXES = (".gz", ".zst")


def opened(path):
    """A binary stream of a file's contents."""
    suffix = Path(path).suffix
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        return required("pyarrow").input_stream(os.fspath(path), compression="zstd")
    return open(path, "rb")


def contents(path):
    """All bytes of a file.

    Raises:
        ValueError: for a file that is not compressed as its name says, or damaged.
    """
    with _naming(path), opened(path) as stream:
        return stream.read()


def without_suffix(path):
    """A file's name without `.gz` or `.zst`, which tells the format of what is compressed."""
    name = os.fspath(path)
    return name.removesuffix(Path(name).suffix) if Path(name).suffix in SUFFIXES else name


class Contents:
    """A file that can be read in any order: the file itself, or a temporary copy of what is compressed in it.

    Attributes:
        path: string. A copy is removed with this object, or at the end of the process.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        if Path(self.path).suffix not in SUFFIXES:
            return
        with tempfile.NamedTemporaryFile(prefix="keras_gemma_", delete=False) as copy:
            self.path = copy.name
            self._remove = weakref.finalize(self, _remove, copy.name, os.getpid())
            with _naming(path), opened(path) as stream:
                shutil.copyfileobj(stream, copy)
        if not os.path.getsize(self.path):
            raise ValueError(f"{path} is empty.")

    def __getstate__(self):
        # In another process it is a guest.
        return {"path": self.path}


def _remove(path, process):
    if os.getpid() == process:
        Path(path).unlink(missing_ok=True)


class _naming:
    """Names the file in errors of the libraries that decompress."""

    def __init__(self, path):
        self._path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, FileNotFoundError):
            return
        if isinstance(error, (OSError, EOFError, zlib.error, ValueError)):
            raise ValueError(f"{self._path} is not compressed as its name says, or damaged: {error}") from error
