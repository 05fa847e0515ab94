"""What `model.export` has to be told of a model whose inputs share their sizes."""

from keras_gemma.kernels.platform import on_jax


def export_arguments(inputs, format, input_signature, arguments):
    """Arguments of Keras' `export`, by which all inputs `[B, T]` have one batch size and one length.

    On JAX Keras would give each input a length of its own, and no model can compare two lengths that are not known.

    Args:
        inputs: dict of a model's inputs.
        format, input_signature: as of `keras.Model.export`.
        arguments: dict of further arguments.
    """
    if not on_jax() or format != "tf_saved_model" or input_signature is not None:
        return arguments
    shapes = {"polymorphic_shapes": [dict.fromkeys(inputs, "(batch, length)")]}
    return {**arguments, "jax2tf_kwargs": {**shapes, **(arguments.get("jax2tf_kwargs") or {})}}
