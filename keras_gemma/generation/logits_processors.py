"""Logits → the logits of the distribution that a token is drawn from.

    logits ─ repetition penalty ─→ temperature ─→ top-k ─→ top-p ─→ min-p ─→ softmax ─→ a draw

The order and the results are those of transformers. B batch, S columns, V vocabulary. Numbers may be tensors: what is
compiled for one temperature serves all.
"""

import keras
from keras import ops


def penalize_repetition(logits, tokens, filled, penalty):
    """Makes tokens that a row already has less likely: negative logits times the penalty, positive ones divided by it.

    Keskar et al. (2019), CTRL, https://arxiv.org/abs/1909.05858, section 4.1.

    Args:
        logits: float tensor `[B, V]`.
        tokens: int tensor `[B, S]`.
        filled: bool tensor `[B, S]`, where `tokens` holds a token of the row.
        penalty: float scalar above 0. 1 changes nothing, more discourages repetition.

    Returns:
        A float tensor `[B, V]`.
    """
    rows, size = ops.shape(logits)
    # Everything else counts for a column beyond the vocabulary.
    tokens = ops.where(ops.logical_and(filled, tokens < size), tokens, size)
    row = ops.broadcast_to(ops.arange(rows, dtype="int32")[:, None], ops.shape(tokens))
    places = ops.reshape(ops.stack([row, ops.cast(tokens, "int32")], axis=-1), (-1, 2))
    marks = ops.scatter_update(ops.zeros((rows, size + 1), "int32"), places, ops.ones_like(places[:, 0]))
    penalized = ops.where(logits < 0, logits * penalty, logits / penalty)
    return ops.where(marks[:, :size] > 0, penalized, logits)


def keep_likeliest(logits, top_k=None, top_p=None, candidates=None):
    """Removes all but the `top_k` largest logits, and of these all but the likeliest that together reach `top_p`.

    Holtzman et al. (2020), The Curious Case of Neural Text Degeneration, https://arxiv.org/abs/1904.09751.

    Args:
        logits: float tensor `[B, V]`.
        top_k: optional int scalar, from 1 to `candidates`.
        top_p: optional float scalar, above 0 and below 1.
        candidates: optional int, how many of the largest logits are sorted. All of them by default.

    Returns:
        A float tensor `[B, V]`, minus infinity where removed. The largest stays, and so do equals of the last kept.
    """
    candidates = candidates or logits.shape[-1]
    largest = ops.top_k(logits, candidates, sorted=True)[0]
    kept = ops.ones_like(largest, "bool")
    if top_k is not None:
        kept = ops.broadcast_to(ops.arange(candidates, dtype="int32")[None, :] < top_k, ops.shape(largest))
    if top_p is not None:
        probabilities = keras.activations.softmax(ops.where(kept, largest, -float("inf")))
        likelier = ops.cumsum(probabilities, axis=-1) - probabilities
        kept = ops.logical_and(kept, likelier < top_p)
    last = ops.maximum(ops.sum(ops.cast(kept, "int32"), axis=-1, keepdims=True), 1) - 1
    return ops.where(logits >= ops.take_along_axis(largest, last, axis=-1), logits, -float("inf"))


def keep_above_share(logits, min_p):
    """Removes tokens less likely than `min_p` times the likeliest.

    Nguyen et al. (2025), Turning Up the Heat: Min-p Sampling, https://arxiv.org/abs/2407.01082.

    Args:
        logits: float tensor `[B, V]`.
        min_p: float scalar from 0 to 1.

    Returns:
        A float tensor `[B, V]`, minus infinity where removed.
    """
    shares = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
    return ops.where(shares < min_p, -float("inf"), logits)
