"""Keeping rows, columns and heads on the devices that hold them."""

import functools

import keras
from keras import ops

from keras_gemma.kernels.platform import axis_of_columns
from keras_gemma.kernels.platform import axis_of_model
from keras_gemma.kernels.platform import devices_of_columns
from keras_gemma.kernels.platform import names_of
from keras_gemma.kernels.platform import on_jax
from keras_gemma.kernels.platform import shards_of_batch
from keras_gemma.kernels.platform import shards_of_columns


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


def tokens_apart(x):
    """As `rows_apart`, and the columns on the devices along which the distribution cuts them, if it does so.

    Said where whole rows run through a network together. What has been generated of a row is on one device.

    Args:
        x: tensor `[B, T, ...]`.

    Returns:
        A tensor `[B, T, ...]`, whole but for rows and columns, of which each stay whole if devices do not divide them.
    """
    if not on_jax() or shards_of_columns(x.shape[1]) == 1:
        return rows_apart(x)
    return _laid_out(x, _axis_of_rows(keras.distribution.distribution(), x.shape), axis_of_columns())


def stream_apart(x):
    """The residual stream: as by `tokens_apart`, and its columns also along the model axis.

    It, and what the backward pass keeps of it, would else be the same on all devices along that axis (Korthikanti et
    al., arXiv 2205.05198, section 4.2.2).

    Args:
        x: tensor `[B, T, D]`.

    Returns:
        A tensor `[B, T, D]`; as by `tokens_apart` where the devices do not divide the columns.
    """
    _, apart = _shardings_of_stream(x)
    return tokens_apart(x) if apart is None else keras.distribution.distribute_tensor(x, apart)


def out_of_stream(x):
    """What a branch reads of the residual stream, as by `tokens_apart`; its gradient as by `stream_apart`."""
    together, apart = _shardings_of_stream(x)
    return tokens_apart(x) if apart is None else _exchange(apart, together)(x)


def into_stream(x):
    """What a branch adds to the residual stream, as by `stream_apart`; its gradient as by `tokens_apart`."""
    together, apart = _shardings_of_stream(x)
    return tokens_apart(x) if apart is None else _exchange(together, apart)(x)


def _shardings_of_stream(x):
    """The JAX shardings of whole columns and of those cut along the model axis; twice `None` where they are not cut."""
    model = axis_of_model() if on_jax() else None
    if model is None or None in x.shape[:2]:
        return None, None
    distribution = keras.distribution.distribution()
    context = shards_of_columns(x.shape[1])
    if x.shape[1] % (context * distribution.device_mesh.backend_mesh.shape[model]):
        return None, None
    rows = _axis_of_rows(distribution, x.shape)
    columns = (axis_of_columns(),) if context > 1 else ()
    return _sharding(rows, columns), _sharding(rows, (*columns, model))


def branch_apart(x):
    """A branch of the feed-forward, its rows and columns as by `tokens_apart` and its width along the model axis.

    Said between the products that it comes from and goes to, which cut their weights so. XLA might else exchange it for
    a part of the columns that has all of the width, after `stream_apart`.

    Args:
        x: tensor `[B, T, F]`.

    Returns:
        A tensor `[B, T, F]`; `x` where there is no model axis, or it does not divide the width.
    """
    model = axis_of_model() if on_jax() else None
    if model is None or None in x.shape[:2]:
        return x
    distribution = keras.distribution.distribution()
    if x.shape[2] % distribution.device_mesh.backend_mesh.shape[model]:
        return x
    columns = axis_of_columns() if shards_of_columns(x.shape[1]) > 1 else None
    return _laid_out(x, _axis_of_rows(distribution, x.shape), columns, model)


def refuse_uneven_columns(length):
    """Raises a `ValueError` for rows of a length of which the devices that share a row cannot have equal parts."""
    devices = devices_of_columns()
    if length is not None and shards_of_columns(length) != devices:
        raise ValueError(
            f"Each of the {devices} devices along the mesh axis {axis_of_columns()!r} takes two parts of a row, so "
            f"{2 * devices} divides the sequence length. Received: a sequence length of {length}"
        )


def gathered(value, variable):
    """The value of a weight, whole along the axes of the mesh that cut the batch as well; its gradient is cut again.

    Left to itself, XLA multiplies with one part of the weight after the other while the next is on its way, and keeps
    the sums in between in memory: for a TPU several times the traffic of the product itself, and more to compile.

    Args:
        value: tensor, of the variable in the dtype of the computation.
        variable: the `keras.Variable`.

    Returns:
        A tensor of the same shape; `value` itself where nothing cuts it along such an axis.
    """
    parts, whole = shardings_of_weight(variable)
    return value if parts is None else _exchange(parts, whole)(value)


def shardings_of_weight(variable):
    """How a weight lies on the devices, and how it does when it is `gathered`.

    Args:
        variable: a `keras.Variable`, or a tensor that none stands for.

    Returns:
        Two `jax.sharding.NamedSharding`s; twice `None` where there is nothing to gather.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or not on_jax() or not isinstance(variable, keras.Variable):
        return None, None
    layout = distribution.get_variable_layout(variable)
    if layout is None:
        return None, None
    along = _axes_of_tokens(distribution)
    whole = tuple(None if along.intersection(names_of(axis)) else axis for axis in layout.axes)
    return (None, None) if whole == tuple(layout.axes) else (_sharding(*layout.axes), _sharding(*whole))


def shardings_that_divide(shape, *shardings):
    """The shardings, where all of them cut a tensor of this shape into equal parts; else `None` for each."""
    try:
        for sharding in filter(None, shardings):
            sharding.shard_shape(tuple(shape))
    except ValueError:
        return (None,) * len(shardings)
    return shardings


@functools.cache
def _exchange(given, wanted):
    """Function of a tensor laid out as `given`, to one as `wanted`; its gradient takes the way back.

    Without a word about the gradient XLA might sum it up whole on every device first.
    """
    from jax import custom_vjp
    from jax.lax import with_sharding_constraint

    exchange = custom_vjp(lambda x: with_sharding_constraint(x, wanted))
    exchange.defvjp(
        lambda x: (with_sharding_constraint(x, wanted), None),
        lambda _, gradient: (with_sharding_constraint(gradient, given),),
    )
    return exchange


def look_up(embedding, token_ids, cut_columns=False):
    """`embedding(token_ids)`, where the embeddings may be cut along axes that cut the tokens as well.

    Where that is their width, the devices along these axes look up the tokens of all of them, each in its own part of
    the width, and exchange what they found: every one sends no more than it keeps. XLA by itself gathers all rows of
    all pods everywhere. Where it is the vocabulary, the embeddings are gathered.

    Args:
        embedding: a built embedding layer whose weights are `embeddings` `[V, D]`.
        token_ids: int tensor `[B, T]`.
        cut_columns: bool. Whether columns go to the devices along which the distribution cuts them.

    Returns:
        A tensor `[B, T, D]`, laid out as by `tokens_apart` or, with whole columns, by `rows_apart`.
    """
    apart = tokens_apart if cut_columns else rows_apart
    distribution = keras.distribution.distribution()
    if distribution is None or not on_jax() or token_ids.shape[0] is None:
        return embedding(token_ids)
    if token_ids.shape[0] % shards_of_batch():
        return apart(embedding(token_ids))
    layout = distribution.get_variable_layout(embedding._embeddings)
    rows = names_of(distribution.get_data_layout(token_ids.shape).axes[0])
    along = _axes_of_tokens(distribution)
    vocabulary, width = layout.axes if layout else (None, None)
    if along.intersection(names_of(width)):
        others = tuple(name for name in rows if name not in names_of(width)) or None
        x = _laid_out(embedding(_laid_out(token_ids, others, None)), others, None, width)
        # One exchange along an axis: for two of them at once XLA would gather everything.
        columns = axis_of_columns() if cut_columns and shards_of_columns(token_ids.shape[1]) > 1 else None
        return apart(_laid_out(x, others, columns, tuple(name for name in names_of(width) if name in rows)))
    if along.intersection(names_of(vocabulary)):
        values = [gathered(ops.cast(v.value, embedding.compute_dtype), v) for v in embedding.variables]
        with keras.StatelessScope(zip(embedding.variables, values)):
            return apart(embedding(token_ids))
    return apart(embedding(token_ids))


def _laid_out(x, *axes):
    return keras.distribution.distribute_tensor(x, _sharding(*axes))


def _sharding(*axes):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec

    return NamedSharding(keras.distribution.distribution().device_mesh.backend_mesh, PartitionSpec(*axes))


def cache_apart(columns):
    """`columns` itself, a part of a cache, its rows and heads where attention will want them.

    Args:
        columns: tensor `[B, K, S, H]`.

    Returns:
        A tensor `[B, K, S, H]`.
    """
    sharding = sharding_of_cache(columns.shape) if on_jax() else None
    return columns if sharding is None else keras.distribution.distribute_tensor(columns, sharding)


def sharding_of_cache(shape):
    """The JAX sharding of a cache `[B, K, S, H]`: rows and heads cut as those of `on_own_rows_and_heads`.

    Args:
        shape: tuple of ints.

    Returns:
        A `jax.sharding.NamedSharding`; `None` without a `keras.distribution`.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    rows = _axis_of_rows(distribution, shape)
    taken = (*names_of(rows), axis_of_columns())
    _, heads = _axes_of_heads(distribution.device_mesh.backend_mesh, taken, shape[1], shape[1])
    return _sharding(rows, heads)


def on_own_rows_and_heads(attend, query, key, value, segment_ids):
    """`attend` of the arguments, each device of the active `keras.distribution` computing its own part.

    XLA cannot cut a Pallas call into parts, and would gather all rows before a loop over rows. Rows are cut as the
    distribution cuts its data; heads along another axis of the mesh, if it divides them.

    Args:
        attend: callable of the other arguments, which treats rows alike and groups of heads alike. Where columns are
            cut, it also takes a `Share`.
        query: float tensor `[B, T, N, H]`.
        key: float tensor `[B, T, K, H]`; `K` divides `N`.
        value: float tensor `[B, T, K, H]`.
        segment_ids: int tensor `[B, T]`.

    Returns:
        A tensor `[B, T, N, H]`.
    """
    from jax import shard_map
    from jax.sharding import PartitionSpec

    from keras_gemma.kernels.shares import on_own_columns

    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh.backend_mesh.size == 1:
        return attend(query, key, value, segment_ids)
    mesh = distribution.device_mesh.backend_mesh
    rows, columns = _axis_of_rows(distribution, query.shape), None
    devices = shards_of_columns(query.shape[1])
    if devices > 1:
        columns = axis_of_columns()
        attend = functools.partial(on_own_columns, attend, columns, devices)
    taken = (*names_of(rows), axis_of_columns())
    query_heads, kv_heads = _axes_of_heads(mesh, taken, query.shape[2], key.shape[2])
    of_query, of_keys = PartitionSpec(rows, columns, query_heads), PartitionSpec(rows, columns, kv_heads)
    specs = (of_query, of_keys, of_keys, PartitionSpec(rows, columns))
    # Neither Pallas nor cuDNN calls say along which axes their results vary, so JAX cannot check it.
    return shard_map(attend, mesh=mesh, in_specs=specs, out_specs=of_query, check_vma=False)(
        query, key, value, segment_ids
    )


def _axis_of_rows(distribution, shape):
    """Name, or names, of the mesh axis that cuts the rows; `None` where it does not divide them."""
    return None if shape[0] % shards_of_batch() else distribution.get_data_layout(shape).axes[0]


def _axes_of_tokens(distribution):
    """Names of the mesh axes along which devices have different tokens."""
    return {*names_of(distribution.get_data_layout((1,)).axes[0]), axis_of_columns()} - {None}


def _axes_of_heads(mesh, taken, heads, kv_heads):
    """Names of the mesh axis that cuts the query heads and of the one that cuts the key-value heads, or `None`."""
    for axis in mesh.axis_names:
        size = mesh.shape[axis]
        if size == 1 or axis in taken or heads % size:
            continue
        if kv_heads % size == 0:
            return axis, axis
        if kv_heads == 1:
            return axis, None
    return None, None
