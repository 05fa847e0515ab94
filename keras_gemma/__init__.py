"""Gemma in Keras: from preset to text to fit."""

from typing import TYPE_CHECKING

from keras_gemma import startup

if TYPE_CHECKING:
    from keras_gemma.models import GemmaBackbone
    from keras_gemma.models import GemmaCausalLM
    from keras_gemma.models import GemmaCausalLMPreprocessor
    from keras_gemma.models import GemmaTokenizer

__version__ = "0.1.0"
__all__ = ["GemmaBackbone", "GemmaCausalLM", "GemmaCausalLMPreprocessor", "GemmaTokenizer", "__version__"]

startup.default_to_jax()


def __getattr__(name):
    # Keras takes seconds to import, and `keras-gemma --help` needs none of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    startup.import_keras_hub_quietly()
    from keras_gemma import models

    globals()[name] = getattr(models, name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *__all__})
