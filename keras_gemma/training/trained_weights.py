"""Which weights train, and whether optimizer and compiled functions were made for them."""

from keras_gemma.training.step import takes_new_value

# What is left to train where all kernels are quantised.
FLOATING_ANYWAY = ("/scale", "token_embedding/embeddings")
CALL_COMPILE_AGAIN = "call `compile` again"


def refuse_what_does_not_train(model):
    """Raises a `ValueError` where `fit` would run and learn nothing, or the wrong weights.

    Args:
        model: a compiled `keras.Model`.
    """
    trained = [variable for variable in model.trainable_variables if not takes_new_value(variable)]
    if not trained:
        raise ValueError(
            "`fit` trains the weights whose `trainable` is True. Received: a model whose weights are all frozen. "
            f"Set `trainable`, or `backbone.enable_lora(rank)` for adapters, and {CALL_COMPILE_AGAIN}."
        )
    modes = {layer.quantization_mode for layer in model._flatten_layers()} - {None, "float8"}
    if modes and all(variable.path.endswith(FLOATING_ANYWAY) for variable in trained):
        raise ValueError(
            f"Quantised weights do not train. Received: a model in {', '.join(sorted(modes))} without adapters. "
            f"Adapters of int8 and int4 weights learn: `backbone.enable_lora(rank)`; then {CALL_COMPILE_AGAIN}."
        )
    refuse_other_weights_than_compiled(model)


def refuse_other_weights_than_compiled(model):
    """Raises a `ValueError` where the optimizer keeps its state for other weights than those that train now."""
    # What `LossScaleOptimizer` wraps is built with the same weights.
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if optimizer is None or not optimizer.built:
        return
    known = [id(variable) for variable in optimizer._trainable_variables]
    if known != [id(variable) for variable in model.trainable_variables]:
        raise ValueError(
            "Other weights train now than when the optimizer began: adapters, `trainable` or a quantisation have "
            f"changed since. For an optimizer of the weights that train now, {CALL_COMPILE_AGAIN}."
        )


def made_for_another_structure(model, function):
    """Whether a compiled function of a model was made for other weights than it has now; notes those it has.

    Keras makes `train_function`, `test_function` and `predict_function` once and takes it for granted that the same
    weights train in the same places ever after.

    Args:
        model: a `keras.Model`.
        function: string, one of these names.
    """
    structures = model.__dict__.setdefault("_structures_compiled", {})
    now = _structure(model)
    before = structures.get(function, now)
    structures[function] = now
    return before != now


def _structure(model):
    variables = tuple((id(variable), variable.path, variable.trainable) for variable in model.variables)
    return variables, tuple(getattr(layer, "lora_alpha", None) for layer in model._flatten_layers())
