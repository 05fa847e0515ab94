"""Prompts → responses that the policy samples."""

from dataclasses import dataclass

import keras_hub
import numpy as np

from keras_gemma import generation
from keras_gemma.rlhf import rows


@dataclass
class Rollouts:
    """Responses to prompts, those to one prompt beside each other.

    Attributes:
        prompts: list of `N` lists of token ids.
        responses: list of `N` lists of token ids, with the token that ended them.
        ended: bool array `[N]`, whether one did.
        continuations: int, responses to each prompt.
    """

    prompts: list
    responses: list
    ended: np.ndarray
    continuations: int = 1

    def __len__(self):
        return len(self.prompts)

    @property
    def lengths(self):
        """Int array `[N]`, actions of each response."""
        return np.array([len(response) for response in self.responses])

    def microbatches(self, count):
        """The rollouts as arrays for training, `count` rows at a time. See `rows.microbatches`."""
        return rows.microbatches(self.prompts, self.responses, count, self.continuations)


def sample(policy, prompts, group_size, max_new_tokens, temperature, stop_token_ids, seed, longest_prompt=0):
    """Draws responses from all of the policy's distribution, token by token.

    Args:
        policy: a `GemmaCausalLM`.
        prompts: list of lists of token ids.
        group_size: int, responses to each prompt.
        max_new_tokens: int.
        temperature: float.
        stop_token_ids: list of ids that end a response.
        seed: int. Equal seeds give equal samples.
        longest_prompt: int, tokens of the longest prompt of all calls, where it is known: they share what is compiled.

    Returns:
        `Rollouts`.
    """
    longest_prompt = max(longest_prompt, *map(len, prompts))
    sampler = keras_hub.samplers.RandomSampler(temperature=temperature)
    with generation.Sampling(sampler, seed) as sampling:
        request = generation.Request(
            prompts,
            [max_new_tokens] * len(prompts),
            stop_token_ids,
            sampler,
            sampling.values,
            continuations=group_size,
            # All that a rollout can need, which attention at every step reads.
            most_columns=generation.prompt_bucket(longest_prompt) + max_new_tokens,
        )
        responses, sampling.values = policy.engine.generate(request)
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    ended = np.array([response[-1] in stop_token_ids for response in responses])
    return Rollouts(repeated, responses, ended, group_size)
