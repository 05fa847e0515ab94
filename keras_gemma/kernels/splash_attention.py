"""Causal attention by JAX's Splash kernel, a flash attention in Pallas for TPUs that skips masked blocks."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
from jax.experimental.pallas.ops.tpu.splash_attention import CausalMask
from jax.experimental.pallas.ops.tpu.splash_attention import MultiHeadMask
from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention import make_splash_mqa_single_device

# The kernel's blocks are multiples of the lanes of a TPU's vector unit.
LANES = 128
LONGEST_BLOCK = 512


def splash_attention(query, key, value, segment_ids, longest_block=LONGEST_BLOCK, interpret=False):
    """Attention of every position to itself and the earlier positions of its own segment, on one TPU.

    The multi-query kernel runs once for every key-value head and its group of query heads, so keys and values are
    never repeated.

    Args:
        query: float tensor `[B, T, N, H]`, already scaled.
        key: float tensor `[B, T, K, H]`; `K` divides `N`.
        value: float tensor `[B, T, K, H]`.
        segment_ids: int tensor `[B, T]`.
        longest_block: int. Multiple of 128, the most queries and keys of one tile of scores.
        interpret: bool. Whether to run the kernel's program without a TPU, slowly.

    Returns:
        A tensor `[B, T, N, H]` in the dtype of `value`.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    block, padded = block_and_padded_length(length, longest_block)
    missing = padded - length
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (query, key, value)
    )
    query = query.reshape(batch, kv_heads, group, padded, head_dim)
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, missing)))
    kernel = _kernel(group, padded, block, interpret)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    attended = jax.vmap(over_heads)(query, key, value, SegmentIds(segment_ids, segment_ids))
    attended = attended.reshape(batch, heads, padded, head_dim).transpose(0, 2, 1, 3)
    return attended[:, :length].astype(value.dtype)


def block_and_padded_length(length, longest_block):
    """The least padding with the fewest blocks."""
    count = -(-length // longest_block)
    block = -(-length // (count * LANES)) * LANES
    return block, count * block


@lru_cache
def _kernel(group, length, block, interpret):
    sizes = BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = MultiHeadMask([CausalMask((length, length)) for _ in range(group)])
    with jax.ensure_compile_time_eval():
        kernel = make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=interpret)
    # As plain arrays the kernel's tables belong to no device, and serve whichever program is compiled next.
    return jax.tree.map(np.asarray, kernel)
