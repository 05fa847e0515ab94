"""Prompts → responses that the policy samples → rows of token ids that are scored and learned from.

N responses, R rows of a microbatch, T columns.
"""

from dataclasses import dataclass

import keras_hub
import numpy as np

from keras_gemma import generation
from keras_gemma.generation.buckets import bucket

SMALLEST_ROW = 32


@dataclass
class Rollouts:
    """Responses to prompts, those to one prompt beside each other.

    Attributes:
        prompts: list of `N` lists of token ids.
        responses: list of `N` lists of token ids, with the token that ended them.
        ended: bool array `[N]`, whether one did.
    """

    prompts: list
    responses: list
    ended: np.ndarray

    def __len__(self):
        return len(self.prompts)

    @property
    def lengths(self):
        """Int array `[N]`, actions of each response."""
        return np.array([len(response) for response in self.responses])

    def microbatches(self, rows):
        """The rollouts as arrays for training, `rows` at a time.

        Args:
            rows: int, `R`.

        Returns:
            A dict of arrays `[M, R, T]`: int32 `token_ids` and `padding_mask`, int32 `targets`, the next tokens, and
            float32 `mask`, 1 where the target is an action; and `row_weights` `[M, R]`, which sum up to 1. Rows that
            fill the last microbatch up have no weight.
        """
        length = bucket(max(len(p) + len(r) for p, r in zip(self.prompts, self.responses)), SMALLEST_ROW)
        count = -(-len(self) // rows) * rows
        ids, mask, weights = np.zeros((count, length + 1), "int32"), np.zeros((count, length + 1)), np.zeros(count)
        padding = np.zeros((count, length + 1), "int32")
        # Rows without a token would attend to nothing.
        padding[:, 0] = 1
        for i, (prompt, response) in enumerate(zip(self.prompts, self.responses)):
            end = len(prompt) + len(response)
            ids[i, :end] = prompt + response
            padding[i, :end] = 1
            mask[i, len(prompt) : end] = 1
        weights[: len(self)] = 1 / len(self)
        arrays = {
            "token_ids": ids[:, :-1],
            "padding_mask": padding[:, :-1],
            "targets": ids[:, 1:],
            "mask": mask[:, 1:].astype("float32"),
            "row_weights": weights.astype("float32"),
        }
        return {name: array.reshape(-1, rows, *array.shape[1:]) for name, array in arrays.items()}


def sample(policy, prompts, group_size, max_new_tokens, temperature, stop_token_ids, seed):
    """Draws responses from all of the policy's distribution, token by token.

    Args:
        policy: a `GemmaCausalLM`.
        prompts: list of lists of token ids.
        group_size: int, responses to each prompt.
        max_new_tokens: int.
        temperature: float.
        stop_token_ids: list of ids that end a response.
        seed: int. Equal seeds give equal samples.

    Returns:
        `Rollouts`.
    """
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    sampler = keras_hub.samplers.RandomSampler(temperature=temperature)
    with generation.Sampling(sampler, seed) as sampling:
        limits = [max_new_tokens] * len(repeated)
        request = generation.Request(repeated, limits, stop_token_ids, sampler, sampling.values)
        responses, sampling.values = policy.engine.generate(request)
    ended = np.array([response[-1] in stop_token_ids for response in responses])
    return Rollouts(repeated, responses, ended)
