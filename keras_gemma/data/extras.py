"""Packages of extras, imported when they are used."""

import importlib


def required(module, extra="train"):
    """The imported `module` of an extra.

    Raises:
        ImportError: where it is missing, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module} is missing ({error}). Install it with: pip install "keras_gemma[{extra}]"'
        ) from error
