"""Responses → rewards: a finite number or none each, the same on all processes, or an error that names the response."""

import inspect
import math

import jax
import numpy as np

from keras_gemma.rlhf.awaiting import awaited


def of_rollouts(reward, policy, prompts, texts, rollouts, batch_size, columns=None):
    """Float32 rewards `[N]` of `Rollouts`, NaN where there is none.

    Args:
        reward: a `GemmaRewardModel`, which reads the very tokens that were sampled, or a callable as of
            `ReinforceTrainer`.
        policy: the `GemmaCausalLM` that sampled.
        prompts: list of `N` prompts as the user gave them.
        texts: list of the `N` responses.
        rollouts: `Rollouts`.
        batch_size: int, rows that a reward model scores at once.
        columns: optional dict of lists of `N`, what else the data say of each prompt.

    Raises:
        ValueError: for rewards that are neither one finite number nor `None` for each response, and where the callable
            raises.
    """
    if hasattr(reward, "score_tokens"):
        return checked(of_tokens(reward, policy, rollouts, batch_size), texts=texts)
    arguments, named = arguments_of(reward, prompts, texts, columns or {})
    return checked(*_numbers_and_given(reward, len(texts), arguments, named), texts=texts)


# === Calling ===


def arguments_of(function, prompts, texts, columns):
    """What a reward function is called with.

    A function is handed the prompts and the texts, and by name the columns that it has parameters for. One that names
    `completions` and takes any keyword is written for TRL: it is handed everything by name, the answers to dialogues
    as messages.

    Returns:
        A list of positional arguments and a dict of named ones.
    """
    parameters = _parameters(function)
    names = {name for name, parameter in parameters.items() if parameter.kind not in _ANY}
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if takes_all and "completions" in names:
        completions = [_completion(prompt, text) for prompt, text in zip(prompts, texts)]
        return [], {**columns, "prompts": prompts, "completions": completions}
    first = _first_two(parameters)
    return [prompts, texts], {
        name: values for name, values in columns.items() if name not in first and (takes_all or name in names)
    }


def refuse_missing_columns(function, columns):
    """Raises a `ValueError` where a reward function needs a column that the data do not have."""
    parameters = _parameters(function)
    named = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    named -= {name for name, parameter in parameters.items() if parameter.kind in _ANY}
    missing = sorted(named - set(_first_two(parameters)) - {"prompts", "completions"} - set(columns))
    if missing:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"Beside prompts and texts, a reward function is handed columns of the data by name. `{name}` "
            f"needs {', '.join(map(repr, missing))}. Received: {', '.join(map(repr, columns)) or 'no columns'}"
        )


_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(function):
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        # What is built in may say nothing of its parameters.
        return {}


def _first_two(parameters):
    """The parameters that prompts and texts fill."""
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, parameter in parameters.items() if parameter.kind in by_place][:2]


def _completion(prompt, text):
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def called(function, *columns):
    """What a user's function of columns gives, as float32, NaN for `None`; its errors name it.

    Raises:
        ValueError: from what the function raised, or where it returned something else than numbers.
    """
    numbers, _ = _numbers_and_given(function, len(columns[0]), columns, {})
    return numbers


# === Numbers ===


def _numbers_and_given(function, count, arguments, named):
    """Float32 numbers that a function returns, and which of them were given: `None` is none."""
    try:
        values = _on_host(awaited(function(*arguments, **named)))
        if not isinstance(values, (list, tuple)):
            return np.asarray(values, "float32"), np.ones(np.shape(values), bool)
        given = np.array([value is not None for value in values], bool)
        return np.array([np.nan if value is None else float(_on_host(value)) for value in values], "float32"), given
    except Exception as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"A reward or a judge returns numbers. Received from `{name}` for {count} responses: "
            f"{type(error).__name__}: {error}"
        ) from error


def _on_host(values):
    """An array or tensor as a NumPy array, or as a list where it holds objects; anything else as it is."""
    if hasattr(values, "detach"):
        # NumPy has no bfloat16 of torch's.
        return values.detach().float().cpu().numpy()
    if hasattr(values, "__array__"):
        array = np.asarray(values)
        return array.tolist() if array.dtype == object else array
    return values


def checked(rewards, given=None, *, texts):
    """Rewards as the first process knows them, NaN where none was given.

    Args:
        rewards: float32 array `[N]`.
        given: optional bool array `[N]`, where there is a reward. Everywhere by default.
        texts: list of `N` strings.

    Raises:
        ValueError: where they are not one finite number for each text.
    """
    if rewards.shape != (len(texts),):
        raise ValueError(f"A reward is one number for each of {len(texts)} responses. Received: shape {rewards.shape}")
    fine = np.isfinite(rewards) if given is None else np.isfinite(rewards) | ~given
    if not fine.all():
        first = int(np.argmin(fine))
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
