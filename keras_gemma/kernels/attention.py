"""Attention with grouped heads: causal over a whole sequence, and of new tokens over a cache."""

from keras import ops

from keras_gemma.kernels.products import einsum_float32

MASKED_SCORE = -1e30


def causal_attention(query, key, value, segment_ids, dropout=None):
    """Attention of every position to itself and the earlier positions of its own segment.

    Padding is a segment of its own (0), so a padded position attends to padding only and nothing attends to it.

    Args:
        query: float tensor `[B, T, N, H]`, already scaled.
        key: float tensor `[B, T, K, H]`; `K` divides `N`.
        value: float tensor `[B, T, K, H]`.
        segment_ids: int tensor `[B, T]`, 0 where padded.
        dropout: optional callable applied to the attention weights.

    Returns:
        A tensor `[B, T, N, H]` in the dtype of `value`.
    """
    length = ops.shape(query)[1]
    positions = ops.arange(length, dtype="int32")
    earlier = positions[:, None] >= positions[None, :]
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = ops.logical_and(earlier[None], same_segment)
    return _grouped_attention(query, key, value, mask, dropout)


def cached_attention(query, key, value, first_column, column):
    """Attention of one new token a row to the filled columns of a cache.

    Args:
        query: float tensor `[B, 1, N, H]`, already scaled.
        key: float tensor `[B, S, K, H]`.
        value: float tensor `[B, S, K, H]`.
        first_column: int tensor `[B]`, the first column that holds a token of the row.
        column: int scalar, the column of the new token; later columns are not read.

    Returns:
        A tensor `[B, 1, N, H]` in the dtype of `value`.
    """
    columns = ops.arange(ops.shape(key)[1], dtype="int32")[None, :]
    filled = ops.logical_and(columns >= first_column[:, None], columns <= column)
    return _grouped_attention(query, key, value, filled[:, None, :])


def _grouped_attention(query, key, value, mask, dropout=None):
    batch, length, heads, head_dim = ops.shape(query)
    kv_heads = ops.shape(key)[2]
    grouped = ops.reshape(query, (batch, length, kv_heads, heads // kv_heads, head_dim))
    scores = einsum_float32("btkgh,bskh->bkgts", grouped, key)
    scores = ops.where(mask[:, None, None], scores, MASKED_SCORE)
    weights = ops.cast(ops.softmax(scores, axis=-1), value.dtype)
    if dropout is not None:
        weights = dropout(weights)
    attended = ops.einsum("bkgts,bskh->btkgh", weights, value)
    return ops.reshape(attended, (batch, length, heads, head_dim))
