"""Checkpoints of one format → another, a tensor at a time.

    what is there → names, shapes and dtypes checked → one tensor read, rearranged, written → … → a new name

Nothing takes the target's name before all of it is written.
"""

import dataclasses
import os
import pathlib
import shutil

import numpy as np
from tqdm import tqdm

from keras_gemma.checkpoints import besides_tensors
from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import flax_orbax
from keras_gemma.checkpoints import gguf_file
from keras_gemma.checkpoints import hugging_face
from keras_gemma.checkpoints import keras_preset
from keras_gemma.checkpoints import keras_weights
from keras_gemma.checkpoints import pytorch_pickle
from keras_gemma.checkpoints import tokenizer_files
from keras_gemma.checkpoints.loading import open_preset
from keras_gemma.checkpoints.tensor_files import check_shard_size
from keras_gemma.damaged import reading
from keras_gemma.staging import staged

# Those that are known by their files, before folders with a `config.json`, which say themselves what they are.
BY_FILES = (gguf_file, keras_weights, pytorch_pickle, flax_orbax)
FORMATS = {module.FORMAT: module for module in (keras_preset, hugging_face, *BY_FILES)}
WRITABLE = {name: module for name, module in FORMATS.items() if hasattr(module, "write")}
SHARDED = ("keras", "hugging_face")
DTYPES = ("float32", "float16", "bfloat16")
DTYPES_OF_GGUF = (*DTYPES, "q8_0")


def opened(source):
    """Names, shapes and dtypes of a model in any format that can be read.

    Args:
        source: path of a file or folder, hub handle, or name of a preset.

    Returns:
        A `canonical.Checkpoint`.

    Raises:
        ValueError: for a path that is not there, a format or an architecture that is unknown, and damaged files.
        FileNotFoundError: for a file that a folder or a hub lacks.
        ConnectionError: for a hub that does not answer.
    """
    path = os.fspath(source)
    with reading(path):
        return _opened(path)


def _opened(path):
    # Not above: the models import this package.
    from keras_gemma.models import GemmaBackbone

    for module in BY_FILES:
        if os.path.exists(path) and module.is_here(path):
            return module.checkpoint(path)
    if os.path.isfile(path):
        raise ValueError(f"Files are read in the formats {', '.join(FORMATS)}. Received: {path!r}, which is in none")
    return open_preset(GemmaBackbone, path).checkpoint()


def convert(source, target, format=None, dtype=None, max_shard_size=None, tokenizer=None, progress=True):
    """Writes a model in another format.

    Tensors are read, rearranged and written one at a time: memory holds the largest about twice. Numbers keep their
    dtype unless another is asked for, and are the same to the bit in formats that have it. Those of a GGUF file, whose
    norms are always float32, get the one dtype that holds all matrices. Where the tokenizer has Gemma's 256,000 pieces,
    an embedding of 256,128 rows loses those that are padding. What a model has besides, as its chat template, the
    tokens that end an answer and the head of a reward model, comes along, and where a format has no place for it, the
    model is refused. See `besides_tensors`.

    Args:
        source: path of a file or folder, hub handle, or name of a preset.
        target: path that does not exist yet.
        format: one of `WRITABLE`. Left out for a target that ends with `.gguf` or `.weights.h5`.
        dtype: optional, one of `DTYPES` to cast to; for GGUF also `"q8_0"`.
        max_shard_size: optional int or float, for the formats in `SHARDED`. Gigabytes (2³⁰ bytes) above which the
            weights are split into several files; 10 unless told, `math.inf` never splits.
        tokenizer: optional path of a SentencePiece model, for a source that has none; not for the format
            `"keras_weights"`, which keeps none.
        progress: bool. Whether to show a bar where somebody looks.

    Returns:
        The `canonical.Checkpoint` of the source.

    Raises:
        ValueError: for what cannot be converted, naming the tensor. Nothing is there under the target's name then.
        FileNotFoundError, ConnectionError: as `opened`.
        FileExistsError: for a target that exists.
        OSError: for a disk without room.

    Example:

    >>> import os, tempfile
    >>> from keras_gemma.checkpoints import convert
    >>> folder = tempfile.mkdtemp()
    >>> made = convert("gemma_tiny_en", folder + "/model", format="hugging_face", progress=False)
    >>> made.format, os.path.exists(folder + "/model/model.safetensors")
    ('keras', True)
    """
    name = format or _format_of(target)
    _check_target(target, name, dtype, max_shard_size, tokenizer)
    checkpoint = opened(source)
    _check_room(target, checkpoint, dtype)
    proto = checkpoint.proto() if tokenizer is None else pathlib.Path(tokenizer).read_bytes()
    rows, where = checkpoint.sizes.vocabulary_size, tokenizer or checkpoint.path
    pieces = None if proto is None else tokenizer_files.checked(proto, rows, where)
    besides = _kept(checkpoint.besides(), name)
    sizes, tensors = canonical.without_padding(checkpoint.sizes, checkpoint.tensors, pieces)
    if dtype is None and checkpoint.format == gguf_file.FORMAT != name:
        dtype = str(np.result_type(*(tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1)))
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    if hasattr(WRITABLE[name], "KEEPS"):
        options["besides"] = besides
    total = sum(tensor.bytes for tensor in tensors.values())
    with staged(target) as staging, _bar(total, progress) as bar:
        checkpoint.check_copies()
        watched = {part: _watched(tensor, bar) for part, tensor in tensors.items()}
        WRITABLE[name].write(str(staging), sizes, watched, proto, dtype, **options)
    return checkpoint


def _kept(besides, name):
    """What comes along into the format of that name.

    Raises:
        ValueError: for what does not.
    """
    if name == keras_weights.FORMAT:
        # Weights and nothing else is what this format is for, but the head is weights.
        besides = dataclasses.replace(besides_tensors.NOTHING, head=besides.head, other_head=besides.other_head)
    keeps = {one: getattr(module, "KEEPS", ()) for one, module in WRITABLE.items()}
    besides_tensors.check_kept(besides, name, keeps[name], keeps)
    return besides


def _format_of(target):
    suffixes = {".gguf": gguf_file.FORMAT, keras_weights.SUFFIX: keras_weights.FORMAT}
    for suffix, name in suffixes.items():
        if os.fspath(target).endswith(suffix):
            return name
    raise ValueError(
        f"A path that ends with {' or '.join(suffixes)} says its format. For another pass `format=` (`--to`), one of "
        f"{', '.join(WRITABLE)}. Received: none for {os.fspath(target)!r}"
    )


def _check_target(target, name, dtype, max_shard_size, tokenizer):
    if name not in WRITABLE:
        raise ValueError(f"Checkpoints are written in the formats {', '.join(WRITABLE)}. Received: {name!r}")
    dtypes = DTYPES_OF_GGUF if name == gguf_file.FORMAT else DTYPES
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"Numbers of the format {name!r} are {', '.join(dtypes)}. Received: {dtype!r}")
    if max_shard_size is not None:
        if name not in SHARDED:
            raise ValueError(f"`max_shard_size` is for the formats {', '.join(SHARDED)}. Received: it for {name!r}")
        check_shard_size(max_shard_size)
    if tokenizer is not None and name == keras_weights.FORMAT:
        raise ValueError(f"`tokenizer` is for formats that keep one. Received: it for {name!r}")
    if os.path.lexists(target):
        raise FileExistsError(f"A checkpoint is written to a path that is free. Received: {os.fspath(target)!r}")


def _check_room(target, checkpoint, dtype):
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2, "q8_0": 1}
    needed = sum(
        tensor.bytes // np.dtype(tensor.dtype).itemsize * sizes.get(dtype, np.dtype(tensor.dtype).itemsize)
        for tensor in checkpoint.tensors.values()
    )
    parent = pathlib.Path(target).absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(f"`{target}` takes {needed / 2**30:.1f} GiB. `{parent}` has room for {free / 2**30:.1f} GiB")


def _watched(tensor, bar):
    def read():
        array = tensor.read()
        bar.update(tensor.bytes)
        return array

    return dataclasses.replace(tensor, read=read)


def _bar(total, progress):
    # `None`: where nobody looks, there is none.
    return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None if progress else True)
