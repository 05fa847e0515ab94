"""Which mesh, recomputation and batch suit a model on given chips: the most promising are compiled.

A compilation takes minutes, so few are made: what each candidate needs is estimated first.
"""

import itertools
from typing import NamedTuple

from keras_gemma import distribution as distributions
from keras_gemma import startup
from keras_gemma.planning import abstract
from keras_gemma.planning import topology
from keras_gemma.planning.estimates import PASSES
from keras_gemma.planning.estimates import Estimates
from keras_gemma.planning.plan import plan

# Beyond so many rows at a time a chip is as busy as it gets.
MOST_ROWS = 16
LONGEST_MODEL_AXIS = 16
# Of a chip's memory, so that what is estimated a little low still fits.
SAFE = 0.95


class Candidate(NamedTuple):
    """What `search` chooses from.

    Attributes:
        model: int, length of the model axis.
        recompute: string.
        rows: int, rows of a part of the batch that are in memory at a time.
        accumulate: int, into how many microbatches a step is cut.
    """

    model: int
    recompute: str
    rows: int
    accumulate: int


def search(preset, config, sequence_length=8192, batch_size=None, most=4, tell=lambda made: None):
    """Looks for the fastest way to train that fits.

    Args:
        preset, config, sequence_length: as of `plan`. Of the configuration, chips and pods are kept.
        batch_size: optional int, rows of a step, which is cut into microbatches where it does not fit at once. By
            default as many rows as make the step fastest.
        most: int, at most so many programs are compiled.
        tell: callable, told of each `Plan` when it is made.

    Returns:
        A list of `Plan`s: those that fit before the others, the fastest first.

    Raises:
        ImportError, ValueError: as `plan`; and for a configuration for serving, and a batch that no mesh of these
            chips can cut.
    """
    startup.require_jax("planning.search")
    configuration = distributions.configuration(config)
    if configuration.use == distributions.SERVING:
        raise ValueError(f"A search is for the fastest way to train. Received: {config!r}, which is for serving")
    if configuration.topology is None:
        raise ValueError(f"A search is for chips of one kind. Received: {config!r}, which takes any devices")
    chip, chips = topology.chip_of(configuration.topology), configuration.data * configuration.model
    sizes = abstract.model_without_memory(preset).backbone.get_config()
    estimates = Estimates(sizes, sequence_length, configuration.replica, chips, chip)
    left = sorted(_candidates(sizes, configuration, batch_size), key=estimates.tokens_per_second, reverse=True)
    if not left:
        raise ValueError(f"No mesh of {config!r} cuts such a batch. Received: batch_size={batch_size}")
    made = []
    while len(made) < most and (chosen := _most_promising(left, made, estimates, chip.memory * topology.GIB)):
        left.remove(chosen)
        parts = configuration.replica * chips // chosen.model
        made.append(
            plan(
                preset,
                config,
                sequence_length,
                parts * chosen.rows * chosen.accumulate,
                chosen.recompute,
                phase="train",
                model=chosen.model,
                accumulate=chosen.accumulate,
            )
        )
        estimates.learn(chosen, made[-1])
        tell(made[-1])
    return sorted(made, key=lambda one: (not one.fits, -(one.tokens_per_second or 0)))


def _candidates(sizes, configuration, batch_size):
    chips = configuration.data * configuration.model
    lengths = [1 << power for power in range(LONGEST_MODEL_AXIS.bit_length())]
    for model, recompute in itertools.product(lengths, PASSES):
        cuts = (sizes["intermediate_dim"] // 2, sizes["vocabulary_size"], sizes["num_query_heads"], chips)
        if any(size % model for size in cuts) or sizes["hidden_dim"] % (chips // model):
            continue
        parts = configuration.replica * chips // model
        for rows in (1 << power for power in range(MOST_ROWS.bit_length())):
            if batch_size is None:
                yield Candidate(model, recompute, rows, accumulate=1)
            elif batch_size % (parts * rows) == 0:
                yield Candidate(model, recompute, rows, accumulate=batch_size // (parts * rows))


def _most_promising(left, made, estimates, memory):
    """The fastest of those that seem to fit, if it beats what fits; where nothing does, that which needs least."""
    fastest = max((one.tokens_per_second for one in made if one.fits), default=0)
    faster = [one for one in left if estimates.tokens_per_second(one) > fastest]
    fitting = [one for one in faster if estimates.bytes_needed(one) <= SAFE * memory]
    if fitting or fastest:
        return next(iter(fitting), None)
    return min(left, key=estimates.bytes_needed, default=None)
