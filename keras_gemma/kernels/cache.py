"""Writing into a key-value cache."""

from keras import ops

from keras_gemma.kernels.platform import jax_platform
from keras_gemma.kernels.platform import on_jax
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
    if on_jax() and jax_platform() == "tpu":
        return _in_order_of_axes(ops.slice_update(_in_order_of_axes(cache), (0, 0, first, 0), columns))
    if not on_torch():
        return ops.slice_update(cache, (0, 0, first, 0), columns)
    first = int(first)
    # Beam search may hand over several rows that are views of one.
    cache = cache.contiguous()
    cache[:, :, first : first + columns.shape[2]] = columns
    return cache


def _in_order_of_axes(cache):
    """The cache as it lies in memory between programs.

    A loop that writes single columns would have its heads next to each other, and so a second cache for as long as it
    runs.
    """
    from jax.experimental.layout import Layout
    from jax.experimental.layout import with_layout_constraint

    return with_layout_constraint(cache, Layout(major_to_minor=(0, 1, 2, 3)))
