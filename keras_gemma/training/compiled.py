"""Whether a model is ready for what Keras' trainer does with it."""


def refuse_uncompiled(model, method):
    """Raises a `ValueError` for a model that was made with `compile=False` and never compiled."""
    if not model.compiled:
        raise ValueError(
            f"`{method}` needs an optimizer and a loss, and this model has none: call `compile()` first. "
            f"Received: a {type(model).__name__} that was made with `compile=False`"
        )
