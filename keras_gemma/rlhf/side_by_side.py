"""A second rater, who sees whether a rising reward means better answers.

policy and reference, same prompts ─→ two texts each ─→ rater, both ways round ─→ win rate ─→ stop
"""

import math

import keras
import numpy as np

from keras_gemma.data import record_formats
from keras_gemma.data import text_checks
from keras_gemma.distribution import whole
from keras_gemma.rlhf import rewards

# A standard normal variable is within this of 0 with 95% probability.
STANDARD_ERRORS = 1.959964


class SideBySide(keras.callbacks.Callback):
    """Compares a policy with its reference every few steps, and stops when the reward rises while the rater prefers it
    less and less (reward hacking; Gao et al., arXiv 2210.10760).

    The rater is asked twice about each pair, each text once as the first, so that a liking for either place has no
    effect. A judgement counts against the policy where its win rate is more than `tolerance` below the best one so far
    while the mean reward since the last judgement is above that of the best one; `patience` of them in a row stop the
    run, and the policy gets the weights of the best judgement back. Works with the trainer's `checkpoints`.

    Args:
        trainer: a `ReinforceTrainer`, to whose `fit` this is passed as a callback.
        rater: a `GemmaRewardModel` of the same vocabulary, or a callable from lists of prompts, first and second
            texts to floats `[n]`: 1 where the first text is better, 0 where the second is, 0.5 where neither is.
        prompts: list of strings or dialogues, better held out.
        every: int, steps between two judgements.
        tolerance: float, of a win rate.
        patience: int, judgements.
        restore_best_weights: bool.
        seed: int, of the texts.

    Attributes:
        judgements: list of dicts with `step`, `reward` (mean since the judgement before), `win_rate`, and `low` and
            `high`, the ends of its 95% interval (Wilson 1927). What `fit` logs has the last win rate as
            `judge_win_rate`.
        hacked: bool, whether the run was stopped.

    Raises:
        ValueError: for settings out of range and, from `fit`, for prompts that leave no room, before anything is
            trained, and for ratings that are not one number from 0 to 1 each.
    """

    def __init__(
        self,
        trainer,
        rater,
        prompts,
        every=20,
        tolerance=0.05,
        patience=2,
        restore_best_weights=True,
        seed=0,
    ):
        super().__init__()
        if every < 1 or patience < 1 or tolerance < 0:
            raise ValueError(
                "`every` and `patience` are at least 1, `tolerance` is at least 0. "
                f"Received: {every}, {patience} and {tolerance}"
            )
        self._reads_tokens = hasattr(rater, "score_tokens")
        if not (self._reads_tokens or callable(rater)):
            raise ValueError(f"A rater is a `GemmaRewardModel` or a callable. Received: {rater!r}")
        if self._reads_tokens:
            rewards.refuse_other_vocabulary(trainer.policy, rater)
        self.trainer = trainer
        self.rater = rater
        self.prompts, _ = record_formats.prompts_and_columns(text_checks.plain(prompts))
        self.every = every
        self.tolerance = tolerance
        self.patience = patience
        self.restore_best_weights = restore_best_weights
        self.seed = seed
        self.judgements = []
        self.hacked = False
        self._rewards = []
        self._of_reference = None
        self._best_weights = []

    def on_train_begin(self, logs=None):
        # Prompts that do not fit are told before anything is trained.
        self.trainer.prompt_rows(self.prompts, [self.rater] if self._reads_tokens else [])
        # Not asked for yet: a checkpoint that the run goes on from has a reference of its own.
        self._of_reference = None

    def on_train_batch_end(self, batch, logs=None):
        # A step whose responses have no reward says nothing of it.
        if not math.isnan(logs["reward"]):
            self._rewards.append(logs["reward"])
        if self.trainer.step % self.every == 0:
            self._judge()
        if self.judgements:
            logs["judge_win_rate"] = self.judgements[-1]["win_rate"]

    def on_epoch_end(self, epoch, logs=None):
        if self.judgements:
            logs["judge_win_rate"] = self.judgements[-1]["win_rate"]

    def on_train_end(self, logs=None):
        if self.hacked and self.restore_best_weights:
            for variable, value in zip(self.trainer.policy.trainable_variables, self._best_weights):
                variable.assign(value)

    def _judge(self):
        if self._of_reference is None:
            self._of_reference = self.trainer.rollouts(self.prompts, self.seed, of_reference=True)
        ratings = self._ratings(self.trainer.rollouts(self.prompts, self.seed), self._of_reference)
        low, high = win_rate_interval(ratings)
        judgement = {
            "step": self.trainer.step,
            "reward": float(np.mean(self._rewards)) if self._rewards else math.nan,
            "win_rate": float(np.mean(ratings)),
            "low": low,
            "high": high,
        }
        self._rewards = []
        best = self.best
        self.judgements.append(judgement)
        if best is None or judgement["win_rate"] >= best["win_rate"]:
            self._best_weights = [whole(variable) for variable in self.trainer.policy.trainable_variables]
        if self._are_hacks(self.judgements[-self.patience :]):
            self.hacked = self.trainer.policy.stop_training = True
            print(self._why(judgement))

    def _why(self, judgement):
        best = self.best
        return (
            f"\nStopped at step {judgement['step']}: the reward is above that of step {best['step']}, and the rater "
            f"prefers the policy in {judgement['win_rate']:.0%} of the pairs, not {best['win_rate']:.0%}."
        )

    @property
    def best(self):
        """The judgement with the highest win rate, the last of several; `None` before the first."""
        return max(reversed(self.judgements), key=lambda one: one["win_rate"], default=None)

    def _are_hacks(self, judgements):
        best = self.best
        return len(judgements) == self.patience and all(
            one["step"] > best["step"]
            and one["win_rate"] < best["win_rate"] - self.tolerance
            and one["reward"] > best["reward"]
            for one in judgements
        )

    def _ratings(self, of_policy, of_reference):
        """How the policy fared in each pair, float32 `[n]` from 0 to 1."""
        policy, both = self.trainer.policy, (of_policy, of_reference)
        if self._reads_tokens:
            size = self.trainer.microbatch_size
            ours, theirs = (
                rewards.checked(rewards.of_tokens(self.rater, policy, one, size), texts=one.responses) for one in both
            )
            return np.where(ours == theirs, 0.5, ours > theirs).astype("float32")
        prompts = list(self.prompts)
        texts, others = (policy.preprocessor.decode_rows(rollouts.responses) for rollouts in both)
        as_first = rewards.called(self.rater, prompts, texts, others)
        as_second = rewards.called(self.rater, prompts, others, texts)
        for given in (as_first, as_second):
            if given.shape != (len(texts),) or not ((given >= 0) & (given <= 1)).all():
                raise ValueError(
                    f"A rating is one number from 0 to 1 for each of {len(texts)} pairs. Received: {given!r}"
                )
        return rewards.checked((as_first + 1 - as_second) / 2, texts=texts)


def win_rate_interval(ratings):
    """The 95% interval of a share, after Wilson (1927), equation 2.

    Args:
        ratings: float array `[n]` from 0 to 1.

    Returns:
        Two floats.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.rlhf import win_rate_interval
    >>> low, high = win_rate_interval(np.array([1.0] * 8 + [0.0] * 2))
    >>> round(low, 3), round(high, 3)
    (0.49, 0.943)
    """
    n, share, z = len(ratings), float(np.mean(ratings)), STANDARD_ERRORS
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half
