"""What a model is, in the line that Python prints of it."""

import math

import keras


def described(model, backbone):
    """Parameters, dtype, backend, adapters and quantization of a model.

    Args:
        model: a Keras model.
        backbone: its `GemmaBackbone`.

    Returns:
        A string such as `<GemmaCausalLM gemma_causal_lm: 4.7M parameters, float32, jax, LoRA of rank 4>`.
    """
    parts = [f"{readable_count(_size(model.weights))} parameters", *_dtype_of(backbone), keras.backend.backend()]
    rank = getattr(backbone, "_lora_rank", None)
    if rank and any(getattr(layer, "lora_enabled", False) for layer in backbone._flatten_layers()):
        trainable = readable_count(_size(model.trainable_weights))
        parts.append(f"LoRA of rank {rank} ({trainable} trainable)")
    return f"<{type(model).__name__} {model.name}: {', '.join(parts)}>"


def readable_count(parameters):
    """A number of parameters as people say it.

    Example:

    >>> from keras_gemma.models.description import readable_count
    >>> [readable_count(n) for n in (512, 12_288, 4_700_000, 2_506_172_416)]
    ['512', '12.3K', '4.7M', '2.5B']
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= size:
            return f"{parameters / size:.1f}{letter}"
    return str(parameters)


def _dtype_of(backbone):
    """The dtype policy of the embeddings and blocks, and how they are quantized."""
    blocks = backbone.transformer_layers
    layers = [backbone.token_embedding, *(layer for block in blocks[:1] for layer in block._flatten_layers())]
    modes = dict.fromkeys(mode for layer in layers if (mode := getattr(layer, "quantization_mode", None)))
    policy = backbone.dtype_policy
    name = getattr(policy, "name", str(policy))
    return [name.rpartition("_from_")[2] if "_from_" in name else name, *(f"quantized to {mode}" for mode in modes)]


def _size(weights):
    return sum(math.prod(weight.shape) for weight in weights)
