"""The presets known by name: those in this repository, and the official ones of Gemma 1, Gemma 1.1 and CodeGemma.

Imports nothing heavy, so that the command line lists and checks names at once.
"""

import functools
import importlib.resources
import json
import pathlib

PARAMETERS_2B = 2_506_172_416
PARAMETERS_7B = 8_537_680_896

# name: description, parameters, Kaggle handle, bundled preset of the same configuration
OFFICIAL = {
    "gemma_2b_en": (
        "Base model of 18 layers.",
        PARAMETERS_2B,
        "kaggle://keras/gemma/keras/gemma_2b_en/3",
        "gemma_2b_en",
    ),
    "gemma_instruct_2b_en": (
        "Instruction-tuned model of 18 layers.",
        PARAMETERS_2B,
        "kaggle://keras/gemma/keras/gemma_instruct_2b_en/3",
        "gemma_instruct_2b_en",
    ),
    "gemma_1.1_instruct_2b_en": (
        "Instruction-tuned model of 18 layers, the improved version 1.1.",
        PARAMETERS_2B,
        "kaggle://keras/gemma/keras/gemma_1.1_instruct_2b_en/4",
        "gemma_instruct_2b_en",
    ),
    "code_gemma_2b_en": (
        "CodeGemma of 18 layers, trained to fill in the middle of code.",
        PARAMETERS_2B,
        "kaggle://keras/codegemma/keras/code_gemma_2b_en/2",
        "gemma_2b_en",
    ),
    "code_gemma_1.1_2b_en": (
        "CodeGemma of 18 layers, trained to fill in the middle of code, the improved version 1.1.",
        PARAMETERS_2B,
        "kaggle://keras/codegemma/keras/code_gemma_1.1_2b_en/2",
        "gemma_2b_en",
    ),
    "gemma_7b_en": (
        "Base model of 28 layers.",
        PARAMETERS_7B,
        "kaggle://keras/gemma/keras/gemma_7b_en/4",
        "gemma_7b_en",
    ),
    "gemma_instruct_7b_en": (
        "Instruction-tuned model of 28 layers.",
        PARAMETERS_7B,
        "kaggle://keras/gemma/keras/gemma_instruct_7b_en/4",
        "gemma_instruct_7b_en",
    ),
    "gemma_1.1_instruct_7b_en": (
        "Instruction-tuned model of 28 layers, the improved version 1.1.",
        PARAMETERS_7B,
        "kaggle://keras/gemma/keras/gemma_1.1_instruct_7b_en/5",
        "gemma_instruct_7b_en",
    ),
    "code_gemma_7b_en": (
        "CodeGemma of 28 layers, trained to fill in the middle of code.",
        PARAMETERS_7B,
        "kaggle://keras/codegemma/keras/code_gemma_7b_en/3",
        "gemma_7b_en",
    ),
    "code_gemma_instruct_7b_en": (
        "Instruction-tuned CodeGemma of 28 layers.",
        PARAMETERS_7B,
        "kaggle://keras/codegemma/keras/code_gemma_instruct_7b_en/3",
        "gemma_instruct_7b_en",
    ),
    "code_gemma_1.1_instruct_7b_en": (
        "Instruction-tuned CodeGemma of 28 layers, the improved version 1.1.",
        PARAMETERS_7B,
        "kaggle://keras/codegemma/keras/code_gemma_1.1_instruct_7b_en/3",
        "gemma_instruct_7b_en",
    ),
}

TRAINED_HERE = {
    "gemma_tiny_en": "A small model trained in this repository on public-domain English; its weights are bundled.",
    "gemma_tiny_instruct_en": "gemma_tiny_en, taught to define words by tuning and REINFORCE; its weights are bundled.",
}


@functools.cache
def known_presets():
    """All presets known by name.

    Returns:
        A dict from name to a dict of `metadata` (`description`, `params`), `kaggle_handle` where the weights can be
        downloaded, and `folder` where the package itself has the configuration, or all of a preset trained here.
    """
    folder = presets_folder()
    presets = {name: _trained_here(folder / name) for name in sorted(TRAINED_HERE) if (folder / name).is_dir()}
    for name, (description, parameters, handle, configuration) in OFFICIAL.items():
        presets[name] = {
            "metadata": {"description": description, "params": parameters, "path": "gemma"},
            "kaggle_handle": handle,
            "folder": str(folder / configuration),
        }
    return presets


def _trained_here(folder):
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    return {
        "metadata": {
            "description": TRAINED_HERE[folder.name],
            "params": metadata["parameter_count"],
            "path": "gemma",
        },
        "folder": str(folder),
    }


def presets_folder():
    """Where the bundled presets are: inside the installed package, or beside it in a checkout."""
    package = pathlib.Path(str(importlib.resources.files("keras_gemma")))
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "presets"
