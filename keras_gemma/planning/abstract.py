"""A model, its optimizer and a batch as shapes with layouts: nothing is allocated, whatever their size."""

import keras

from keras_gemma import kernels
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM


def model_without_memory(preset, optimizer=None, accumulate=1, lora_rank=None, **backbone_arguments):
    """A `GemmaCausalLM` whose variables have shapes and paths and no values.

    Args:
        preset: string, as of `from_preset`.
        optimizer: callable without arguments to a `keras.optimizers.Optimizer`. `None` for a model that is not
            compiled to train.
        accumulate: int, as `gradient_accumulation_steps` of `GemmaCausalLM.compile`.
        lora_rank: optional int. Adapters of this rank are what is trained, and nothing else.
        **backbone_arguments: `dtype`, `recompute` and others of `GemmaBackbone`.

    Returns:
        A `GemmaCausalLM`. It can be traced through its stateless methods, and nothing else.
    """

    def build():
        model = GemmaCausalLM(GemmaBackbone.from_preset(preset, load_weights=False, **backbone_arguments))
        if lora_rank is not None:
            model.backbone.enable_lora(lora_rank)
        if optimizer is not None:
            model.compile(optimizer=optimizer(), gradient_accumulation_steps=accumulate)
            model.optimizer.build(model.trainable_variables)
        return model

    return without_memory(build)


def without_memory(build):
    """The model that `build()` makes, with variables that have no values."""
    import jax

    made = []
    # Traced, initial values are symbols.
    jax.eval_shape(lambda: made.append(build()))
    return made[0]


def state_of(model):
    """What a training step takes and gives, as lists of `jax.ShapeDtypeStruct`.

    Returns:
        A tuple: trainable variables, others, those of the optimizer, those of metrics.
    """
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    return tuple([_shape_of(variable) for variable in group] for group in groups)


def batch_of(rows, length):
    """A batch of token ids, targets and weights, as `jax.ShapeDtypeStruct`s `[rows, length]`."""
    token_ids, mask, targets, weights = (
        of_batch((rows, length), dtype) for dtype in ("int32", "int32", "int32", "float32")
    )
    return {"token_ids": token_ids, "padding_mask": mask}, targets, weights


def weights_of(network):
    """What `LayerNetwork.weights` gives, as `jax.ShapeDtypeStruct`s."""

    def of_layers(layers):
        return [[_shape_of(variable) for variable in layer.variables] for layer in layers]

    return {"blocks": of_layers(network.layers), "ends": of_layers(network.ends_layers)}


def cache_of(backbone, rows, columns):
    """A cache as of `keras_gemma.generation.cache`, as `jax.ShapeDtypeStruct`s."""
    shape = (rows, backbone.num_key_value_heads, columns, backbone.head_dim)
    columns = of_batch(shape, backbone.compute_dtype, kernels.sharding_of_cache(shape))
    layers = tuple((columns, columns) for _ in backbone.transformer_layers)
    return {"layers": layers, "first_column": of_batch((rows,))}


def of_batch(shape, dtype="int32", sharding=None):
    """A tensor with the batch first, laid out as `keras.distribution` lays out data, unless said otherwise."""
    import jax

    layout = keras.distribution.distribution().get_data_layout(shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or layout.backend_layout)


def everywhere(shape, dtype="int32"):
    """A tensor that every device has."""
    import jax

    layout = keras.distribution.TensorLayout((None,) * len(shape), keras.distribution.distribution().device_mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.backend_layout)


def shardings_of(shapes):
    import jax

    return jax.tree.map(lambda shape: shape.sharding, shapes)


def bytes_on_a_device(shapes):
    """Bytes of a tree of `jax.ShapeDtypeStruct`s that one device holds."""
    import math

    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
    )


def _shape_of(variable):
    import jax

    layout = keras.distribution.distribution().get_variable_layout(variable)
    return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=layout.backend_layout)
