"""Choosing the likeliest of many."""

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
