"""Gemma in Keras: from preset to text to fit."""

import importlib
from typing import TYPE_CHECKING

from keras_gemma import startup

if TYPE_CHECKING:
    from keras_gemma.models import GemmaBackbone
    from keras_gemma.models import GemmaCausalLM
    from keras_gemma.models import GemmaCausalLMPreprocessor
    from keras_gemma.models import GemmaRewardModel
    from keras_gemma.models import GemmaTextClassifier
    from keras_gemma.models import GemmaTextClassifierPreprocessor
    from keras_gemma.models import GemmaTokenizer

__version__ = "0.1.0"
__all__ = [
    "GemmaBackbone",
    "GemmaCausalLM",
    "GemmaCausalLMPreprocessor",
    "GemmaRewardModel",
    "GemmaTextClassifier",
    "GemmaTextClassifierPreprocessor",
    "GemmaTokenizer",
    "__version__",
]

# Keras takes seconds to import, and `keras-gemma --help` needs none of it: these are imported when they are first used.
_PACKAGES = {"checkpoints", "data", "distribution", "generation", "models", "planning", "rlhf", "training"}
_CLASSES = {*__all__} - {"__version__"}

startup.default_to_jax()


def __getattr__(name):
    if name not in _PACKAGES | _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    startup.import_keras_hub_quietly()
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.models"), name)


def __dir__():
    return sorted({*globals(), *__all__, *_PACKAGES})
