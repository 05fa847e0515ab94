"""Functional models whose packed-sequence inputs may be left out of the input dictionary."""

OPTIONAL_INPUTS = ("segment_ids", "positions")


def with_optional_inputs(inputs):
    """Adds a `None` for every packed-sequence input that a dictionary lacks; passes anything else through.

    Keras lets an input be `None` but wants its key.
    """
    if not isinstance(inputs, dict):
        return inputs
    return {**dict.fromkeys(OPTIONAL_INPUTS), **inputs}
