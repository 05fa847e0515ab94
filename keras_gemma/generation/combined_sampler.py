"""One sampler for temperature, top-k, top-p and min-p together."""

import keras
import keras_hub
from keras import ops

from keras_gemma import kernels
from keras_gemma.generation import logits_processors
from keras_gemma.generation.buckets import bucket
from keras_gemma.generation.sampler_settings import check_settings


@keras.saving.register_keras_serializable(package="keras_gemma")
class CombinedSampler(keras_hub.samplers.Sampler):
    """Draws from what temperature, top-k, top-p and min-p leave, applied in this order as in transformers.

    In `generate`, calls with other numbers share what is compiled.

    Args:
        temperature: float of at least 0. Divides the logits: below 1 likely tokens become likelier. At 0 `generate`
            takes the likeliest token.
        top_k: optional int. Keeps that many of the likeliest tokens.
        top_p: optional float, above 0 and at most 1. Keeps the likeliest tokens that together reach this probability.
        min_p: optional float from 0 to 1. Keeps tokens at least so likely, compared with the likeliest.
        seed: optional int.

    Raises:
        ValueError: for settings that make no distribution.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.generation import CombinedSampler
    >>> sampler = CombinedSampler(temperature=0.5, top_p=0.9)
    >>> probabilities = sampler.compute_probabilities(np.log(np.array([[0.0625, 0.3125, 0.625]], "float32")))
    >>> np.asarray(probabilities).round(2).astype(str).tolist()
    [['0.0', '0.2', '0.8']]
    """

    def __init__(self, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=None):
        check_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        super().__init__(temperature=temperature)
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def numbers(self):
        """The settings that a compiled program takes as arguments, by name; those that change nothing are left out."""
        numbers = {
            "temperature": float(self.temperature),
            "top_k": self.top_k,
            "top_p": self.top_p if self.top_p != 1 else None,
            "min_p": self.min_p or None,
        }
        return {name: value for name, value in numbers.items() if value is not None}

    def candidates(self, vocabulary_size):
        """How many logits are sorted: `top_k` rounded up, or all of them."""
        return vocabulary_size if self.top_k is None else min(bucket(self.top_k), vocabulary_size)

    def compute_probabilities(self, logits):
        return probabilities(ops.cast(logits, "float32"), self.candidates(logits.shape[-1]), **self.numbers())

    def get_next_token(self, probabilities):
        return kernels.draw(probabilities, self.seed_generator)

    def get_config(self):
        return {
            **super().get_config(), "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p, "seed": self.seed,
        }  # fmt: skip


def probabilities(logits, candidates=None, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Probabilities `[B, V]` that a token is drawn with.

    Args:
        logits: float32 tensor `[B, V]`.
        candidates: optional int, see `keep_likeliest`.
        temperature, top_k, top_p, min_p: as of `CombinedSampler`; numbers or scalar tensors.
    """
    logits = logits / temperature
    if top_k is not None or top_p is not None:
        logits = logits_processors.keep_likeliest(logits, top_k, top_p, candidates)
    if min_p is not None:
        logits = logits_processors.keep_above_share(logits, min_p)
    return keras.activations.softmax(logits)
