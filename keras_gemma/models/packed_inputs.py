"""Packed rows: inputs that a functional model does not list, and so need not be given to a model built upon one."""

PACKED_INPUTS = ("segment_ids", "positions")


def without_absent(inputs):
    """Drops packed inputs that are `None` from an input dictionary; passes anything else through."""
    if not isinstance(inputs, dict):
        return inputs
    return {name: value for name, value in inputs.items() if value is not None or name not in PACKED_INPUTS}


def is_packed(inputs):
    """Whether an input dictionary describes packed rows."""
    return isinstance(inputs, dict) and any(inputs.get(name) is not None for name in PACKED_INPUTS)
