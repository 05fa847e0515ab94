"""The quantities of policy gradients, against sums over everything that can be written."""

import itertools

import numpy as np
import pytest

from keras_gemma.rlhf import AdaptiveCoefficient
from keras_gemma.rlhf import clipped_losses
from keras_gemma.rlhf import dpo_losses
from keras_gemma.rlhf import ipo_losses
from keras_gemma.rlhf import leave_one_out
from keras_gemma.rlhf import reinforce_losses
from keras_gemma.rlhf import sequence_kl

MASK = np.array([[1, 1, 1], [1, 0, 0]], "float32")
LOGPS = np.log(np.array([[0.5, 0.2, 0.9], [0.3, 0.4, 0.8]], "float32"))
REFERENCE = np.log(np.array([[0.25, 0.4, 0.9], [0.6, 0.1, 0.1]], "float32"))


@pytest.mark.multi_backend
def test_the_kl_of_responses():
    expected = [np.log(0.5 * 0.2 / (0.25 * 0.4)), np.log(0.3 / 0.6)]
    np.testing.assert_allclose(np.array(sequence_kl(LOGPS, REFERENCE, MASK)), expected, atol=1e-6)
    # Its mean over what the policy writes is the divergence, which is not negative.
    policy, reference = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    estimates = np.array(sequence_kl(np.log(policy)[:, None], np.log(reference)[:, None], np.ones((3, 1))))
    np.testing.assert_allclose(policy @ estimates, np.sum(policy * np.log(policy / reference)), rtol=1e-6)


@pytest.mark.multi_backend
def test_leaving_one_out():
    received = np.array(leave_one_out(np.array([1.0, 2.0, 6.0, -1.0, 0.0, 4.0]), 3))
    np.testing.assert_allclose(received, [1 - 4, 2 - 3.5, 6 - 1.5, -1 - 2, 0 - 1.5, 4 + 0.5], rtol=1e-6)
    # Whole numbers stay no whole numbers.
    np.testing.assert_allclose(np.array(leave_one_out(np.array([1, 2, 4]), 3)), [-2, -0.5, 2.5])
    for rewards, size in [(np.ones(3), 1), (np.ones(5), 2)]:
        with pytest.raises(ValueError, match="groups of at least 2"):
            leave_one_out(rewards, size)


def test_leaving_one_out_keeps_the_gradient():
    """Over all pairs of arms that a softmax draws, and their probabilities: the exact gradient of the mean reward."""
    logits, rewards = np.array([0.3, -0.2, 0.5]), np.array([1.0, 2.0, -1.0])
    p = np.exp(logits) / np.exp(logits).sum()
    exact = p * (rewards - p @ rewards)
    estimate = np.zeros(3)
    for pair in itertools.product(range(3), repeat=2):
        advantages = np.array(leave_one_out(rewards[list(pair)], 2))
        scores = [np.eye(3)[arm] - p for arm in pair]
        estimate += np.prod(p[list(pair)]) * np.mean([a * s for a, s in zip(advantages, scores)], axis=0)
    np.testing.assert_allclose(estimate, exact, atol=1e-6)


@pytest.mark.multi_backend
def test_losses_of_responses():
    advantages = np.array([2.0, -1.0], "float32")
    expected = [-2.0 * np.log(0.5 * 0.2 * 0.9), np.log(0.3)]
    np.testing.assert_allclose(np.array(reinforce_losses(LOGPS, advantages, MASK)), expected, rtol=1e-5)

    ratios = np.exp(LOGPS - REFERENCE)
    first = -2.0 * np.minimum(ratios[0], np.minimum(ratios[0], 1.2)).sum()
    second = max(ratios[1, 0], np.clip(ratios[1, 0], 0.8, 1.2))
    received = np.array(clipped_losses(LOGPS, REFERENCE, advantages, MASK, clip=0.2))
    np.testing.assert_allclose(received, [first, second], rtol=1e-5)


def test_at_the_policy_that_sampled_clipping_changes_nothing():
    import jax

    advantages = np.array([2.0, -1.0], "float32")
    plain = jax.grad(lambda logps: reinforce_losses(logps, advantages, MASK).sum())(LOGPS)
    clipped = jax.grad(lambda logps: clipped_losses(logps, LOGPS, advantages, MASK, 0.2).sum())(LOGPS)
    np.testing.assert_allclose(clipped, plain, rtol=1e-6)


@pytest.mark.multi_backend
def test_direct_preferences():
    chosen, rejected, of_reference = np.array([-3.0, -1.0]), np.array([-4.0, -1.0]), np.array([-3.5, -2.0])
    gap = 0.1 * ((chosen - of_reference) - (rejected - of_reference))
    expected = -np.log(1 / (1 + np.exp(-gap)))
    received = np.array(dpo_losses(chosen, rejected, of_reference, of_reference, 0.1))
    np.testing.assert_allclose(received, expected, rtol=1e-5)
    # A share of the pairs is the wrong way round.
    exchanged = np.array(dpo_losses(rejected, chosen, of_reference, of_reference, 0.1))
    smoothed = np.array(dpo_losses(chosen, rejected, of_reference, of_reference, 0.1, label_smoothing=0.2))
    np.testing.assert_allclose(smoothed, 0.8 * expected + 0.2 * exchanged, rtol=1e-5)
    of_margin = np.array(ipo_losses(chosen, rejected, of_reference, of_reference, 0.1))
    np.testing.assert_allclose(of_margin, (gap / 0.1 - 5.0) ** 2, rtol=1e-5)


def test_a_coefficient_that_follows_a_target():
    coefficient = AdaptiveCoefficient(0.1, target=2.0, rate=0.5)
    coefficient.update(2.2)
    np.testing.assert_allclose(coefficient.value, 0.1 * 1.05)
    coefficient.update(100.0)
    np.testing.assert_allclose(coefficient.value, 0.1 * 1.05 * 1.1)
    coefficient.update(0.0)
    np.testing.assert_allclose(coefficient.value, 0.1 * 1.05 * 1.1 * 0.9)
    fixed = AdaptiveCoefficient(0.1)
    fixed.update(100.0)
    assert fixed.value == 0.1
    for settings in ({"value": -1}, {"value": 0, "target": 1.0}, {"value": 1, "target": -1}, {"value": 1, "rate": 0}):
        with pytest.raises(ValueError, match="A coefficient is at least 0"):
            AdaptiveCoefficient(**settings)
