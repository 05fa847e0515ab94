"""Choosing one of many: the likeliest, or by chance."""

import keras
from keras import ops


def first_argmax(scores):
    """Index of the largest score of every row, the first of equals.

    Two plain reductions: compilers for CPUs do not vectorise the reduction over pairs that an argmax is.

    Args:
        scores: float tensor `[B, V]`.

    Returns:
        An int32 tensor `[B]`.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.kernels import first_argmax
    >>> np.asarray(first_argmax(np.array([[1.0, 3.0, 3.0]], "float32"))).tolist()
    [1]
    """
    count = ops.shape(scores)[-1]
    largest = ops.max(scores, axis=-1, keepdims=True)
    candidates = ops.where(scores >= largest, ops.arange(count, dtype="int32")[None, :], count - 1)
    return ops.min(candidates, axis=-1)


def draw(probabilities, seed):
    """One index of every row, as likely as its probability says; never one of probability 0.

    First a block of indices is drawn and then one within it: `2 √V` random numbers for a row and not `V`, which cost
    more than the network does that a small model is.

    Args:
        probabilities: float tensor `[B, V]`, which need not sum up to 1.
        seed: a `keras.random.SeedGenerator`, which goes on by two draws. A number would do for only one of them.

    Returns:
        An int32 tensor `[B]`.

    Example:

    >>> import keras, numpy as np
    >>> from keras_gemma.kernels import draw
    >>> np.asarray(draw(np.array([[0.0, 0.0, 1.0]], "float32"), keras.random.SeedGenerator(1))).tolist()
    [2]
    """
    size = probabilities.shape[-1]
    # A power of two, so that devices that share a vocabulary share its blocks.
    count = 1 << (size - 1).bit_length() // 2
    width = -(-size // count)
    blocks = ops.reshape(ops.pad(probabilities, [(0, 0), (0, count * width - size)]), (-1, count, width))
    block = _categorical(ops.sum(blocks, axis=-1), seed)
    # A comparison and not a gather, for the same devices.
    chosen = ops.arange(count, dtype="int32")[None, :] == block[:, None]
    within = _categorical(ops.sum(ops.where(chosen[..., None], blocks, 0.0), axis=1), seed)
    return block * width + within


def _categorical(probabilities, seed):
    return keras.random.categorical(ops.log(probabilities), 1, dtype="int32", seed=seed)[:, 0]
