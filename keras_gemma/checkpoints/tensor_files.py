"""Tensors inside weight files: which are there, and one at a time into memory; and one at a time into a file."""

import json
import math
import numbers
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

import h5py
import ml_dtypes
import numpy as np
import safetensors

from keras_gemma.checkpoints.h5_writing import h5_file
from keras_gemma.checkpoints.json_files import parsed_json
from keras_gemma.damaged import DamagedFileError
from keras_gemma.damaged import reading
from keras_gemma.settings import shown

BYTES_OF_GB = 1024**3
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file.

    Attributes:
        file: path of the file.
        name: name inside the file.
        shape: tuple of ints.
        dtype: a NumPy dtype; bfloat16 is that of `ml_dtypes`.
        read: callable without arguments that reads the array.
        kept_as: string, what the numbers are in the file; another than `dtype` where they are quantised.
    """

    file: str
    name: str
    shape: tuple
    dtype: np.dtype
    read: Callable
    kept_as: str | None = None

    def __post_init__(self):
        if self.kept_as is None:
            object.__setattr__(self, "kept_as", str(np.dtype(self.dtype)))

    @property
    def bytes(self):
        """How many bytes the array has in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def tensors_of_files(paths, tensors_of_file):
    """All tensors of several files by name.

    Args:
        paths: list of paths.
        tensors_of_file: `h5_tensors` or `safetensors_tensors`.

    Returns:
        A dict from name to `StoredTensor`.

    Raises:
        ValueError: for a damaged file, and for a tensor that two files hold.
    """
    tensors = {}
    for path in paths:
        for tensor in tensors_of_file(path):
            if tensor.name in tensors:
                raise ValueError(f"Both `{tensors[tensor.name].file}` and `{path}` hold `{tensor.name}`.")
            tensors[tensor.name] = tensor
    return tensors


# === Keras: HDF5 ===


def h5_tensors(path):
    """The tensors of a Keras `.weights.h5` file.

    Raises:
        DamagedFileError: for a file that is truncated or no HDF5.
    """
    with reading(path, "HDF5 file"), h5py.File(path, "r") as file:
        names = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        return [_h5_tensor(path, file[name]) for name in names]


def _h5_tensor(path, dataset):
    name = dataset.name.lstrip("/")
    if dataset.external or dataset.is_virtual:
        raise DamagedFileError(path, "it lies in another file, which is not allowed in a preset", place=name)
    # HDF5 has no bfloat16: Keras stores opaque pairs of bytes and says so in an attribute.
    dtype = np.dtype(ml_dtypes.bfloat16) if dataset.attrs.get("dtype") == "bfloat16" else dataset.dtype
    _check_h5(path, name, dataset, dtype)
    return StoredTensor(path, name, dataset.shape, dtype, lambda: _read_h5(path, name, dtype))


def _check_h5(path, name, dataset, dtype):
    if dataset.shape is None or dtype.itemsize != dataset.dtype.itemsize or dtype.kind not in "biufcV":
        raise DamagedFileError(path, f"shape {dataset.shape} and type {dataset.dtype} make no tensor", place=name)
    # What is kept as it is takes as much room as it has numbers: a shape that is wrong would fill the memory.
    kept, needed = dataset.id.get_storage_size(), math.prod(dataset.shape) * dtype.itemsize
    if dataset.chunks is None and kept != needed:
        raise DamagedFileError(path, f"{kept} bytes for shape {dataset.shape} and type {dtype}", place=name)


def _read_h5(path, name, dtype):
    with reading(path, place=name), h5py.File(path, "r") as file:
        return file[name][()].view(dtype)


def write_h5(path, tensors):
    """Writes a `.weights.h5` file as Keras does, reading one tensor at a time.

    Args:
        path: of a file that does not exist yet.
        tensors: list of `StoredTensor`.
    """
    with h5_file(path) as file:
        for tensor in tensors:
            array = tensor.read()
            if tensor.dtype == ml_dtypes.bfloat16:
                file[tensor.name] = array.view("V2")
                file[tensor.name].attrs["dtype"] = "bfloat16"
            else:
                file[tensor.name] = array


# === Hugging Face: safetensors ===


def safetensors_tensors(path):
    """The tensors of a `.safetensors` file: eight bytes of length, a JSON header, the data.

    Raises:
        DamagedFileError: for a file that the safetensors library refuses, and for a name that stands there twice.
        ValueError: for a dtype other than the floating ones.
    """
    header, data_start = _safetensors_header(path)
    return [_safetensors_tensor(path, name, *entry, data_start) for name, entry in header.items()]


def _safetensors_header(path):
    """By name, the dtype, shape and first byte of each tensor; and the byte where the data begins."""
    with reading(path, "safetensors file"):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.path.getsize(path):
                raise ValueError(f"a header of {length} bytes is announced")
            header = parsed_json(file.read(length), path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            _check_entry(path, name, entry)
        # The library looks at the whole: tensors fill the rest of the file, without a gap. It names none of them.
        with safetensors.safe_open(path, framework="np"):
            pass
    described = {name: (entry["dtype"], entry["shape"], entry["data_offsets"][0]) for name, entry in header.items()}
    return described, 8 + length


def _check_entry(path, name, entry):
    try:
        (begin, end), shape = entry["data_offsets"], entry["shape"]
        described = isinstance(entry["dtype"], str) and all(type(n) is int and n >= 0 for n in (begin, end, *shape))
    except (KeyError, TypeError, ValueError):
        described = False
    if not described or begin > end:
        reason = f"a tensor has `dtype`, `shape` and two `data_offsets`. Received: {shown(entry)}"
        raise DamagedFileError(path, reason, "safetensors file", place=name)


def _safetensors_tensor(path, name, dtype, shape, begin, data_start):
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(
            f"Weights must have a floating dtype, one of {', '.join(SAFETENSORS_DTYPES)}. "
            f"Received: {dtype} for `{name}` in `{path}`"
        )
    dtype, shape = np.dtype(SAFETENSORS_DTYPES[dtype]), tuple(shape)
    return StoredTensor(
        path, name, shape, dtype, lambda: _read_safetensors(path, name, data_start + begin, shape, dtype)
    )


def _read_safetensors(path, name, offset, shape, dtype):
    with reading(path, place=name):
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)


def write_safetensors(path, tensors):
    """Writes a `.safetensors` file, reading one tensor at a time.

    Args:
        path: of a file that does not exist yet.
        tensors: list of `StoredTensor` of the dtypes in `SAFETENSORS_DTYPES`.
    """
    names = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        begin, end = end, end + tensor.bytes
        header[tensor.name] = {
            "dtype": names[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    # The data begins at a multiple of eight bytes, for those who map it into memory.
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8))


# === Several files ===


def check_shard_size(max_shard_size, bytes_by_name=None):
    """That weights can be split into files of a size.

    Args:
        max_shard_size: int or float, gigabytes (2³⁰ bytes), or `None` for one file.
        bytes_by_name: optional dict of the bytes of each tensor.

    Raises:
        ValueError: for what is no positive number, and for a tensor that is larger where there are several files.
    """
    if max_shard_size is None:
        return
    is_number = isinstance(max_shard_size, numbers.Real) and not isinstance(max_shard_size, bool)
    if not is_number or not max_shard_size > 0:
        raise ValueError(f"`max_shard_size` is a positive number of gigabytes. Received: {max_shard_size!r}")
    most = max_shard_size * BYTES_OF_GB
    largest = max(bytes_by_name or {}, key=(bytes_by_name or {}).get, default=None)
    if largest is not None and sum(bytes_by_name.values()) > most and bytes_by_name[largest] > most:
        raise ValueError(
            "`max_shard_size` must hold the largest tensor. Received: "
            f"max_shard_size={max_shard_size} for `{largest}` of {bytes_by_name[largest] / BYTES_OF_GB:.3g} GB"
        )


def in_shards(tensors, max_shard_size):
    """The tensors of each file of a model.

    Args:
        tensors: list of `StoredTensor`.
        max_shard_size: int or float, gigabytes (2³⁰ bytes), or `None` for one file.

    Returns:
        A list of lists, each no larger than a shard may be.

    Raises:
        ValueError: as `check_shard_size`.
    """
    check_shard_size(max_shard_size, {tensor.name: tensor.bytes for tensor in tensors})
    shards, size = [[]], 0
    for tensor in tensors:
        size += tensor.bytes
        if shards[-1] and max_shard_size is not None and size > max_shard_size * BYTES_OF_GB:
            shards.append([])
            size = tensor.bytes
        shards[-1].append(tensor)
    return shards


def write_shards(folder, tensors, max_shard_size, names, write, key=lambda name: name):
    """Writes the weights of a model into one file, or into several and an index of them.

    Args:
        folder: path of an existing folder.
        tensors: list of `StoredTensor`.
        max_shard_size: as of `in_shards`.
        names: of a single file, of one among several with `{index}` from 0, `{number}` from 1 and `{count}`, and of the
            index.
        write: `write_h5` or `write_safetensors`.
        key: callable from the name of a tensor to what the index has in its place.

    Raises:
        ValueError: as `check_shard_size`, before anything is written.
    """
    single, one_of_several, index_file = names
    shards = in_shards(tensors, max_shard_size)
    if len(shards) == 1:
        write(os.path.join(folder, single), tensors)
        return
    places = {}
    for index, shard in enumerate(shards):
        name = one_of_several.format(index=index, number=index + 1, count=len(shards))
        write(os.path.join(folder, name), shard)
        places |= {key(tensor.name): name for tensor in shard}
    content = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors)}, "weight_map": places}
    with open(os.path.join(folder, index_file), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
