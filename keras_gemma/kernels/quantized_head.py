"""Products with a quantised table of embeddings, with the gradient that the table as it is stands for.

Rounding has no gradient of its own. What goes back is the gradient of the product without it, the straight-through
estimator of Bengio et al., arXiv 1308.3432. B batch, T tokens, D width, V vocabulary, G groups of D.
"""

from keras import ops

from keras_gemma.kernels.products import einsum_float32


def int8_logits(hidden, table, scale, quantizer=None):
    """Logits of a table with one scale a row.

    Args:
        hidden: float tensor `[B, T, D]`.
        table: int8 tensor `[V, D]`.
        scale: float tensor `[V]`. A row of the table divided by its scale is an embedding.
        quantizer: optional `keras.Quantizer`, which rounds `hidden` for a product of integers.

    Returns:
        Float32 logits `[B, T, V]`.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.kernels import int8_logits
    >>> hidden, table, scale = np.ones((1, 2), "float32"), np.array([[2, 4]], "int8"), np.array([2.0], "float32")
    >>> np.asarray(int8_logits(hidden, table, scale)).tolist()
    [[3.0]]
    """
    hidden, table, scale = ops.convert_to_tensor(hidden), ops.convert_to_tensor(table), ops.cast(scale, "float32")
    if quantizer is None:
        return einsum_float32("...d,vd->...v", hidden, ops.cast(table, hidden.dtype)) / scale

    @ops.custom_gradient
    def product(hidden, table, scale):
        rounded, scale_of_hidden = quantizer(ops.cast(hidden, "float32"))
        logits = ops.cast(ops.matmul(rounded, ops.transpose(table)), "float32") / (scale_of_hidden * scale)

        def gradients(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            errors = ops.cast(upstream / scale, hidden.dtype)
            of_hidden = einsum_float32("...v,vd->...d", errors, ops.cast(table, hidden.dtype))
            return ops.cast(of_hidden, hidden.dtype), None, None

        return logits, gradients

    return product(hidden, table, scale)


def logits_of_groups(hidden, table, scale, zero=None, groups=None, quantizer=None):
    """Logits of a table whose rows have one scale, or a scale and a zero point for each group of columns.

    Args:
        hidden: float tensor `[B, T, D]`.
        table: int8 tensor `[V, D]`.
        scale: float tensor `[V]`, by which a row is divided; or `[V, G]`, with which groups are multiplied.
        zero: int8 tensor `[V, G]`, which is subtracted before, or `None` without groups.
        groups: tensor `[D]`, the group of each column.
        quantizer: optional `keras.Quantizer`, which rounds `hidden`.

    Returns:
        Float32 logits `[B, T, V]`.
    """
    scale, numbers = ops.cast(scale, "float32"), ops.cast(table, "float32")
    if zero is None:
        embeddings = numbers / scale[:, None]
    else:
        groups = ops.cast(groups, "int32")
        zero = ops.take(ops.cast(zero, "float32"), groups, axis=-1)
        embeddings = (numbers - zero) * ops.take(scale, groups, axis=-1)
    if quantizer is not None:
        hidden = _rounded(hidden, quantizer)
    return einsum_float32("...d,vd->...v", hidden, ops.cast(embeddings, hidden.dtype))


def _rounded(x, quantizer):
    """What a quantiser makes of `x`, float32, with the gradient of `x`."""
    x = ops.cast(x, "float32")
    numbers, scale = quantizer(x)
    return x + ops.stop_gradient(ops.cast(numbers, "float32") / scale - x)
