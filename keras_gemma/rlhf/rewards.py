"""Responses → rewards: one finite number each, the same on all processes, or an error that names the response."""

import math

import jax
import numpy as np


def of_rollouts(reward, policy, prompts, texts, rollouts, batch_size):
    """Float32 rewards `[N]` of `Rollouts`.

    Args:
        reward: a `GemmaRewardModel`, which reads the very tokens that were sampled, or a callable of two lists of
            `N`, prompts and texts.
        policy: the `GemmaCausalLM` that sampled.
        prompts: list of `N` prompts as the user gave them.
        texts: list of the `N` responses.
        rollouts: `Rollouts`.
        batch_size: int, rows that a reward model scores at once.

    Raises:
        ValueError: for rewards that are not one finite number for each response, and where the callable raises.
    """
    if hasattr(reward, "score_tokens"):
        rewards = of_tokens(reward, policy, rollouts, batch_size)
    else:
        rewards = called(reward, prompts, texts)
    return checked(rewards, texts)


def called(function, *columns):
    """What a user's function of columns gives, as float32; its errors name it.

    Raises:
        ValueError: from what the function raised, or where it returned something else than numbers.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        return np.asarray(function(*columns), "float32")
    except Exception as error:
        raise ValueError(
            f"A reward or a judge returns numbers. Received from `{name}` for {len(columns[0])} responses: "
            f"{type(error).__name__}: {error}"
        ) from error


def checked(rewards, texts):
    """Rewards as the first process knows them.

    Raises:
        ValueError: where they are not one finite number for each text.
    """
    if rewards.shape != (len(texts),):
        raise ValueError(f"A reward is one number for each of {len(texts)} responses. Received: shape {rewards.shape}")
    if not np.isfinite(rewards).all():
        first = int(np.argmin(np.isfinite(rewards)))
        raise ValueError(f"Rewards are finite. Received: {rewards[first]} for {texts[first]!r}")
    if jax.process_count() == 1:
        return rewards
    from jax.experimental import multihost_utils

    # A user's function may use chance or a network; processes that learn from different rewards would drift apart.
    return multihost_utils.broadcast_one_to_all(rewards)


def refuse_other_vocabulary(policy, reward):
    """Raises a `ValueError` where policy and reward model read tokens differently."""
    theirs = getattr(reward.preprocessor, "tokenizer", None)
    if theirs is not None and theirs.proto != policy.preprocessor.tokenizer.proto:
        raise ValueError(
            "A reward model reads the very tokens that the policy wrote, so both have one vocabulary. Received: two"
        )


def of_tokens(reward_model, policy, rollouts, batch_size):
    """What a reward model says of the very tokens that were sampled, float32 `[N]`."""
    end = policy.preprocessor.tokenizer.end_token_id
    rows = [
        prompt + response + ([] if ended else [end])
        for prompt, response, ended in zip(rollouts.prompts, rollouts.responses, rollouts.ended)
    ]
    return reward_model.score_tokens(rows, batch_size)


def longest_row(reward_model):
    """Tokens of prompt and response that a reward model reads at most."""
    preprocessor = reward_model.preprocessor
    # A response without an end is given one to be scored.
    return math.inf if preprocessor is None else preprocessor.sequence_length - 1
