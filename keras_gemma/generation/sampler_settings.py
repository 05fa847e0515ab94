"""Which settings of a sampler make a distribution."""

import math
import numbers

import keras_hub

# Logits divided by less leave the range of float32.
SMALLEST_TEMPERATURE = 1e-6


def check_settings(vocabulary_size=None, **settings):
    """Checks settings of `generate` by name; `None` leaves one out.

    Args:
        vocabulary_size: optional int, the most that `top_k` may be.
        **settings: of `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty`.

    Raises:
        ValueError: for a setting that makes no distribution.

    Example:

    >>> from keras_gemma.generation import check_settings
    >>> check_settings(temperature=0, top_p=0.9)
    >>> check_settings(top_p=0)
    Traceback (most recent call last):
    ...
    ValueError: `top_p` is a number above 0 and at most 1. Received: 0
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if name == "top_k":
            _check_count(name, value, vocabulary_size)
        else:
            _check_number(name, value)


def check_sampler(sampler, vocabulary_size=None):
    """Checks the settings of a keras-hub sampler, or of a sampler derived from one.

    Raises:
        ValueError: for a setting that makes no distribution.
    """
    _check_number("temperature", sampler.temperature)
    samplers = keras_hub.samplers
    if isinstance(sampler, samplers.TopPSampler):
        _check_number("p", sampler.p)
    if isinstance(sampler, samplers.ContrastiveSampler):
        _check_number("alpha", sampler.alpha)
    if isinstance(sampler, (samplers.TopKSampler, samplers.ContrastiveSampler)):
        _check_count("k", sampler.k, vocabulary_size)
    if isinstance(sampler, samplers.TopPSampler) and sampler.k is not None:
        _check_count("k", sampler.k, vocabulary_size)
    if isinstance(sampler, samplers.BeamSampler):
        _check_count("num_beams", sampler.num_beams, None)


_RANGES = {
    "temperature": ("of at least 0, where 0 always takes the likeliest token", lambda x: x >= 0),
    "repetition_penalty": ("above 0, where 1 changes nothing", lambda x: x > 0),
    "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "alpha": ("from 0 to 1", lambda x: 0 <= x <= 1),
}


def _check_number(name, value):
    valid, holds = _RANGES[name]
    if not is_number(value) or not math.isfinite(value) or not holds(value):
        raise ValueError(f"`{name}` is a number {valid}. Received: {value!r}")


def _check_count(name, value, most):
    whole = is_number(value) and isinstance(value, numbers.Integral)
    if not whole or value < 1 or (most is not None and value > most):
        upwards = "of at least 1" if most is None else f"from 1 to {most}, the size of the vocabulary"
        raise ValueError(f"`{name}` is an integer {upwards}. Received: {value!r}")


def is_greedy(temperature):
    """Whether a temperature leaves only the likeliest token."""
    return is_number(temperature) and temperature < SMALLEST_TEMPERATURE


def is_number(value):
    """Whether a value is a real number of Python or NumPy, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
