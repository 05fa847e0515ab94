"""Causal attention by cuDNN's flash attention on NVIDIA GPUs."""

import jax
import jax.numpy as jnp
from jax import lax

from keras_gemma.kernels.blockwise_attention import blockwise_attention

# Compute capabilities.
AMPERE = (8, 0)
HOPPER = (9, 0)


def cudnn_attention(query, key, value, segment_ids):
    """Attention of every position to itself and the earlier positions of its own segment, on one GPU.

    cuDNN knows the causal mask, and any other only as a tensor of length × length. Rows of one segment with padding
    behind need no other. Whether all rows of the batch are such is seen when the program runs; if one is not,
    all are computed in blocks.

    Args:
        query: bfloat16 or float16 tensor `[B, T, N, H]`, already scaled.
        key: tensor `[B, T, K, H]` of that dtype; `K` divides `N`.
        value: tensor `[B, T, K, H]` of that dtype.
        segment_ids: int tensor `[B, T]`, 0 where padded.

    Returns:
        A tensor `[B, T, N, H]`; at padded positions it is finite but meaningless.
    """
    return lax.cond(only_causal(segment_ids), _causal_attention, blockwise_attention, query, key, value, segment_ids)


def only_causal(segment_ids):
    """Whether no real position has an earlier position of another segment."""
    return jnp.all((segment_ids[:, 1:] == segment_ids[:, :-1]) | (segment_ids[:, 1:] == 0))


def _causal_attention(query, key, value, segment_ids):
    del segment_ids
    return jax.nn.dot_product_attention(query, key, value, scale=1.0, is_causal=True, implementation="cudnn")


def cudnn_serves(query, device=None):
    """Whether cuDNN has a flash attention for the dtype and head dim of `query`.

    Args:
        query: tensor `[B, T, N, H]`.
        device: a `jax.Device`. By default the GPU of this process.
    """
    device = device or jax.local_devices(backend="gpu")[0]
    if "cuda" not in device.client.platform_version:
        return False
    capability = tuple(int(part) for part in device.compute_capability.split("."))
    head_dim = query.shape[-1]
    return (
        str(query.dtype) in ("bfloat16", "float16")
        and capability >= AMPERE
        and head_dim % 8 == 0
        and head_dim <= (256 if capability >= HOPPER else 128)
    )
