"""keras-hub's samplers as pure functions of the values of their variables.

A sampler either chooses a token from probabilities (`get_next_token`: greedy, random, top_k, top_p, a user's own) or
brings a loop of its own (`__call__`: beam, contrastive).
"""

import dataclasses
import numbers
import threading
import weakref
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_gemma import kernels
from keras_gemma.generation import combined_sampler
from keras_gemma.generation.buckets import bucket
from keras_gemma.generation.combined_sampler import CombinedSampler
from keras_gemma.generation.sampler_settings import check_sampler
from keras_gemma.generation.sampler_settings import is_greedy

NAMES = ("beam", "contrastive", "greedy", "random", "top_k", "top_p")


def resolve_sampler(sampler, vocabulary_size=None):
    """The keras-hub sampler that a name, a configuration or a sampler stands for.

    Args:
        sampler: a name, a configuration or a sampler. One of temperature 0 stands for `GreedySampler`.
        vocabulary_size: optional int, the most candidates that a sampler may have.

    Raises:
        ValueError: for an unknown name, something that is no sampler, samplers that need more than one model, and
            settings that make no distribution.

    Example:

    >>> from keras_gemma.generation import resolve_sampler
    >>> resolve_sampler("top_k").k
    5
    """
    if isinstance(sampler, str) and sampler not in (*NAMES, "speculative"):
        raise ValueError(f"A sampler is one of {', '.join(map(repr, NAMES))}. Received: {sampler!r}")
    if isinstance(sampler, (str, dict)):
        sampler = keras_hub.samplers.get(sampler)
    if not isinstance(sampler, keras_hub.samplers.Sampler):
        raise ValueError(
            f"A sampler is one of {', '.join(map(repr, NAMES))} or a `keras_hub.samplers.Sampler`. "
            f"Received: {sampler!r}"
        )
    if isinstance(sampler, keras_hub.samplers.SpeculativeSampler):
        raise ValueError("`SpeculativeSampler` needs a draft model beside this one, which `generate` does not take.")
    if getattr(sampler, "return_all_beams", False):
        raise ValueError("`generate` returns one text a prompt. Received a sampler with return_all_beams=True.")
    check_sampler(sampler, vocabulary_size)
    # A user's own may choose otherwise than by likelihood. See `choose`.
    known = _is_known(sampler)
    return keras_hub.samplers.GreedySampler() if known and is_greedy(sampler.temperature) else sampler


def has_own_loop(sampler):
    return type(sampler).__call__ is not keras_hub.samplers.Sampler.__call__


def key_and_twin(sampler):
    """What two samplers must share to share a program, and the sampler to build that program with.

    Samplers of keras-hub are described by their settings, and a copy is built into the program, so that changing
    the settings of the original later changes no program. A user's own may hold anything and stands for itself.
    What `settings_of` gives is not built in.
    """
    if not _is_known(sampler):
        return sampler, sampler
    config = {name: value for name, value in sampler.get_config().items() if name != "seed"}
    if type(sampler) is keras_hub.samplers.RandomSampler:
        config.pop("temperature")
    if type(sampler) is CombinedSampler:
        numbers = sampler.numbers()
        config = {name: 1 for name in numbers}
        if "top_k" in numbers:
            config["top_k"] = bucket(sampler.top_k)
    return (type(sampler), *sorted(config.items())), type(sampler).from_config(config)


def settings_of(sampler):
    """The settings that a program takes as tensors, so that one serves all their values: a dict of scalars."""
    if type(sampler) is keras_hub.samplers.RandomSampler:
        numbers = {"temperature": float(sampler.temperature)}
    else:
        numbers = sampler.numbers() if type(sampler) is CombinedSampler else {}
    dtypes = {name: "int32" if name == "top_k" else "float32" for name in numbers}
    return {name: ops.convert_to_tensor(value, dtypes[name]) for name, value in numbers.items()}


def _is_known(sampler):
    return type(sampler) is CombinedSampler or type(sampler).__module__.startswith("keras_hub.")


class Sampling:
    """A sampler and the values of its variables in the course of a call.

    As a context manager it hands the values back to the sampler at the end, unless they came from a seed. Of calls
    that overlap, in several threads or streams, the first has the sampler's own values and each of the others values
    that follow from them, so that no two draw the same numbers.

    Args:
        sampler: a keras-hub sampler.
        seed: optional int.

    Attributes:
        values: tuple of tensors.
    """

    def __init__(self, sampler, seed=None):
        check_seed(seed)
        self.sampler = sampler
        self.seed = seed
        self.apart = None
        with _in_turn:
            self.values = seeded_values(sampler, seed)
            if seed is None and sampler.variables:
                self._join(_sampling.setdefault(sampler, Overlapping()))

    def _join(self, others):
        first = others.first and others.first()
        if first is None:
            others.first = weakref.ref(self)
        else:
            others.later += 1
            self.apart = others.later
            self.values = tuple(_moved_apart(value, self.apart) for value in self.values)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.seed is not None or self.apart is not None:
            return
        with _in_turn:
            for variable, value in zip(self.sampler.variables, self.values):
                variable.assign(value)
            if self.sampler in _sampling:
                _sampling[self.sampler].first = None


@dataclasses.dataclass
class Overlapping:
    """The calls that sample with one sampler at the same time.

    Attributes:
        first: weak reference to the `Sampling` that has the sampler's own values, or `None`.
        later: int, how many others there were so far.
    """

    first: Any = None
    later: int = 0


_in_turn = threading.Lock()
_sampling = weakref.WeakKeyDictionary()


def _moved_apart(value, number):
    """Another state of a generator of random numbers, which follows from its state and a number."""
    state = ops.convert_to_numpy(value)
    if state.shape != (2,) or not np.issubdtype(state.dtype, np.integer):
        # Something else that a user's own sampler keeps.
        return value
    words = np.random.SeedSequence([*map(int, state), number]).generate_state(2) >> 1
    return ops.convert_to_tensor(words, value.dtype)


def check_seed(seed):
    """Raises a `ValueError` for a seed that random number generators do not take."""
    is_whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if seed is not None and not (is_whole and 0 <= seed < 2**32):
        raise ValueError(f"`seed` must be a whole number from 0 to 2³² - 1. Received: {seed!r}")


def seeded_values(sampler, seed):
    """The values of a sampler's variables, fresh from a seed or, without one, as they stand."""
    if seed is None:
        return tuple(ops.convert_to_tensor(v) for v in sampler.variables)
    generators = (keras.random.SeedGenerator(seed + i) for i in range(len(sampler.variables)))
    return tuple(ops.convert_to_tensor(generator.state) for generator in generators)


def choose(sampler, logits, values, settings):
    """The next token `[B]` of every row.

    Args:
        sampler: of `key_and_twin`.
        logits: float32 tensor `[B, V]`.
        values: the values of the sampler's variables.
        settings: of `settings_of`.

    Returns:
        Int32 tokens `[B]`, and the sampler's new values.
    """
    if type(sampler) is keras_hub.samplers.GreedySampler:
        return kernels.first_argmax(logits), values

    def draw():
        if type(sampler) in (keras_hub.samplers.RandomSampler, CombinedSampler):
            candidates = sampler.candidates(logits.shape[-1]) if type(sampler) is CombinedSampler else None
            probabilities = combined_sampler.probabilities(logits, candidates, **settings)
            return kernels.draw(probabilities, sampler.seed_generator)
        return ops.cast(sampler.get_next_token(_probabilities(sampler, logits)), "int32")

    return _with_values(sampler, values, draw)


def _probabilities(sampler, logits):
    overridden = type(sampler).compute_probabilities is not keras_hub.samplers.Sampler.compute_probabilities
    if overridden or not is_greedy(sampler.temperature):
        return sampler.compute_probabilities(logits)
    return ops.one_hot(kernels.first_argmax(logits), logits.shape[-1], dtype="float32")


def run(sampler, values, arguments):
    """What the sampler's own loop returns, and the sampler's new values."""
    return _with_values(sampler, values, lambda: sampler(**arguments))


def _with_values(sampler, values, function):
    variables = sampler.variables
    with keras.StatelessScope(state_mapping=zip(variables, values)) as scope:
        result = function()
        return result, tuple(ops.convert_to_tensor(scope.get_current_value(v)) for v in variables)
