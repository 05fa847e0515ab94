"""The key-value cache, and the forward pass of a few tokens over it.

A cache is a tree of tensors with the batch first, so that a sampler may repeat and gather its rows:

    {"layers": ((key [B, K, S, H], value [B, K, S, H]), …), "first_column": int32 [B]}
"""

from keras import ops

from keras_gemma import kernels


def empty_cache(backbone, batch_size, capacity):
    """A cache of a backbone with room for `capacity` columns, whose rows all begin at column 0.

    Args:
        backbone: a `GemmaBackbone`.
        batch_size: int, `B`.
        capacity: int, `S`.

    Returns:
        The tree described above.
    """
    shape = (batch_size, backbone.num_key_value_heads, capacity, backbone.head_dim)
    layers = tuple(
        (ops.zeros(shape, backbone.compute_dtype), ops.zeros(shape, backbone.compute_dtype))
        for _ in backbone.transformer_layers
    )
    return {"layers": layers, "first_column": ops.zeros((batch_size,), "int32")}


def check_cache(cache, length, column):
    """Raises a `ValueError` for what is no cache, or one without room for `length` tokens from an int `column` on."""
    if not isinstance(cache, dict) or set(cache) != {"layers", "first_column"}:
        raise ValueError(f"The cache is what `build_cache` makes. Received: {type(cache).__name__}")
    capacity = cache["layers"][0][0].shape[2]
    if isinstance(column, int) and column + length > capacity:
        raise ValueError(f"The cache has {capacity} columns. Received: {length} tokens at column {column}")


def update_cache(network, weights, token_ids, cache, column):
    """Runs tokens through the network, writing their keys and values into a cache.

    Args:
        network: see `network`.
        weights: the network's `weights()`, or tensors that stand for them in a compiled function.
        token_ids: int tensor `[B, T]`, the tokens of the columns from `column` on.
        cache: see above; filled before `column`.
        column: int scalar.

    Returns:
        Final hidden states `[B, T, D]` and the new cache.
    """
    first_column = cache["first_column"]
    columns = column + ops.arange(ops.shape(token_ids)[1], dtype="int32")
    rotation = network.rotation(positions_of(columns, first_column))
    ends = network.ends(weights["ends"])
    x = ends.embed(token_ids)
    layers = []
    for index, (block_weights, (keys, values)) in enumerate(zip(weights["blocks"], cache["layers"])):
        block = network.block(index, block_weights)
        query, key, value = block.queries_keys_values(x, rotation)
        attended, keys, values = kernels.cached_attention(query, key, value, keys, values, first_column, column)
        x = kernels.rows_apart(block.finish(x, attended))
        layers.append((keys, values))
    return ends.hidden(x), {"layers": tuple(layers), "first_column": first_column}


def positions_of(columns, first_column):
    """Positions `[B, T]` of columns `[T]`: 0 at the first token of each row, and before it."""
    return ops.maximum(columns[None, :] - first_column[:, None], 0)


def heads_first(x):
    """`[B, T, K, H]` → `[B, K, T, H]`."""
    return ops.transpose(x, (0, 2, 1, 3))


def with_capacity(x, capacity):
    """Pads columns `[B, K, S, H]` to `[B, K, capacity, H]`."""
    return ops.pad(x, [(0, 0), (0, 0), (0, capacity - ops.shape(x)[2]), (0, 0)])
