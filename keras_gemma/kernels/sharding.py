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


def look_up(embed, token_ids, path):
    """`embed(token_ids)`, where the width of the embeddings may be cut along an axis that cuts the rows as well.

    Then the devices along that axis look up the rows of all of them, each in its own part of the width, and exchange
    what they found: every one sends no more than it keeps. XLA by itself gathers all rows of all pods everywhere.

    Args:
        embed: callable from int `[B, T]` to `[B, T, D]`.
        token_ids: int tensor `[B, T]`.
        path: string. The path of the embeddings `[V, D]`.

    Returns:
        A tensor `[B, T, D]`, laid out as by `rows_apart`.
    """
    distribution = keras.distribution.distribution()
    layout = distribution and distribution.get_tensor_layout(path)
    width = layout and layout.axes[-1]
    rows = layout and _names(distribution.get_data_layout(token_ids.shape).axes[0])
    if not on_jax() or not width or width not in rows or token_ids.shape[0] is None:
        return rows_apart(embed(token_ids))
    if token_ids.shape[0] % shards_of_batch():
        return embed(token_ids)
    others = tuple(name for name in rows if name != width) or None
    x = embed(_laid_out(token_ids, others, None))
    return rows_apart(_laid_out(x, others, None, width))


def _laid_out(x, *axes):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec

    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    return keras.distribution.distribute_tensor(x, NamedSharding(mesh, PartitionSpec(*axes)))


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
