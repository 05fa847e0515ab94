"""The loop that appends token after token, inside one compiled program."""

import functools

from keras import ops

from keras_gemma.generation import logits_processors
from keras_gemma.generation import sampling
from keras_gemma.generation.cache import update_cache

# What a row holds after its end.
FILLER = 0
PENALTY = "repetition_penalty"


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
        settings          dict of scalars: of `sampling.settings_of`, and `repetition_penalty` where there is one
        log_probs         float32 [B, S], what the model thought of each new token, where they are kept; else ()

    It returns cache, tokens, column, end_column, sampler_values and log_probs as they are afterwards. Only the first
    `vocabulary_size` ids are ever chosen; `None` for all.
    """

    def decode(weights, cache, tokens, column, end_column, stop_token_ids, until, sampler_values, settings, log_probs):
        def unfinished(cache, tokens, column, end_column, sampler_values, log_probs):
            return ops.logical_and(column < until, ops.any(column < end_column))

        def append(cache, tokens, column, end_column, sampler_values, log_probs):
            logits, _, cache = _next(network, weights, tokens, cache, column, vocabulary_size)
            return cache, *append_token(
                sampler,
                settings,
                stop_token_ids,
                logits,
                cache["first_column"],
                tokens,
                column,
                end_column,
                sampler_values,
                log_probs,
            )

        state = (cache, tokens, column, end_column, sampler_values, log_probs)
        return ops.while_loop(unfinished, append, state)

    return decode


def append_token(
    sampler, settings, stop_token_ids, logits, first_column, tokens, column, end_column, sampler_values, log_probs
):
    """Chooses the tokens of one column from its logits `[B, V]`. Other arguments and results as of `make_decode`."""
    chosen, sampler_values = sampling.choose(
        sampler, _penalized(logits, tokens, first_column, column, settings), sampler_values, _of_sampler(settings)
    )
    chosen = ops.where(column < end_column, chosen, FILLER)
    if not isinstance(log_probs, tuple):
        of_chosen = ops.take_along_axis(logits, chosen[:, None], axis=-1)
        of_chosen = of_chosen - ops.logsumexp(logits, axis=-1, keepdims=True)
        log_probs = ops.slice_update(log_probs, (0, column), of_chosen)
    stops = ops.any(chosen[:, None] == stop_token_ids[None, :], axis=-1)
    end_column = ops.where(stops, ops.minimum(end_column, column + 1), end_column)
    tokens = ops.slice_update(tokens, (0, column), chosen[:, None])
    return tokens, column + 1, end_column, sampler_values, log_probs


def _penalized(logits, tokens, first_column, column, settings):
    if PENALTY not in settings:
        return logits
    columns = ops.arange(ops.shape(tokens)[1], dtype="int32")[None, :]
    filled = ops.logical_and(columns >= first_column[:, None], columns < column)
    return logits_processors.penalize_repetition(logits, tokens, filled, settings[PENALTY])


def _of_sampler(settings):
    return {name: value for name, value in settings.items() if name != PENALTY}


def make_search(network, sampler, stop_token_ids, vocabulary_size=None, next_logits=None):
    """Program that hands the loop over to a sampler with a loop of its own, such as beam search.

    Its arguments (B batch, T length of prompt and new tokens together, S ≥ T):

        weights           of the network
        cache             see `cache`
        tokens            int32 [B, T], filled before `column`
        hidden_states     [B, T, D], filled before `column`
        column            int32 scalar, the next column
        sampler_values    the values of the sampler's variables

    It returns tokens and sampler_values. `vocabulary_size` is as of `make_decode`; `next_logits` computes what follows
    in place of the network.
    """

    next_logits = next_logits or functools.partial(_next, network)

    def search(weights, cache, tokens, hidden_states, column, sampler_values):
        def next(prompt, cache, index):
            return next_logits(weights, prompt, cache, index, vocabulary_size)

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
