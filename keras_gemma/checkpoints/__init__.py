"""Presets in and out.

    name, handle or folder → files → tensors, one at a time → variables
    variables and settings → files under a temporary name → preset folder

The models hand in their classes; nothing here imports them.
"""

from keras_gemma.checkpoints.loading import load_backbone
from keras_gemma.checkpoints.loading import load_preprocessor
from keras_gemma.checkpoints.loading import load_task
from keras_gemma.checkpoints.loading import load_tokenizer
from keras_gemma.checkpoints.saving import save_backbone
from keras_gemma.checkpoints.saving import save_preprocessor
from keras_gemma.checkpoints.saving import save_task
from keras_gemma.checkpoints.saving import save_tokenizer

__all__ = [
    "load_backbone",
    "load_preprocessor",
    "load_task",
    "load_tokenizer",
    "save_backbone",
    "save_preprocessor",
    "save_task",
    "save_tokenizer",
]
