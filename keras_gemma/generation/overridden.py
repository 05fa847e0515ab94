"""Generation through a model's own `call_with_cache`, token after token from Python."""

import numpy as np
from keras import ops

from keras_gemma.generation import decode
from keras_gemma.generation.cache import empty_cache
from keras_gemma.generation.engine import Engine


class OverriddenEngine(Engine):
    """An `Engine` that asks the model for its logits. Slower than one that compiles the whole loop.

    Args:
        model: a `GemmaCausalLM` with a `call_with_cache` of its own.
    """

    def __init__(self, model):
        super().__init__(model.backbone)
        self.model = model

    def _prefill(self, network, weights, token_ids, first_column, capacity, copies=1, with_hidden=False):
        token_ids = np.repeat(token_ids, copies, axis=0)
        first_column = ops.convert_to_tensor(np.repeat(first_column, copies))
        cache = {**empty_cache(self.backbone, len(token_ids), capacity), "first_column": first_column}
        _, hidden, cache = self.model.call_with_cache(ops.convert_to_tensor(token_ids), cache, 0)
        if not with_hidden:
            return cache, None
        # As `prefill.make_hidden`: the states of padding are those of the row's first token.
        columns = ops.arange(ops.shape(hidden)[1], dtype="int32")[None, :]
        real = ops.maximum(columns, cache["first_column"][:, None])
        return cache, ops.take_along_axis(hidden, real[:, :, None], axis=1)

    def _prefill_in_chunks(self, network, weights, token_ids, first_column, fixed, copies):
        return self._prefill(network, weights, token_ids, first_column, fixed.capacity, copies)[0]

    def _decode(self, decoding, until):
        column = int(decoding.column)
        while column < until and not decoding.finished:
            logits, _, decoding.cache = self._next((), decoding.tokens, decoding.cache, column, self.vocabulary_size)
            state = decode.append_token(
                decoding.sampler,
                decoding.settings,
                decoding.stop_token_ids,
                logits,
                decoding.cache["first_column"],
                decoding.tokens,
                decoding.column,
                decoding.end_column,
                decoding.sampler_values,
                decoding.log_probs,
            )
            decoding.tokens, decoding.column, decoding.end_column = state[:3]
            decoding.sampler_values, decoding.log_probs = state[3:]
            column += 1

    def _search_program(self, network, sampler_key, sampler, stop_token_ids):
        return decode.make_search(network, sampler, stop_token_ids, self.vocabulary_size, self._next)

    def _next(self, weights, tokens, cache, column, vocabulary_size):
        before = ops.slice(tokens, (0, column - 1), (ops.shape(tokens)[0], 1))
        logits, hidden, cache = self.model.call_with_cache(before, cache, column - 1)
        return ops.cast(logits[:, -1, :vocabulary_size], "float32"), hidden[:, -1], cache
