"""A single `.weights.h5` file of a whole model, as `save_weights` of a backbone or of a task writes it."""

import functools
import os

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import keras_preset
from keras_gemma.checkpoints.tensor_files import h5_tensors
from keras_gemma.checkpoints.tensor_files import tensors_of_files
from keras_gemma.checkpoints.tensor_files import write_h5

FORMAT = "keras_weights"
OPTIMIZER = "optimizer/"
SUFFIX = ".weights.h5"
EMBEDDING = f"{keras_preset.EMBEDDING}/vars/0"
# The first block has no number.
BLOCK = "layers/gemma_decoder_block{index}/"
INDEX = r"(?:_(\d+))?"


def is_here(path):
    """Whether there is such a file."""
    return path.endswith(SUFFIX) and os.path.isfile(path)


def checkpoint(path):
    """The model's `Checkpoint`, its sizes being those of its tensors.

    Raises:
        ValueError: for a damaged file, and one of another model.
    """
    stored = tensors_of_files([path], h5_tensors)
    # A task keeps its backbone's tensors one deeper.
    prefix = next((name.removesuffix(EMBEDDING) for name in stored if name.endswith(EMBEDDING)), None)
    if prefix is None:
        raise ValueError(f"`{path}` lacks `{EMBEDDING}`: it is not of a Gemma backbone or a task on one.")
    stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    sizes = _sizes(path, stored)
    return canonical.Checkpoint(
        path=path,
        format=FORMAT,
        sizes=sizes,
        table=keras_preset.table_of(sizes),
        stored=stored,
        where=path,
        ignored=tuple(name for name in stored if name.startswith(OPTIMIZER)),
    )


def _sizes(path, stored):
    usual = functools.partial(canonical.usual_shape, stored, path, index=INDEX, first="")
    vocabulary_size, hidden_dim = usual(EMBEDDING, "VD")
    heads, _, head_dim = usual(BLOCK + "attention/query_dense/vars/0", "NDH")
    kv_heads, _, _ = usual(BLOCK + "attention/key_dense/vars/0", "KDH")
    _, branch = usual(BLOCK + "gating_ffw/vars/0", "DF")
    layers = canonical.number_of_blocks(stored, BLOCK.format(index=INDEX))
    sizes = canonical.Sizes(vocabulary_size, layers, heads, kv_heads, hidden_dim, 2 * branch, head_dim)
    return canonical.checked(sizes, path)


def write(target, sizes, tensors, proto, dtype=None):
    """Writes the weights of a backbone, one tensor at a time; a vocabulary has no place in such a file.

    Args:
        target: path of a file that does not exist yet.
        sizes: `Sizes`.
        tensors: dict of `StoredTensor`, as of a `Checkpoint`.
        proto: not written.
        dtype: optional, one of float32, float16 and bfloat16 to cast to.

    Raises:
        ValueError: for another epsilon than Gemma's, for which such a file has no place, and as `arranged`.
    """
    canonical.check_epsilon(sizes, FORMAT)
    write_h5(target, canonical.arranged(keras_preset.table_of(sizes), tensors, dtype))
