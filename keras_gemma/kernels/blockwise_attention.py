"""Causal attention in blocks under XLA: no tensor of length × length, neither forwards nor backwards.

A block of queries meets one tile of keys after the other. Forwards a running maximum and sum make the softmax exact;
backwards the weights are computed again from their log-sum-exp (arXiv 2307.08691, algorithms 1 and 2).
"""

from functools import partial
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from keras_gemma.kernels.platform import on_jax_cpu
from keras_gemma.kernels.products import einsum_float32
from keras_gemma.kernels.shares import WHOLE

MASKED_SCORE = -1e30


class Blocks(NamedTuple):
    """How the work is divided.

    Args:
        queries: int. Power of two, the positions whose queries form the rows of a tile of scores.
        keys: int. Power of two, its columns.
        heads_at_once: bool. Whether all rows and key-value heads advance together, as wide machines like it.
    """

    queries: int
    keys: int
    heads_at_once: bool = False


def blockwise_attention(query, key, value, segment_ids, share=WHOLE, blocks=None):
    """Attention of every position to itself and the earlier positions of its own segment.

    Args:
        query: float tensor `[B, T, N, H]`, already scaled.
        key: float tensor `[B, S, K, H]`; `K` divides `N`.
        value: float tensor `[B, S, K, H]`.
        segment_ids: int tensor `[B, S]`.
        share: `Share`. Which columns the queries are; all by default.
        blocks: `Blocks`. By default what is fast on the platform.

    Returns:
        A tensor `[B, T, N, H]` in the dtype of `value`.
    """
    batch, own_length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    width = own_length // share.parts
    blocks = blocks or default_blocks(width, group)
    missing, missing_keys = -width % blocks.queries, -key.shape[1] % blocks.keys
    query = query.reshape(batch, share.parts, width, heads, head_dim)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
    # Added queries are of the segment before them, so that they look at no further tile.
    query_ids = jnp.pad(share.own(segment_ids, width), ((0, 0), (0, 0), (0, missing)), mode="edge")
    key, value = (jnp.pad(x, ((0, 0), (0, missing_keys), (0, 0), (0, 0))) for x in (key, value))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, missing_keys)))
    # The query heads of a group become rows, so that a tile is one plain matrix product.
    query = query.reshape(batch, -1, kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    query = query.reshape(batch, kv_heads, -1, head_dim)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    starts = share.own_starts[:, None] + jnp.arange(0, width + missing, blocks.queries, dtype="int32")
    attended = _attention(query, key, value, query_ids.reshape(batch, -1), segment_ids, starts.reshape(-1), blocks)
    attended = attended.reshape(batch, kv_heads, share.parts, -1, group, head_dim)[:, :, :, :width]
    return attended.transpose(0, 2, 3, 1, 4, 5).reshape(batch, own_length, heads, head_dim)


def default_blocks(length, group):
    if on_jax_cpu():
        # A tile of scores of one key-value head stays in the cache.
        return Blocks(queries=64 if group >= 4 else 128, keys=64)
    whole_row = 1 << (length - 1).bit_length()
    return Blocks(queries=min(256, whole_row), keys=min(512, whole_row), heads_at_once=True)


class Places(NamedTuple):
    """Where queries and keys stand.

    Attributes:
        query_ids: int tensor `[B, T]`, or `[T]` of one row, the segments of the queries.
        segment_ids: int tensor `[B, S]`, or `[S]`, those of the keys.
        starts: int tensor `[T / queries]`, the column of the first query of every block.
        first_tiles: int tensor `[B, T / queries]`, or without rows, index of the first tile of keys whose segments a
            block of queries may see.
    """

    query_ids: Any
    segment_ids: Any
    starts: Any
    first_tiles: Any


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(query, key, value, query_ids, segment_ids, starts, blocks):
    """`[B, K, T * G, H]`, `[B, K, S, H]`, `[B, K, S, H]` and places → `[B, K, T * G, H]`."""
    attended, _ = _forward(query, key, value, query_ids, segment_ids, starts, blocks)
    return attended


# Traced once for all layers of a model.
@partial(jax.jit, static_argnames="blocks")
def _forward(query, key, value, query_ids, segment_ids, starts, blocks):
    places = _places(blocks, query_ids, segment_ids, starts)
    attended, log_sum_exp = _for_every_head(partial(_attend, blocks), blocks, places, query, key, value)
    return attended, (query, key, value, query_ids, segment_ids, starts, attended, log_sum_exp)


@partial(jax.jit, static_argnames="blocks")
def _backward(blocks, saved, gradient):
    query, key, value, query_ids, segment_ids, starts, attended, log_sum_exp = saved
    # What the normalisation of the weights takes from the gradient of every score of a query.
    mean = jnp.sum(attended.astype("float32") * gradient.astype("float32"), axis=-1)
    tensors = (query, key, value, gradient, log_sum_exp, mean)
    places = _places(blocks, query_ids, segment_ids, starts)
    return (*_for_every_head(partial(_attend_back, blocks), blocks, places, *tensors), None, None, None)


_attention.defvjp(_forward, _backward)


def _for_every_head(function, blocks, places, *tensors):
    """`function(places of a row, *tensors)` over the first two axes of `[B, K, ...]`.

    Heads at once share the earliest first tiles of all rows.
    """
    axes = [0 for _ in tensors]
    if blocks.heads_at_once:
        places = places._replace(first_tiles=jnp.min(places.first_tiles, axis=0))
        of_rows = Places(query_ids=0, segment_ids=0, starts=None, first_tiles=None)
        over_heads = jax.vmap(function, in_axes=(None, *axes))
        return jax.vmap(over_heads, in_axes=(of_rows, *axes))(places, *tensors)

    def over_heads(row):
        query_ids, segment_ids, first_tiles, *tensors = row
        of_row = Places(query_ids, segment_ids, places.starts, first_tiles)
        return lax.map(lambda head: function(of_row, *head), tuple(tensors))

    return lax.map(over_heads, (places.query_ids, places.segment_ids, places.first_tiles, *tensors))


def _places(blocks, query_ids, segment_ids, starts):
    return Places(query_ids, segment_ids, starts, _first_tiles(blocks, query_ids, segment_ids))


def _first_tiles(blocks, query_ids, segment_ids):
    batch, length = segment_ids.shape
    of_block = query_ids.reshape(batch, -1, blocks.queries)
    lowest, highest = jnp.min(of_block, axis=-1, keepdims=True), jnp.max(of_block, axis=-1, keepdims=True)
    ids = segment_ids[:, None, :]
    # A plain reduction: compilers for CPUs do not vectorise an argmax.
    columns = jnp.where((lowest <= ids) & (ids <= highest), jnp.arange(length, dtype="int32"), length)
    return jnp.min(columns, axis=-1) // blocks.keys


def _attend(blocks, places, query, key, value):
    """`[T * G, H]`, `[S, H]`, `[S, H]` → attended `[T * G, H]` and log-sum-exp `[T * G]`."""
    rows = query.shape[0] // places.starts.shape[0]

    def block(index):
        queries = _slice(query, index, rows)

        def tile(tile_index, running):
            largest, total, attended = running
            keys, values = _slice(key, tile_index, blocks.keys), _slice(value, tile_index, blocks.keys)
            scores = _scores(blocks, places, index, tile_index, queries, keys)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
            weights, scale = jnp.exp(scores - new_largest), jnp.exp(largest - new_largest)
            total = total * scale + jnp.sum(weights, axis=-1, keepdims=True)
            attended = attended * scale + einsum_float32("qs,sh->qh", weights.astype(value.dtype), values)
            return new_largest, total, attended

        start = jnp.full((rows, 1), MASKED_SCORE), jnp.zeros((rows, 1)), jnp.zeros(queries.shape)
        largest, total, attended = lax.fori_loop(*_tiles(blocks, places, index), tile, start)
        return (attended / total).astype(value.dtype), (largest + jnp.log(total))[:, 0]

    attended, log_sum_exp = lax.map(block, jnp.arange(places.starts.shape[0]))
    return attended.reshape(query.shape), log_sum_exp.reshape(-1)


def _attend_back(blocks, places, query, key, value, gradient, log_sum_exp, mean):
    """Gradients of query `[T * G, H]`, key `[S, H]` and value `[S, H]` from that of what was attended `[T * G, H]`."""
    rows = query.shape[0] // places.starts.shape[0]

    def block(index, gradients):
        of_query, of_key, of_value = gradients
        queries, gradient_rows = _slice(query, index, rows), _slice(gradient, index, rows)
        shift, means = _slice(log_sum_exp, index, rows)[:, None], _slice(mean, index, rows)[:, None]

        def tile(tile_index, gradients):
            of_queries, of_key, of_value = gradients
            keys, values = _slice(key, tile_index, blocks.keys), _slice(value, tile_index, blocks.keys)
            weights = jnp.exp(_scores(blocks, places, index, tile_index, queries, keys) - shift)
            of_weights = einsum_float32("qh,sh->qs", gradient_rows, values)
            of_scores = (weights * (of_weights - means)).astype(query.dtype)
            of_queries = of_queries + einsum_float32("qs,sh->qh", of_scores, keys)
            of_key = _add(of_key, tile_index, einsum_float32("qs,qh->sh", of_scores, queries))
            weights = weights.astype(gradient.dtype)
            of_value = _add(of_value, tile_index, einsum_float32("qs,qh->sh", weights, gradient_rows))
            return of_queries, of_key, of_value

        start = jnp.zeros(queries.shape), of_key, of_value
        of_queries, of_key, of_value = lax.fori_loop(*_tiles(blocks, places, index), tile, start)
        of_queries = of_queries.astype(query.dtype)
        return lax.dynamic_update_slice_in_dim(of_query, of_queries, index * rows, 0), of_key, of_value

    start = jnp.zeros_like(query), jnp.zeros(key.shape), jnp.zeros(value.shape)
    of_query, of_key, of_value = lax.fori_loop(0, places.starts.shape[0], block, start)
    return of_query, of_key.astype(key.dtype), of_value.astype(value.dtype)


def _scores(blocks, places, index, tile_index, queries, keys):
    """Float32 scores `[queries * G, keys]` of a block of queries with a tile of keys, masked."""
    columns = tile_index * blocks.keys + jnp.arange(blocks.keys)
    rows = places.starts[index] + jnp.arange(blocks.queries)
    row_ids = _slice(places.query_ids, index, blocks.queries)
    column_ids = _slice(places.segment_ids, tile_index, blocks.keys)
    mask = (rows[:, None] >= columns[None, :]) & (row_ids[:, None] == column_ids[None, :])
    scores = einsum_float32("qh,sh->qs", queries, keys).reshape(blocks.queries, -1, blocks.keys)
    return jnp.where(mask[:, None, :], scores, MASKED_SCORE).reshape(-1, blocks.keys)


def _tiles(blocks, places, index):
    """The tiles of keys for a block of queries: the first, and how many begin before its last query is reached."""
    reached = (places.starts[index] + blocks.queries + blocks.keys - 1) // blocks.keys
    # Queries that only fill a part up may stand behind the last key.
    return places.first_tiles[index], jnp.minimum(reached, places.segment_ids.shape[0] // blocks.keys)


def _slice(x, index, size):
    return lax.dynamic_slice_in_dim(x, index * size, size, 0)


def _add(x, index, block):
    first = index * block.shape[0]
    return lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(x, first, block.shape[0], 0) + block, first, 0)
