"""What a reward function may be, what it is handed, and what it may return."""

import asyncio

import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch

from keras_gemma.rlhf import ReinforceTrainer
from keras_gemma.rlhf import leave_one_out
from keras_gemma.rlhf import rewards
from keras_gemma.rlhf.awaiting import awaited

PROMPTS, TEXTS = ["2+2=", [{"role": "user", "content": "1+1="}]], ["4", "three"]
COLUMNS = {"answer": ["4", "2"], "id": [7, 8]}


def rewards_of(function, columns=COLUMNS):
    return rewards.of_rollouts(function, None, PROMPTS, TEXTS, None, 1, columns).tolist()


# === What it is handed ===


class Judge:
    def matches(self, prompts, texts, answer=None):
        return [float(text == right) for text, right in zip(texts, answer)]

    def __call__(self, prompts, texts, *, answer):
        return self.matches(prompts, texts, answer)


@pytest.mark.parametrize(
    "function",
    [
        lambda p, t, answer: [float(text == right) for text, right in zip(t, answer)],
        lambda p, t, **columns: [float(text == right) for text, right in zip(t, columns["answer"])],
        Judge(),
        Judge().matches,
    ],
)
def test_columns_reach_the_parameters_of_their_names(function):
    rewards.refuse_missing_columns(function, COLUMNS)
    assert rewards_of(function) == [1.0, 0.0]


def test_functions_of_prompts_and_texts_alone_are_handed_nothing_else():
    assert rewards_of(lambda prompts, texts: [len(text) for text in texts]) == [1.0, 5.0]
    assert rewards_of(lambda id, answer: [len(text) for text in answer]) == [1.0, 5.0]


def test_functions_written_for_trl_are_called_as_there():
    """TRL hands over everything by name, and answers to dialogues as messages."""

    def reward(completions, answer, **kwargs):
        assert completions == ["4", [{"role": "assistant", "content": "three"}]]
        assert (kwargs["prompts"], kwargs["id"]) == (PROMPTS, [7, 8])
        return [float(len(right)) for right in answer]

    rewards.refuse_missing_columns(reward, COLUMNS)
    assert rewards_of(reward) == [1.0, 1.0]


def test_columns_that_are_missing_are_named_before_anything_is_trained(model):
    trainer = ReinforceTrainer(model, lambda p, t, answer: [0.0] * len(t), group_size=2, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"needs 'answer'. Received: 'id'"):
        trainer.fit([{"prompt": "the", "id": 1}], batch_size=1, verbose=0)
    assert trainer.step == 0


# === What it returns ===


async def judged(prompts, texts):
    await asyncio.sleep(0)
    return [1.0, None]


async def judged_alone(text):
    await asyncio.sleep(0)
    return len(text)


@pytest.mark.parametrize(
    "function, expected",
    [
        (judged, [1.0, np.nan]),
        (lambda prompts, texts: [judged_alone(text) for text in texts], [1.0, 5.0]),
        (lambda prompts, texts: (None, 2), [np.nan, 2.0]),
        (lambda prompts, texts: np.array([None, 2.0], object), [np.nan, 2.0]),
        (lambda prompts, texts: torch.tensor([1.0, 2.5], dtype=torch.bfloat16, requires_grad=True), [1.0, 2.5]),
        (lambda prompts, texts: [torch.tensor(1.0, dtype=torch.bfloat16), np.float32(2.5)], [1.0, 2.5]),
        (lambda prompts, texts: jnp.array([1.0, 2.5], jnp.bfloat16), [1.0, 2.5]),
        (lambda prompts, texts: np.array([True, False]), [1.0, 0.0]),
    ],
)
def test_lists_and_arrays_of_any_library_are_read(function, expected):
    np.testing.assert_array_equal(rewards_of(function), expected)


@pytest.mark.parametrize(
    "function, part",
    [
        (lambda prompts, texts: [None, np.nan], "finite. Received: nan for 'three'"),
        (lambda prompts, texts: torch.tensor([1.0, np.inf]), "finite. Received: inf"),
        (lambda prompts, texts: [1.0, "good"], "returns numbers.*for 2 responses: ValueError"),
        (lambda prompts, texts: [None], r"one number for each of 2 responses. Received: shape \(1,\)"),
    ],
)
def test_what_is_neither_a_number_nor_none_is_refused(function, part):
    with pytest.raises(ValueError, match=part):
        rewards_of(function)


def test_errors_of_asynchronous_functions_name_them():
    async def broken(prompts, texts):
        raise KeyError("no key")

    with pytest.raises(ValueError, match="`broken` for 2 responses: KeyError: 'no key'"):
        rewards_of(broken)


def test_awaitables_run_side_by_side_on_one_loop_even_beside_another():
    async def loop_of_call():
        return asyncio.get_running_loop()

    async def meeting():
        both = asyncio.Event()

        async def first():
            await asyncio.wait_for(both.wait(), 5)
            return 1

        async def second():
            both.set()
            return 2

        return await asyncio.gather(first(), second())

    async def notebook():
        return awaited(loop_of_call())

    assert awaited(meeting()) == [1, 2]
    assert awaited(loop_of_call()) is awaited(loop_of_call()) is asyncio.run(notebook())


# === What is learned from it ===


def test_responses_without_a_reward_have_no_part_in_the_baseline():
    given = np.array([1, 1, 0, 1, 0, 0, 0, 0, 0])
    received = leave_one_out(np.array([1.0, 2.0, np.nan, 5.0, 9.0, 9.0, 0.0, 0.0, 0.0]), 3, given)
    np.testing.assert_allclose(received, [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("settings", [{}, {"microbatch_size": 3}])
def test_responses_without_a_reward_have_no_part_in_the_update(model, settings):
    """Equal rewards teach nothing without a KL, so that half of the responses without one double the step."""
    initial, moved = model.get_weights(), []
    for first in (5.0, None):
        model.set_weights(initial)
        model.compile(keras.optimizers.SGD(1.0))

        def reward(prompts, texts, first=first):
            return [first if prompt == "the" else float(i % 2) for i, prompt in enumerate(prompts)]

        trainer = ReinforceTrainer(model, reward, group_size=2, max_new_tokens=4, kl_coefficient=0.0, **settings)
        history = trainer.fit(["the", "You"], batch_size=2, verbose=0).history
        moved.append([after - before for after, before in zip(model.get_weights(), initial)])
    for half, whole in zip(*moved):
        np.testing.assert_allclose(whole, 2 * half, atol=1e-6)
    assert max(np.abs(change).max() for change in moved[0]) > 1e-3
    assert (history["rewarded"], history["reward"], history["equal_groups"]) == ([0.5], [0.5], [0.0])
    assert sum(one["reward"] is None for one in trainer.samples) == 2


def test_a_step_without_any_reward_is_said_and_changes_nothing(model):
    initial, answers = model.get_weights(), [[None] * 4, [None, 3.0, None, None], [1.0, 2.0, 3.0, 4.0]]
    trainer = ReinforceTrainer(model, lambda p, t: answers[trainer.step], group_size=2, max_new_tokens=4)
    with pytest.warns(UserWarning, match=r"Nothing is learned from step \d: the reward is None") as caught:
        history = trainer.fit(["the", "You"], batch_size=2, steps=2, verbose=0).history
    assert len(caught) == 2 and history["reward"] == [3.0] and history["rewarded"] == [0.125]
    for one, other in zip(model.get_weights(), initial):
        np.testing.assert_array_equal(one, other)
    history = trainer.fit(["the", "You"], batch_size=2, verbose=0).history
    assert history["reward"] == [2.5] and any((a != b).any() for a, b in zip(model.get_weights(), initial))
