"""Writing into a key-value cache."""

from keras import ops

from keras_gemma.kernels.platform import on_torch


def write_columns(cache, columns, first):
    """Replaces columns of a cache, in place where the platform can.

    XLA updates a donated buffer in place; torch would copy the whole cache, so there the caller's tensor itself
    is changed.

    Args:
        cache: float tensor `[B, K, S, H]`.
        columns: float tensor `[B, K, T, H]`.
        first: int scalar, the first column replaced.

    Returns:
        The new cache `[B, K, S, H]`.
    """
    columns = ops.cast(columns, cache.dtype)
    if not on_torch():
        return ops.slice_update(cache, (0, 0, first, 0), columns)
    first = int(first)
    # Beam search may hand over several rows that are views of one.
    cache = cache.contiguous()
    cache[:, :, first : first + columns.shape[2]] = columns
    return cache
