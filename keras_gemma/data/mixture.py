"""Sources → one stream of examples, each source with its share, and the shares change from stage to stage.

source ── this host's share ── shuffled, pass after pass ──┐
source ── this host's share ── shuffled, pass after pass ──┴→ stage, stage, …

Each host takes its share of every source before they are mixed. Mixing repeats in a short period, and hosts that took
every n-th example of the mixture could see one source only.
"""

import bisect
import itertools
import math
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from keras_gemma.data.extras import required
from keras_gemma.distribution import share_of_data

SHARE_UNITS = 10**6


@dataclass(frozen=True)
class Stage:
    """A stretch of training with shares of its own.

    Args:
        weights: dict from source to its share of the examples, relative to the others'. A source that is left out, or
            has 0, rests during the stage.
        examples: int, examples of the stage on all hosts together. `None`, for the last stage only: without end.
    """

    weights: Mapping
    examples: int | None = None


def mixture(sources, stages, seed=0, host_index=None, host_count=None, shuffle=True):
    """Mixes sources of examples.

    A source goes through all its examples before one comes again, across stages too, and draws a new order for each
    pass. In every stretch of a stage the shares are kept to within an example or two.

    Args:
        sources: dict from name to a finite `grain.MapDataset` of single examples.
        stages: list of `Stage`; or a dict of weights for a single stage without end.
        seed: int, of all orders.
        host_index, host_count: this host's number and that of all. By default `distribution.share_of_data()`, so the
            distribution has to be set before; hosts whose devices hold the same rows get the same examples.
        shuffle: bool. `False` keeps the order of the sources.

    Returns:
        A `grain.MapDataset` of this host's examples, as many on each host. It ends with the last stage, if that does.

    Raises:
        ValueError: for unknown sources, negative weights or none at all, a source with fewer examples than hosts, and a
            stage without end that others follow.
        ImportError: without the extra `train`.

    Example:

    >>> import grain
    >>> from keras_gemma.data import Stage, mixture
    >>> sources = {"web": grain.MapDataset.source(["w"] * 9), "code": grain.MapDataset.source(["c"] * 9)}
    >>> stages = [Stage({"web": 3, "code": 1}, examples=8), Stage({"code": 1}, examples=4)]
    >>> "".join(mixture(sources, stages, host_index=0, host_count=1))
    'wwwcwwwccccc'
    """
    host_index, host_count = _hosts(host_index, host_count)
    stages = [Stage(stages)] if isinstance(stages, Mapping) else list(stages)
    _check_stages(sources, stages, host_count)
    used = [name for name in sources if any(stage.weights.get(name, 0) for stage in stages)]
    _check_sources({name: sources[name] for name in used}, host_count)
    passes = [
        _passes(sources[name], _seed_of(name, seed) if shuffle else None, host_index, host_count) for name in used
    ]
    schedule = Schedule(
        shares=[_whole_shares([stage.weights.get(name, 0) for name in used]) for stage in stages],
        lengths=[sys.maxsize if stage.examples is None else stage.examples // host_count for stage in stages],
    )
    return required("grain").MapDataset.select_from_datasets(passes, schedule)


def _hosts(host_index, host_count):
    if (host_index is None) != (host_count is None):
        raise ValueError("`host_index` and `host_count` go together. Received one of them.")
    if host_index is None:
        return share_of_data()
    if not 0 <= host_index < host_count:
        raise ValueError(f"`host_index` counts from 0 up to `host_count`. Received: {host_index} of {host_count}")
    return host_index, host_count


def _check_stages(sources, stages, host_count):
    if not stages:
        raise ValueError("At least one stage is needed. Received none.")
    for number, stage in enumerate(stages):
        unknown = sorted(set(stage.weights) - set(sources))
        if unknown:
            raise ValueError(f"Stage {number} weighs unknown sources {unknown}. The sources are: {sorted(sources)}")
        weights = list(stage.weights.values())
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise ValueError(
                f"Weights are finite, not negative, and one is above 0. Stage {number}: {dict(stage.weights)}"
            )
        if stage.examples is None and number < len(stages) - 1:
            raise ValueError(f"Only the last stage may be without end. Stage {number} has examples=None.")
        if stage.examples is not None and stage.examples < host_count:
            raise ValueError(
                f"A stage needs an example for each of {host_count} hosts. Stage {number}: examples={stage.examples}"
            )


def _check_sources(sources, host_count):
    for name, source in sources.items():
        if not host_count <= len(source) < sys.maxsize:
            raise ValueError(
                f"A source is finite and has an example for each of {host_count} hosts. "
                f"{name!r} has {len(source)} examples."
            )


def _passes(source, seed, host_index, host_count):
    """This host's share of a source, one pass after the other without end."""
    share = source[host_index::host_count]
    return (share if seed is None else share.shuffle(seed=seed)).repeat()


def _seed_of(name, seed):
    # By name, so that a source keeps its order when others come or go. Grain adds 1 for each pass.
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0])


class Schedule:
    """Which source gives the example at a place, and which of its examples: a selection map for Grain.

    Args:
        shares: for each stage a list with an int for each source.
        lengths: int list, examples of each stage.
    """

    def __init__(self, shares, lengths):
        self._shares = shares
        self._starts = list(itertools.accumulate(lengths, initial=0))
        self._drawn = [[0] * len(shares[0])]
        for stage_shares, length in zip(shares, lengths):
            self._drawn.append([a + b for a, b in zip(self._drawn[-1], _draws(length, stage_shares))])

    def __len__(self):
        return min(self._starts[-1], sys.maxsize)

    def __getitem__(self, place):
        rounds, place = divmod(place, len(self))
        stage = bisect.bisect_right(self._starts, place) - 1
        before, after = (_draws(place + i - self._starts[stage], self._shares[stage]) for i in (0, 1))
        source = next(i for i, (a, b) in enumerate(zip(before, after)) if a < b)
        return source, before[source] + self._drawn[stage][source] + rounds * self._drawn[-1][source]


def _draws(count, shares):
    """How many of the first `count` examples of a stage come from each source."""
    drawn, rest, rest_share = [], count, sum(shares)
    for share in shares:
        later = rest * (rest_share - share) // rest_share if rest_share else 0
        drawn.append(rest - later)
        rest, rest_share = later, rest_share - share
    return drawn


def _whole_shares(weights):
    total = sum(weights)
    return [max(1, round(weight / total * SHARE_UNITS)) if weight else 0 for weight in weights]
