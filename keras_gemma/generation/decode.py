"""The loop that appends token after token, inside one compiled program."""

from keras import ops

from keras_gemma.generation import sampling
from keras_gemma.generation.cache import update_cache

# What a row holds after its end.
FILLER = 0


def make_decode(network, sampler, vocabulary_size=None):
    """Program that decodes columns until all rows have ended or `until` is reached.

    Its arguments (B batch, S capacity of the cache):

        weights           of the network
        cache             see `cache`; donated
        tokens            int32 [B, S], filled before `column`
        column            int32 scalar, the next column
        end_column        int32 [B], one past the last column of each row; a stop token moves it forward
        stop_token_ids    int32 [any], -1 where unused
        until             int32 scalar, at most S
        sampler_values    the values of the sampler's variables

    It returns cache, tokens, column, end_column and sampler_values as they are afterwards. Only the first
    `vocabulary_size` ids are ever chosen; `None` for all.
    """

    def decode(weights, cache, tokens, column, end_column, stop_token_ids, until, sampler_values):
        def unfinished(cache, tokens, column, end_column, sampler_values):
            return ops.logical_and(column < until, ops.any(column < end_column))

        def append(cache, tokens, column, end_column, sampler_values):
            logits, _, cache = _next(network, weights, tokens, cache, column, vocabulary_size)
            chosen, sampler_values = sampling.choose(sampler, logits, sampler_values)
            chosen = ops.where(column < end_column, chosen, FILLER)
            stops = ops.any(chosen[:, None] == stop_token_ids[None, :], axis=-1)
            end_column = ops.where(stops, ops.minimum(end_column, column + 1), end_column)
            tokens = ops.slice_update(tokens, (0, column), chosen[:, None])
            return cache, tokens, column + 1, end_column, sampler_values

        return ops.while_loop(unfinished, append, (cache, tokens, column, end_column, sampler_values))

    return decode


def make_search(network, sampler, stop_token_ids, vocabulary_size=None):
    """Program that hands the loop over to a sampler with a loop of its own, such as beam search.

    Its arguments (B batch, T length of prompt and new tokens together, S ≥ T):

        weights           of the network
        cache             see `cache`
        tokens            int32 [B, T], filled before `column`
        hidden_states     [B, T, D], filled before `column`
        column            int32 scalar, the next column
        sampler_values    the values of the sampler's variables

    It returns tokens and sampler_values. `vocabulary_size` is as of `make_decode`.
    """

    def search(weights, cache, tokens, hidden_states, column, sampler_values):
        def next(prompt, cache, index):
            return _next(network, weights, prompt, cache, index, vocabulary_size)

        prompt_mask = ops.broadcast_to(ops.arange(ops.shape(tokens)[1])[None, :] < column, ops.shape(tokens))
        arguments = {
            "next": next,
            "prompt": tokens,
            "cache": cache,
            "index": column,
            "mask": prompt_mask,
            "stop_token_ids": stop_token_ids,
            "hidden_states": hidden_states,
        }
        return sampling.run(sampler, sampler_values, arguments)

    return search


def _next(network, weights, tokens, cache, column, vocabulary_size):
    """Logits `[B, vocabulary_size]` for `column`, the hidden states `[B, D]` they come from, and the new cache."""
    before = ops.slice(tokens, (0, column - 1), (ops.shape(tokens)[0], 1))
    hidden, cache = update_cache(network, weights, before, cache, column - 1)
    logits = network.ends(weights["ends"]).logits(hidden)[:, 0]
    # Cut and not masked: samplers that rank ids of probability 0 would still meet those that are masked.
    return logits[:, :vocabulary_size], hidden[:, 0], cache
