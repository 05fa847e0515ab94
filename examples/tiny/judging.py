"""Shares and means with their 95% intervals.

`share_right` counts by Wilson's interval; the others resample prompts (bootstrap, BCa).
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 5000


class Estimate(NamedTuple):
    """A value, and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def share_right(rewards_of_chosen, rewards_of_rejected):
    """How often the better answer has the larger reward; a tie is wrong."""
    right = np.asarray(rewards_of_chosen) > np.asarray(rewards_of_rejected)
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return Estimate(float(right.mean()), float(interval.low), float(interval.high))


def win_rate(rewards, rewards_of_other):
    """How often the first of two answers to a prompt has the larger reward, half of the ties included."""
    return mean(np.sign(np.asarray(rewards, "float64") - np.asarray(rewards_of_other, "float64")) / 2 + 0.5)


def mean(values):
    """The mean over prompts."""
    values = np.asarray(values, "float64")
    if np.ptp(values) == 0:
        return Estimate(*[float(values[0])] * 3)
    found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(0))
    return Estimate(float(values.mean()), float(found.confidence_interval.low), float(found.confidence_interval.high))
