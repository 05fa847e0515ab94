"""What the settings of a model may be, checked before anything is built from them."""

import math
import numbers

# Far beyond every model, and little enough that a nonsense number fills no memory and takes no time.
MOST_LAYERS = 1000
LARGEST_SIZE = 2**31 - 1
SIZES = ("vocabulary_size", "num_query_heads", "num_key_value_heads", "hidden_dim", "intermediate_dim", "head_dim")


def check_backbone(settings):
    """Checks the settings of a Gemma backbone.

    Args:
        settings: dict of values by the names of `GemmaBackbone`. Names that are not there are not checked.

    Raises:
        ValueError: for a value that no model can have, naming it.
    """
    for name in SIZES:
        if name in settings:
            check_size(name, settings[name])
    if "num_layers" in settings:
        check_size("num_layers", settings["num_layers"], MOST_LAYERS)
    if "sliding_window_size" in settings:
        check_size("sliding_window_size", settings["sliding_window_size"])
    check_number(settings, "layer_norm_epsilon", "a number above 0", lambda value: value > 0)
    check_number(settings, "dropout", "a number from 0 to less than 1", lambda value: 0 <= value < 1)
    heads, kv_heads = settings.get("num_query_heads", 0), settings.get("num_key_value_heads", 1)
    if heads % kv_heads:
        raise ValueError(
            "`num_key_value_heads` must divide `num_query_heads`. "
            f"Received: num_query_heads={heads}, num_key_value_heads={kv_heads}"
        )
    if settings.get("head_dim", 0) % 2:
        raise ValueError(
            f"Rotary embedding rotates pairs, so `head_dim` must be even. Received: {settings['head_dim']}"
        )
    if settings.get("intermediate_dim", 0) % 2:
        raise ValueError(
            "`intermediate_dim` counts both branches of the GeGLU and must be even. "
            f"Received: {settings['intermediate_dim']}"
        )


def check_size(name, value, largest=LARGEST_SIZE):
    """Refuses what is no whole number from 1 to the largest, naming it."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not 1 <= value <= largest:
        raise ValueError(f"`{name}` is a whole number from 1 to {largest:,}. Received: {shown(value)}")


def check_number(settings, name, valid, is_valid):
    """Refuses what is no finite number, or one that a callable refuses; `valid` says what is valid."""
    if name not in settings:
        return
    value = settings[name]
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not is_valid(value):
        raise ValueError(f"`{name}` is {valid}. Received: {shown(value)}")


def check_preprocessor(sequence_length, **switches):
    """Refuses a length of rows that is no positive whole number, and switches that are neither `True` nor `False`."""
    check_size("sequence_length", sequence_length)
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` is True or False. Received: {shown(value)}")


def shown(value):
    """A value for a message."""
    return repr(value)[:100]
