"""What `keras.models.clone_model` needs of a task: it goes through the graph of a model and calls clones of its layers.

The clone is a plain Keras model with the layers, settings and training of the task, as it is of keras-hub's tasks.
"""

IS_BEING_CLONED = "_is_being_cloned"


def tied(model, operation_fn):
    """`operation_fn` of Keras' way through the graph of a task, with one clone of the embedding.

    Keras clones what stands in the graph one by one: the backbone, and its embedding once more for the logits.

    Args:
        model: a task on a `GemmaBackbone`.
        operation_fn: callable from a layer to its clone, or to what calls the layer.
    """
    clones = {}

    def operation_of(operation):
        if operation is model.backbone.token_embedding and clones:
            return clones["backbone"].token_embedding
        result = operation_fn(operation)
        if operation is model.backbone and result is not operation and isinstance(result, type(operation)):
            clones["backbone"] = result
            vars(model)[IS_BEING_CLONED] = True
        return result

    return operation_of


def with_own_arguments(model, config, **own):
    """A configuration of `compile` with arguments that only this task knows, or without where a clone asks for it."""
    return config if vars(model).pop(IS_BEING_CLONED, False) else {**config, **own}
