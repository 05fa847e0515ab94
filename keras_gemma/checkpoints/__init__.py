"""Checkpoints in and out, and from one format to another.

    name, handle or folder → files → tensors, one at a time → variables
    variables and settings → files under a temporary name → preset folder
    files of one format → tensors under one set of names, one at a time → files of another

canonical       the one set of names; each format has a table that leads there and back
keras_preset    keras-hub's folders          keras_weights    a single .weights.h5
hugging_face    safetensors                  pytorch_pickle   .bin of Hugging Face, .ckpt of gemma_pytorch
gguf_file       llama.cpp's files            flax_orbax       google-deepmind/gemma's folders
tokenizer_files tokenizer.model and tokenizer.json      tokenizer_folder    all that a folder says of its tokenizer
besides_tensors what a model has besides tensors, and which format has a place for it
peft_adapters   LoRA adapters of PEFT        lora_files       those of Keras

The models hand in their classes for loading and saving.
"""

from keras_gemma.checkpoints.besides_tensors import is_gemmas
from keras_gemma.checkpoints.converting import convert
from keras_gemma.checkpoints.exporting import export_model
from keras_gemma.checkpoints.exporting import export_tokenizer
from keras_gemma.checkpoints.h5_writing import save_weights
from keras_gemma.checkpoints.inspecting import inspect
from keras_gemma.checkpoints.loading import load_backbone
from keras_gemma.checkpoints.loading import load_preprocessor
from keras_gemma.checkpoints.loading import load_task
from keras_gemma.checkpoints.loading import load_tokenizer
from keras_gemma.checkpoints.lora_files import read_lora
from keras_gemma.checkpoints.lora_files import save_lora
from keras_gemma.checkpoints.peft_adapters import load_adapters
from keras_gemma.checkpoints.peft_adapters import save_adapters
from keras_gemma.checkpoints.saving import save_backbone
from keras_gemma.checkpoints.saving import save_preprocessor
from keras_gemma.checkpoints.saving import save_task
from keras_gemma.checkpoints.saving import save_tokenizer

__all__ = [
    "convert",
    "export_model",
    "export_tokenizer",
    "inspect",
    "is_gemmas",
    "load_adapters",
    "load_backbone",
    "load_preprocessor",
    "load_task",
    "load_tokenizer",
    "read_lora",
    "save_adapters",
    "save_backbone",
    "save_lora",
    "save_preprocessor",
    "save_task",
    "save_tokenizer",
    "save_weights",
]
