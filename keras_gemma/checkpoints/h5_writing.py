"""HDF5 files on a disk that may be full.

HDF5 cannot take back what it holds in memory for a file that it cannot write, and ends the process with a segmentation
fault while it closes the file. So it writes to a file of ours, which keeps the first error for later and swallows all
that comes after it.
"""

import contextlib
import io
import os
import pathlib
import tempfile

import h5py
import keras
from keras.src.saving import saving_lib
from keras.src.utils import file_utils

from keras_gemma.staging import naming_full_disks
from keras_gemma.staging import staged


@contextlib.contextmanager
def h5_file(path):
    """A new HDF5 file, open for writing.

    Yields:
        A `h5py.File`.

    Raises:
        OSError: at the end, if not all of it could be written.
    """
    with ErrorsKept(path, "w") as raw:
        try:
            with h5py.File(raw, "w") as file:
                yield file
        finally:
            raw.check()


class ErrorsKept(io.RawIOBase):
    """A file that HDF5 can always write to.

    Args:
        path: path.
        mode: `"w"` for a new file, `"a"` for one that exists.
    """

    def __init__(self, path, mode):
        self._file = open(path, "w+b" if mode == "w" else "r+b", buffering=0)  # noqa: SIM115
        self._path = os.fspath(path)
        self._error = None

    def __repr__(self):
        # h5py takes this for the file's name.
        return self._path

    def check(self):
        """Raises the first error of those kept."""
        if self._error is not None:
            raise self._error

    def write(self, content):
        content = memoryview(content).cast("B")
        written = 0
        while written < len(content) and self._error is None:
            with self._keeping():
                written += self._file.write(content[written:])
        return len(content)

    def truncate(self, size=None):
        with self._keeping():
            self._file.truncate(size)
        return size

    def readinto(self, buffer):
        return self._file.readinto(buffer)

    def seek(self, offset, whence=os.SEEK_SET):
        return self._file.seek(offset, whence)

    def tell(self):
        return self._file.tell()

    def seekable(self):
        return True

    def close(self):
        with self._keeping():
            self._file.close()
        super().close()

    @contextlib.contextmanager
    def _keeping(self):
        try:
            yield
        except OSError as error:
            self._error = self._error or error


# === As Keras saves weights ===


class _Kept:
    """Keras' stores, whose files are such."""

    def _get_h5_file(self, path_or_io, mode=None):
        if (mode or self.mode) == "r":
            return super()._get_h5_file(path_or_io, mode)
        raw = ErrorsKept(path_or_io, mode or self.mode)
        self.__dict__.setdefault("_raw", []).append(raw)
        return h5py.File(raw, mode or self.mode)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self._check()

    def close(self):
        super().close()
        self._check()

    def _check(self):
        for raw in self._raw:
            raw.check()


class _Store(_Kept, saving_lib.H5IOStore):
    pass


class _ShardedStore(_Kept, saving_lib.ShardedH5IOStore):
    pass


def save_weights(model, filepath, overwrite=True, max_shard_size=None, objects_to_skip=None):
    """Saves the weights of a model, as `keras.Model.save_weights` does.

    A file that exists is replaced when the new one is complete.

    Args:
        model: a `keras.Model`.
        filepath: path that ends with `.weights.h5`, or `.weights.json` where there may be several files.
        overwrite: bool. `False` asks before a file is replaced.
        max_shard_size: optional int or float. Gigabytes (2³⁰ bytes) above which the weights are split into several
            files.
        objects_to_skip: optional list of layers that are left out.

    Raises:
        ValueError: for another ending, and for a model that is not built.
        OSError: for a disk without room. What was there before is as it was.
    """
    if not _is_plain(model, filepath, overwrite, max_shard_size):
        skipped = {} if objects_to_skip is None else {"objects_to_skip": objects_to_skip}
        keras.saving.save_weights(model, filepath, overwrite, max_shard_size, **skipped)
    elif max_shard_size is None:
        with staged(filepath, replace=True) as unfinished:
            _write(model, _Store(unfinished, mode="w"), objects_to_skip)
    else:
        _save_shards(model, pathlib.Path(filepath), max_shard_size, objects_to_skip)


def _is_plain(model, filepath, overwrite, max_shard_size):
    """Whether there is nothing that Keras would refuse or ask, and nothing on another machine."""
    suffixes = (".weights.h5",) if max_shard_size is None else (".weights.json",)
    local = isinstance(filepath, (str, os.PathLike)) and not file_utils.is_remote_path(filepath)
    return local and model.built and str(filepath).endswith(suffixes) and (overwrite or not os.path.exists(filepath))


def _save_shards(model, path, max_shard_size, objects_to_skip):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as folder:
        unfinished = pathlib.Path(folder) / path.name
        with naming_full_disks(path):
            _write(model, _ShardedStore(unfinished, max_shard_size, mode="w"), objects_to_skip)
        # The list of all files last.
        for file in sorted(pathlib.Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.parent / file.name)


def _write(model, store, objects_to_skip):
    try:
        saving_lib._save_state(
            model,
            weights_store=store,
            assets_store=None,
            inner_path="",
            visited_saveables={id(skipped) for skipped in objects_to_skip or ()},
        )
    finally:
        store.close()
