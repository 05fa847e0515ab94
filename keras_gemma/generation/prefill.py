"""Right-aligned prompts → the cache that decoding starts from.

The cache holds every column of the prompts. Decoding begins by running the last column once more, for its logits;
so the last block needs no queries here, and no logits are formed.

On JAX each kind of block is one program that runs once a layer: it is compiled once and not for all layers together.
"""

from keras import ops

from keras_gemma import kernels
from keras_gemma.generation.cache import heads_first
from keras_gemma.generation.cache import positions_of
from keras_gemma.generation.cache import with_capacity


def make_embed(network):
    """Program `(weights of both ends, token ids [B, P]) → x [B, P, D]`."""

    def embed(weights, token_ids):
        return network.ends(weights).embed(token_ids)

    return embed


def make_block(network, index, capacity, copies=1):
    """Program `(block weights, x [B, P, D], first_column [B]) → x, key, value [copies * B, K, capacity, H]`."""

    def run_block(weights, x, first_column):
        block = network.block(index, weights)
        query, key, value = block.queries_keys_values(x, _rotation(network, x, first_column))
        x = kernels.rows_apart(block.finish(x, kernels.prompt_attention(query, key, value, first_column)))
        return x, *_columns_of_cache(capacity, copies, key, value)

    return run_block


def make_last_block(network, index, capacity, copies=1):
    """Program as of `make_block`, without `x`."""

    def run_block(weights, x, first_column):
        key, value = network.block(index, weights).keys_values(x, _rotation(network, x, first_column))
        return tuple(_columns_of_cache(capacity, copies, key, value))

    return run_block


def make_hidden(network):
    """Program `(weights of both ends, x [B, P, D], first_column [B]) → hidden states [B, P, D]`.

    The states of padding are those of the row's first token, so that no similarity singles them out.
    """

    def hidden(weights, x, first_column):
        columns = ops.arange(ops.shape(x)[1], dtype="int32")[None, :]
        real = ops.maximum(columns, first_column[:, None])
        return ops.take_along_axis(network.ends(weights).hidden(x), real[:, :, None], axis=1)

    return hidden


def _columns_of_cache(capacity, copies, *heads):
    """Columns of the cache of keys and of values: rows that begin alike each have their own to go on with."""
    return [kernels.cache_apart(with_capacity(ops.repeat(heads_first(x), copies, axis=0), capacity)) for x in heads]


def _rotation(network, x, first_column):
    return network.rotation(positions_of(ops.arange(ops.shape(x)[1], dtype="int32"), first_column))
