"""Keeping rows, and heads, on the devices that hold them."""

import keras

from keras_gemma.kernels.platform import on_jax
from keras_gemma.kernels.platform import shards_of_batch


def rows_apart(x):
    """`x` itself, its rows on the devices among which the active `keras.distribution` divides a batch.

    Said of the residual stream between blocks, forwards and, as JAX carries it over, backwards. Without it XLA may
    follow the layout of a weight instead, and cut the width of what all devices then hold all rows of.

    Args:
        x: tensor `[B, ...]`.

    Returns:
        A tensor `[B, ...]`, whole but for its rows; `x` where the devices do not divide them.
    """
    distribution = keras.distribution.distribution()
    rows = x.shape[0]
    if distribution is None or not on_jax() or rows is None or rows % shards_of_batch():
        return x
    return keras.distribution.distribute_tensor(x, distribution.get_data_layout(x.shape))


def on_own_rows_and_heads(attend, query, key, value, segment_ids):
    """`attend` of the arguments, each device of the active `keras.distribution` computing its own part.

    XLA cannot cut a Pallas call into parts, and would gather all rows before a loop over rows. Rows are cut as the
    distribution cuts its data; heads along another axis of the mesh, if it divides them.

    Args:
        attend: callable of the other arguments, which treats rows alike and groups of heads alike.
        query: float tensor `[B, T, N, H]`.
        key: float tensor `[B, T, K, H]`; `K` divides `N`.
        value: float tensor `[B, T, K, H]`.
        segment_ids: int tensor `[B, T]`.

    Returns:
        A tensor `[B, T, N, H]`.
    """
    from jax import shard_map
    from jax.sharding import PartitionSpec

    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh.backend_mesh.size == 1:
        return attend(query, key, value, segment_ids)
    mesh = distribution.device_mesh.backend_mesh
    rows = _axis_of_rows(distribution, query.shape)
    query_heads, kv_heads = _axes_of_heads(mesh, rows, query.shape[2], key.shape[2])
    of_query, of_keys = PartitionSpec(rows, None, query_heads), PartitionSpec(rows, None, kv_heads)
    specs = (of_query, of_keys, of_keys, PartitionSpec(rows))
    # Neither Pallas nor cuDNN calls say along which axes their results vary, so JAX cannot check it.
    return shard_map(attend, mesh=mesh, in_specs=specs, out_specs=of_query, check_vma=False)(
        query, key, value, segment_ids
    )


def _axis_of_rows(distribution, shape):
    """Name, or names, of the mesh axis that cuts the rows; `None` where it does not divide them."""
    return None if shape[0] % shards_of_batch() else distribution.get_data_layout(shape).axes[0]


def _axes_of_heads(mesh, rows, heads, kv_heads):
    """Names of the mesh axis that cuts the query heads and of the one that cuts the key-value heads, or `None`."""
    for axis in mesh.axis_names:
        size = mesh.shape[axis]
        if size == 1 or axis in _names(rows) or heads % size:
            continue
        if kv_heads % size == 0:
            return axis, axis
        if kv_heads == 1:
            return axis, None
    return None, None


def _names(axis):
    return axis if isinstance(axis, tuple) else (axis,)
