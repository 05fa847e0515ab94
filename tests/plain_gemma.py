"""Gemma in plain NumPy, for formats whose files are used as they are: what a format keeps is handed in as functions.

B batch, T length, D width, N query heads, K key-value heads, H head dim, F feed-forward, V vocabulary.
"""

import numpy as np


def logits(token_ids, embedding, blocks, final_norm):
    """Logits (B, T, V) of token ids (B, T).

    Args:
        token_ids: int array (B, T).
        embedding: array (V, D).
        blocks: list of dicts: `attention_norm` and `ffw_norm`, arrays (D); `project` from (B, T, D) to q (B, T, N, H),
            k and v (B, T, K, H); `output` from (B, T, N, H) to (B, T, D); `gate`, `up` and `down`, of the last axis.
        final_norm: array (D).
    """
    x = embedding[token_ids] * embedding.shape[1] ** 0.5
    for block in blocks:
        x = x + block["output"](_attended(*block["project"](_normed(x, block["attention_norm"]))))
        normed = _normed(x, block["ffw_norm"])
        x = x + block["down"](_gelu(block["gate"](normed)) * block["up"](normed))
    return _normed(x, final_norm) @ embedding.T


def _normed(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * (1 + scale)


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _rotated(x):
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / 10_000 ** (np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attended(q, k, v):
    k, v = (np.repeat(heads, q.shape[2] // k.shape[2], axis=2) for heads in (k, v))
    scores = np.einsum("BTNH,BSNH->BNTS", _rotated(q) * q.shape[-1] ** -0.5, _rotated(k))
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("BNTS,BSNH->BTNH", weights / weights.sum(axis=-1, keepdims=True), v)
