"""Causal attention by JAX's Splash kernel, a flash attention in Pallas for TPUs that skips masked blocks."""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
from jax.experimental.pallas.ops.tpu.splash_attention import CausalMask
from jax.experimental.pallas.ops.tpu.splash_attention import MultiHeadMask
from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention import make_splash_mqa

from keras_gemma.kernels.shares import WHOLE

# The kernel's blocks are multiples of the lanes of a TPU's vector unit.
LANES = 128
LONGEST_BLOCK = 512


def splash_attention(query, key, value, segment_ids, share=WHOLE, longest_block=LONGEST_BLOCK, interpret=False):
    """Attention of every position, or of a share of them, to itself and earlier ones of its segment, on one TPU.

    The multi-query kernel runs once for every key-value head and its group of query heads, so keys and values are
    never repeated.

    Args:
        query: float tensor `[B, T, N, H]`, already scaled.
        key: float tensor `[B, S, K, H]`; `K` divides `N`.
        value: float tensor `[B, S, K, H]`.
        segment_ids: int tensor `[B, S]`.
        share: `Share`. Which columns the queries are; all by default.
        longest_block: int. Multiple of 128, the most queries and keys of one tile of scores.
        interpret: bool. Whether to run the kernel's program without a TPU, slowly.

    Returns:
        A tensor `[B, T, N, H]` in the dtype of `value`.
    """
    batch, own_length, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    width = own_length // share.parts
    of_queries, of_keys = block_and_padded_length(width, longest_block), block_and_padded_length(length, longest_block)
    query = query.reshape(batch, share.parts, width, heads, head_dim)
    query, query_ids = (_with_columns(x, 2, of_queries.padded) for x in (query, share.own(segment_ids, width)))
    key, value, segment_ids = (_with_columns(x, 1, of_keys.padded) for x in (key, value, segment_ids))
    query = query.reshape(batch, -1, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    kernel = _of_device(_kernel(group, share.starts, width, length, longest_block, interpret), share)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    segments = SegmentIds(query_ids.reshape(batch, -1), segment_ids)
    attended = jax.vmap(over_heads)(query, key, value, segments)
    attended = attended.reshape(batch, heads, share.parts, of_queries.padded, head_dim)[..., :width, :]
    return attended.reshape(batch, heads, own_length, head_dim).transpose(0, 2, 1, 3).astype(value.dtype)


def _with_columns(x, axis, count):
    """`x` with columns of zeros behind its own."""
    return jnp.pad(x, [(0, count - size if place == axis else 0) for place, size in enumerate(x.shape)])


class Blocks(NamedTuple):
    """How columns are divided.

    Attributes:
        block: int. Columns of a block.
        padded: int. Columns of all blocks together.
    """

    block: int
    padded: int


def block_and_padded_length(length, longest_block):
    """The least padding with the fewest blocks."""
    count = -(-length // longest_block)
    block = -(-length // (count * LANES)) * LANES
    return Blocks(block, count * block)


@lru_cache
def _kernel(group, starts, width, length, longest_block, interpret):
    """The kernel with the tables of all devices, one device's after the other's."""
    of_queries, of_keys = block_and_padded_length(width, longest_block), block_and_padded_length(length, longest_block)
    sizes = BlockSizes(
        block_q=of_queries.block,
        block_kv=of_keys.block,
        block_q_dkv=of_queries.block,
        block_kv_dkv=of_keys.block,
        block_q_dq=of_queries.block,
        block_kv_dq=of_keys.block,
    )
    # Queries that only fill a part up see what the last of the part sees: no block of keys is computed for them.
    within_part = np.minimum(np.arange(of_queries.padded), width - 1)
    columns = np.array(starts)[..., None] + within_part
    mask = CausalMask((columns.size, of_keys.padded))
    mask.q_sequence = columns.reshape(-1).astype("int32")
    with jax.ensure_compile_time_eval():
        kernel = make_splash_mqa(
            MultiHeadMask([mask] * group),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=len(starts),
            interpret=interpret,
        )
    # As plain arrays the kernel's tables belong to no device, and serve whichever program is compiled next.
    return jax.tree.map(np.asarray, kernel)


def _of_device(kernel, share):
    """The kernel with the tables of one device: those of blocks are `[1, blocks of queries, blocks of keys]`."""
    devices = len(share.starts)
    if devices == 1:
        return kernel

    def own(table):
        axis = 1 if table.ndim == 3 else 0
        size = table.shape[axis] // devices
        return lax.dynamic_slice_in_dim(jnp.asarray(table), share.device * size, size, axis)

    return jax.tree.map(own, kernel)
