"""Rows of token ids that are there → hidden states → what the model thinks of each token. Nothing is cached.

Rows are right-aligned as prompts are, and blocks run one after another: one program serves all blocks of a kind.
"""

from keras import ops

from keras_gemma import kernels
from keras_gemma.generation.cache import positions_of

# Columns whose logits are in memory at once; every prompt's bucket is a multiple.
COLUMNS_AT_ONCE = 16


def make_whole_block(network, index):
    """Program `(block weights, x [B, P, D], first_column [B]) → x`."""

    def run_block(weights, x, first_column):
        block = network.block(index, weights)
        columns = ops.arange(ops.shape(x)[1], dtype="int32")
        query, key, value = block.queries_keys_values(x, network.rotation(positions_of(columns, first_column)))
        return kernels.rows_apart(block.finish(x, kernels.prompt_attention(query, key, value, first_column)))

    return run_block


def make_log_probs(network, vocabulary_size):
    """Program `(weights of both ends, x [B, P, D], token_ids [B, P]) → log-probabilities [B, P]`, float32.

    A column has what the model gives its token after those before it; the first column of a row means nothing.
    """

    def log_probs(weights, x, token_ids):
        ends = network.ends(weights)
        batch, length = token_ids.shape
        next_ids = ops.concatenate([token_ids[:, 1:], token_ids[:, :1]], axis=1)

        def chunks(x):
            return ops.swapaxes(ops.reshape(x, (batch, length // COLUMNS_AT_ONCE, COLUMNS_AT_ONCE, *x.shape[2:])), 0, 1)

        def of_chunk(chunk):
            hidden, ids = chunk
            logits = ends.logits(hidden)[:, :, :vocabulary_size]
            of_id = ops.take_along_axis(logits, ids[:, :, None], axis=-1)[:, :, 0]
            return of_id - ops.logsumexp(logits, axis=-1)

        of_next = ops.map(of_chunk, (chunks(ends.hidden(x)), chunks(next_ids)))
        of_next = ops.reshape(ops.swapaxes(of_next, 0, 1), (batch, length))
        return ops.concatenate([of_next[:, -1:], of_next[:, :-1]], axis=1)

    return log_probs


def make_pooled(network, pooling):
    """Program `(weights of both ends, x [B, P, D], first_column [B]) → one state of each row [B, D]`, float32."""

    def pooled(weights, x, first_column):
        hidden = ops.cast(network.ends(weights).hidden(x), "float32")
        if pooling == "last":
            return hidden[:, -1]
        real = (ops.arange(ops.shape(x)[1], dtype="int32")[None, :] >= first_column[:, None])[:, :, None]
        if pooling == "max":
            return ops.max(ops.where(real, hidden, -float("inf")), axis=1)
        return ops.sum(ops.where(real, hidden, 0.0), axis=1) / ops.sum(ops.cast(real, "float32"), axis=1)

    return pooled
