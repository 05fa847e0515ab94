"""Attention with grouped heads: causal over a sequence, over a prompt, and of new tokens over a cache."""

from functools import partial

import keras
from keras import ops

from keras_gemma.kernels.cache import write_columns
from keras_gemma.kernels.continuations import continued
from keras_gemma.kernels.platform import jax_platform
from keras_gemma.kernels.platform import on_jax
from keras_gemma.kernels.platform import on_jax_cpu
from keras_gemma.kernels.products import einsum_float32

MASKED_SCORE = -1e30
# Longest sequences whose scores are one tensor on JAX: on a CPU blocks are no faster, and a TPU's are no shorter.
WHOLE_SCORES = 128
# Queries whose weights are computed again for the gradients, where no kernel does it.
RECOMPUTED_BLOCK = 512
# Queries of a prompt that share one slice of keys. Short slices skip more of the masked half, and each is compiled.
SEGMENT = 256
SEGMENT_ON_ACCELERATOR = 1024
# Queries of one prompt whose scores stay in a CPU's cache.
QUERIES_IN_CACHE = 128


def causal_attention(query, key, value, segment_ids, dropout=None):
    """Attention of every position to itself and the earlier positions of its own segment.

    Earlier means in an earlier column. Within a segment that is the order of the rotary positions, packed or padded,
    so the positions themselves are needed by the rotation of query and key only.

    Padding is a segment of its own (0): no real position attends to it, and what stands at padded positions of the
    result is finite but meaningless. Weights are float32 until they meet the values.

    Long sequences never form a tensor of `T × T`: on JAX Splash computes them on a TPU, cuDNN on an NVIDIA GPU what
    it supports, and XLA the rest in blocks; on other backends blocks of queries are computed again for their
    gradients.

    Args:
        query: float tensor `[B, T, N, H]`, already scaled.
        key: float tensor `[B, T, K, H]`; `K` divides `N`.
        value: float tensor `[B, T, K, H]`.
        segment_ids: int tensor `[B, T]`, 0 where padded.
        dropout: optional callable applied to the attention weights, which then are whole tensors.

    Returns:
        A tensor `[B, T, N, H]` in the dtype of `value`.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.kernels import causal_attention
    >>> query, key = np.zeros((1, 3, 2, 4), "float32"), np.zeros((1, 3, 1, 4), "float32")
    >>> value = np.array([[1.0], [3.0], [5.0]], "float32").reshape(1, 3, 1, 1) * np.ones(4, "float32")
    >>> attended = causal_attention(query, key, value, np.array([[1, 1, 2]], "int32"))
    >>> np.asarray(attended)[0, :, 0, 0].tolist()
    [1.0, 2.0, 5.0]
    """
    if continued() is not None:
        rows = map(continued().in_rows, (query, key, value, segment_ids))
        return continued().once(_causal_attention(*rows, dropout))
    return _causal_attention(query, key, value, segment_ids, dropout)


def _causal_attention(query, key, value, segment_ids, dropout):
    length = query.shape[1]
    # Neither a graph of Keras nor an exported program knows a length.
    if dropout is not None or not isinstance(length, int):
        return plain_attention(query, key, value, segment_ids, dropout)
    if not on_jax():
        return recomputed_attention(query, key, value, segment_ids)
    if length <= WHOLE_SCORES:
        return plain_attention(query, key, value, segment_ids)
    from keras_gemma.kernels.jax_attention import jax_attention

    return jax_attention(query, key, value, segment_ids)


def plain_attention(query, key, value, segment_ids, dropout=None):
    """What `causal_attention` computes, written down plainly: the reference of all other paths."""
    return _attention_from(0, ops.shape(query)[1], query, key, value, segment_ids, dropout)


def recomputed_attention(query, key, value, segment_ids, block=RECOMPUTED_BLOCK):
    """`plain_attention` over blocks of queries whose weights are not kept for the gradients.

    Args:
        query, key, value, segment_ids: as of `causal_attention`.
        block: int. Queries of a block.
    """
    length = query.shape[1]
    if length <= block:
        return plain_attention(query, key, value, segment_ids)
    blocks = [
        keras.remat(partial(_attention_from, start, min(start + block, length)))(query, key, value, segment_ids)
        for start in range(0, length, block)
    ]
    return ops.concatenate(blocks, axis=1)


def _attention_from(start, end, query, key, value, segment_ids, dropout=None):
    """Attention `[B, end - start, N, H]` of the queries from `start` to `end`."""
    columns = ops.arange(end, dtype="int32")
    earlier = columns[start:, None] >= columns[None, :]
    same_segment = segment_ids[:, start:end, None] == segment_ids[:, None, :end]
    mask = ops.logical_and(earlier[None], same_segment)
    return _grouped_attention(query[:, start:end], key[:, :end], value[:, :end], mask, dropout)


def prompt_attention(query, key, value, first_column):
    """Causal attention over right-aligned prompts, without gradients.

    Args:
        query: float tensor `[B, T, N, H]`, already scaled.
        key: float tensor `[B, T, K, H]`; `K` divides `N`.
        value: float tensor `[B, T, K, H]`.
        first_column: int tensor `[B]`, the first column that holds a token of the row.

    Returns:
        A tensor `[B, T, N, H]` in the dtype of `value`; finite but meaningless before `first_column`.
    """
    length = ops.shape(query)[1]
    if on_jax() and jax_platform() == "tpu":
        real = ops.arange(length, dtype="int32")[None, :] >= first_column[:, None]
        return causal_attention(query, key, value, ops.cast(real, "int32"))
    blockwise = on_jax_cpu() and length > QUERIES_IN_CACHE
    attend = _segment_in_cache_blocks if blockwise else _segment
    step = SEGMENT if blockwise else SEGMENT_ON_ACCELERATOR
    segments = [
        attend(query, key, value, first_column, start, min(start + step, length)) for start in range(0, length, step)
    ]
    return segments[0] if len(segments) == 1 else ops.concatenate(segments, axis=1)


def _segment(query, key, value, first_column, start, end):
    columns = ops.arange(end, dtype="int32")
    earlier = columns[None, :] <= columns[start:, None]
    real = columns[None, :] >= first_column[:, None]
    mask = ops.logical_and(earlier[None], real[:, None, :])
    return _grouped_attention(query[:, start:end], key[:, :end], value[:, :end], mask)


def _segment_in_cache_blocks(query, key, value, first_column, start, end):
    """One block of queries of one row and one key-value head at a time, so that its scores never leave the cache."""
    from jax import lax

    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    query = query.reshape(batch, length, kv_heads, group, head_dim)
    size = min(QUERIES_IN_CACHE, end - start)
    blocks = -(-(end - start) // size)
    columns = ops.arange(end, dtype="int32")

    def block(index):
        row, head, block_index = index // (kv_heads * blocks), index // blocks % kv_heads, index % blocks
        # The last block reaches back into the one before it, so that all blocks are of one size.
        first_query = ops.minimum(start + block_index * size, end - size)
        queries = lax.dynamic_slice(query, (row, first_query, head, 0, 0), (1, size, 1, group, head_dim))
        keys = lax.dynamic_slice(key, (row, 0, head, 0), (1, end, 1, head_dim)).reshape(end, head_dim)
        values = lax.dynamic_slice(value, (row, 0, head, 0), (1, end, 1, head_dim)).reshape(end, head_dim)
        scores = einsum_float32("qh,sh->qs", queries.reshape(size * group, head_dim), keys)
        earlier = columns[None, :] <= first_query + columns[:size, None]
        mask = ops.logical_and(earlier, columns[None, :] >= first_column[row])
        scores = ops.where(mask[:, None], scores.reshape(size, group, end), MASKED_SCORE).reshape(size * group, end)
        weights = ops.exp(scores - ops.max(scores, axis=-1, keepdims=True))
        attended = ops.matmul(ops.cast(weights, value.dtype), values) / ops.sum(weights, axis=-1, keepdims=True)
        return ops.cast(attended, value.dtype).reshape(size, group, head_dim)

    attended = lax.map(block, ops.arange(batch * kv_heads * blocks, dtype="int32"))
    attended = attended.reshape(batch, kv_heads, blocks, size, group, head_dim)
    attended = ops.transpose(attended, (0, 2, 3, 1, 4, 5)).reshape(batch, blocks * size, heads, head_dim)
    overlap = blocks * size - (end - start)
    if not overlap:
        return attended
    return ops.concatenate([attended[:, : (blocks - 1) * size], attended[:, (blocks - 1) * size + overlap :]], axis=1)


def cached_attention(query, key, value, keys, values, first_column, column):
    """Attention of new tokens to themselves and to the filled columns of a cache, which takes them in.

    Args:
        query: float tensor `[B, T, N, H]`, already scaled, of the columns from `column` on.
        key: float tensor `[B, T, K, H]` of the same columns. Those before `first_column` are padding.
        value: float tensor `[B, T, K, H]`.
        keys: float tensor `[B, K, S, H]`, the cache; filled before `column`.
        values: float tensor `[B, K, S, H]`.
        first_column: int tensor `[B]`, the first column that holds a token of the row.
        column: int scalar, the column of the first new token.

    Returns:
        A tensor `[B, T, N, H]` in the dtype of `value`, and the new keys and values of the cache.
    """
    batch, length, heads, head_dim = ops.shape(query)
    kv_heads = ops.shape(keys)[1]
    group = heads // kv_heads
    key, value = (ops.cast(ops.transpose(x, (0, 2, 1, 3)), keys.dtype) for x in (key, value))
    query = ops.reshape(query, (batch, length, kv_heads, group, head_dim))
    query = ops.reshape(ops.transpose(query, (0, 2, 1, 3, 4)), (batch, kv_heads, length * group, head_dim))
    if on_jax_cpu():
        attended = _before_writing(query, key, value, keys, values, first_column, column)
        column = _after(column, attended)
        keys, values = write_columns(keys, key, column), write_columns(values, value, column)
    else:
        keys, values = write_columns(keys, key, column), write_columns(values, value, column)
        query_columns = column + ops.repeat(ops.arange(length, dtype="int32"), group)
        scores = _masked(einsum_float32("bkqh,bksh->bkqs", query, keys), query_columns, first_column)
        attended = ops.matmul(ops.cast(ops.softmax(scores, axis=-1), value.dtype), values)
    attended = ops.reshape(attended, (batch, kv_heads, length, group, head_dim))
    attended = ops.reshape(ops.transpose(attended, (0, 2, 1, 3, 4)), (batch, length, heads, head_dim))
    return attended, keys, values


def _masked(scores, query_columns, first_column):
    """Float32 scores `[B, K, Q, S]` of queries at columns `[Q]`, without later columns and those before the row."""
    columns = ops.arange(ops.shape(scores)[-1], dtype="int32")
    earlier = columns[None, :] <= query_columns[:, None]
    real = columns[None, :] >= first_column[:, None]
    return ops.where(ops.logical_and(earlier[None], real[:, None])[:, None], scores, MASKED_SCORE)


def _before_writing(query, key, value, keys, values, first_column, column):
    """Attended values `[B, K, Q, H]` from the cache as it is and the new columns beside it.

    XLA merges the write of a column with the reshaping that a product wants, and then copies the whole cache twice
    a step; so the products read the cache first.
    """
    from jax import lax

    length = key.shape[2]
    group = query.shape[2] // length
    query_columns = ops.repeat(ops.arange(length, dtype="int32"), group)
    # As in `project`: the cache is large and the queries are few, so the cache stands first.
    old = lax.dot_general(keys, query, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type="float32")
    old = lax.optimization_barrier(old).transpose(0, 1, 3, 2)
    old = _masked(old, ops.broadcast_to(column - 1, query_columns.shape), first_column)
    new = _masked(einsum_float32("bkqh,bksh->bkqs", query, key), query_columns, first_column - column)
    largest = ops.maximum(ops.max(old, axis=-1, keepdims=True), ops.max(new, axis=-1, keepdims=True))
    old, new = ops.exp(old - largest), ops.exp(new - largest)
    total = ops.sum(old, axis=-1, keepdims=True) + ops.sum(new, axis=-1, keepdims=True)
    attended = ops.matmul(ops.cast(old / total, value.dtype), values)
    return attended + ops.matmul(ops.cast(new / total, value.dtype), value)


def _after(column, attended):
    """The same column, in a form that XLA cannot know before `attended`: writing waits for the reading."""
    number = ops.cast(attended[0, 0, 0, 0] > 0, "int32")
    return ops.minimum(column, column + number)


def _grouped_attention(query, key, value, mask, dropout=None):
    # The query heads of a group become rows, so that a group is one plain matrix product: on a CPU an einsum
    # over separate heads of one KV head runs at a fifth of the speed. Those of a position stand beside each other, so
    # that with one group nothing is moved; where devices have heads of their own, head by head, and nothing is sent.
    head_by_head = keras.distribution.distribution() is not None
    to_rows, back = ((0, 2, 3, 1, 4), (0, 3, 1, 2, 4)) if head_by_head else ((0, 2, 1, 3, 4), (0, 2, 1, 3, 4))
    batch, length, heads, head_dim = ops.shape(query)
    kv_heads, width = ops.shape(key)[2], ops.shape(key)[1]
    group = heads // kv_heads
    query = ops.transpose(ops.reshape(query, (batch, length, kv_heads, group, head_dim)), to_rows)
    apart = ops.shape(query)[2:4]
    query = ops.reshape(query, (batch, kv_heads, length * group, head_dim))
    scores = einsum_float32("bkqh,bskh->bkqs", query, key)
    scores = ops.reshape(scores, (batch, kv_heads, *apart, width))
    mask = mask[:, None, None] if head_by_head else mask[:, None, :, None]
    weights = ops.cast(ops.softmax(ops.where(mask, scores, MASKED_SCORE), axis=-1), value.dtype)
    if dropout is not None:
        weights = dropout(weights)
    weights = ops.reshape(weights, (batch, kv_heads, length * group, width))
    attended = ops.einsum("bkqs,bskh->bkqh", weights, value)
    attended = ops.transpose(ops.reshape(attended, (batch, kv_heads, *apart, head_dim)), back)
    return ops.reshape(attended, (batch, length, heads, head_dim))
