"""Which layers of a backbone have LoRA adapters (Hu et al., arXiv 2106.09685): given, taken away, merged.

A layer keeps its kernel and two factors beside it, whose product times `alpha / rank` is added to what the kernel does.
"""

import numbers

from keras import ops

# Keras' layers keep quantised weights of these kinds without a place for adapters.
WITHOUT_ADAPTERS = ("float8", "gptq", "awq")


def adaptable_layers(backbone):
    """The layers of a backbone that can have adapters, by path, in an order of their own.

    Returns:
        A dict such as `{"token_embedding": layer, "decoder_block_0/attention/query": layer, …}`.
    """
    return {
        layer.path: layer for layer in backbone._flatten_layers(include_self=False) if hasattr(layer, "enable_lora")
    }


def adapted_layers(backbone):
    """Those of `adaptable_layers` that have adapters."""
    return {path: layer for path, layer in adaptable_layers(backbone).items() if layer.lora_enabled}


def refuse_adapters(backbone, rank, target_layer_names):
    """Raises a `ValueError` for adapters that a backbone cannot have, before anything is frozen."""
    layers = adaptable_layers(backbone)
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise ValueError(f"`rank` is an int of at least 1. Received: rank={rank!r}")
    names = list(dict.fromkeys(layer.name for layer in layers.values()))
    if isinstance(target_layer_names, str) or not target_layer_names or not set(target_layer_names) <= set(names):
        raise ValueError(
            f"`target_layer_names` is a list of some of {', '.join(map(repr, names))}. Received: {target_layer_names!r}"
        )
    if adapted_layers(backbone):
        raise ValueError(
            "Adapters are given to a backbone without. Received: one after `enable_lora`. `disable_lora()` takes them "
            "away, `merge_lora()` adds them to the weights."
        )
    targets = [layer for layer in layers.values() if layer.name in target_layer_names]
    if modes := sorted({layer.quantization_mode for layer in targets} & set(WITHOUT_ADAPTERS)):
        raise ValueError(
            f"Weights in float32, bfloat16, float16, int8 and int4 take adapters. Received: {', '.join(modes)} weights"
        )


def refuse_without_adapters(backbone):
    """Raises a `ValueError` for a backbone without adapters."""
    if not adapted_layers(backbone):
        raise ValueError("A backbone has adapters after `enable_lora`. Received: one without")


def enable(backbone, rank, target_layer_names, lora_alpha=None):
    """Freezes a backbone and gives adapters to its layers of some names."""
    backbone.trainable = True
    layers = backbone._flatten_layers(include_self=False)
    for layer in layers:
        layer.trainable = False
    for layer in adaptable_layers(backbone).values():
        if layer.name in target_layer_names:
            layer.trainable = True
            layer.enable_lora(rank, lora_alpha=lora_alpha)
    # Where keras-hub looks them up.
    with_weights = [layer for layer in layers if layer.weights]
    backbone._lora_enabled_layers = [i for i, layer in enumerate(with_weights) if getattr(layer, "lora_enabled", False)]
    backbone._lora_rank = rank


def disable(backbone):
    """Takes the adapters of a backbone away; all of its weights that can train do so again."""
    for layer in adapted_layers(backbone).values():
        _without_factors(layer)
    backbone.trainable = True
    backbone._lora_enabled_layers = []
    backbone._lora_rank = None


def merge(backbone):
    """Adds to the weights of a backbone what its adapters add, and takes these away."""
    for layer in adapted_layers(backbone).values():
        merged = _merged(layer)
        _without_factors(layer)
        for variable, value in merged:
            variable.assign(ops.cast(value, variable.dtype))
    disable(backbone)


def load(backbone, adapters):
    """Gives a backbone the `checkpoints.lora_files.Adapters` of a file.

    Raises:
        ValueError: for a backbone with adapters of another rank or of other layers; nothing is changed then.
    """
    layers, present = adaptable_layers(backbone), adapted_layers(backbone)
    names = sorted({layers[path].name for path in adapters.factors})
    if not present:
        refuse_adapters(backbone, adapters.rank, names)
        enable(backbone, adapters.rank, names)
    elif set(present) != set(adapters.factors) or {layer.lora_rank for layer in present.values()} != {adapters.rank}:
        raise ValueError(
            f"The file has adapters of rank {adapters.rank} for {', '.join(names)}. Received: a backbone with such of "
            f"rank {next(iter(present.values())).lora_rank} for {', '.join(sorted({x.name for x in present.values()}))}"
            ". `disable_lora()` takes those away, `merge_lora()` adds them to the weights."
        )
    for path, pair in adapters.factors.items():
        layers[path].lora_alpha = adapters.alpha
        for variable, array in zip(factors_of(layers[path]).values(), pair):
            variable.assign(array)


def factors_of(layer):
    """Names and variables of both factors of a layer with adapters."""
    kept = "embeddings" if hasattr(layer, "lora_embeddings_a") else "kernel"
    return {f"lora_{kept}_{factor}": getattr(layer, f"lora_{kept}_{factor}") for factor in "ab"}


def _merged(layer):
    """The variables that change when adapters become part of a layer's weights, with their new values."""
    kept = "embeddings" if hasattr(layer, "lora_embeddings_a") else "kernel"
    weight = getattr(layer, f"_{kept}")
    if layer.quantization_mode is None:
        # Not as Keras does for files: it rounds the sum to the dtype that the layer computes in.
        first, second = (ops.cast(factor, "float32") for factor in factors_of(layer).values())
        added = (layer.lora_alpha / layer.lora_rank) * ops.matmul(first, second)
        return [(weight, ops.cast(weight, "float32") + added)]
    values = getattr(layer, f"_get_{kept}_with_merged_lora")()
    variables = weight, *(getattr(layer, f"{kept}_{name}", None) for name in ("scale", "zero"))
    return [(variable, value) for variable, value in zip(variables, values) if value is not None]


def _without_factors(layer):
    layer._tracker.unlock()
    for name, variable in factors_of(layer).items():
        # Not `del`, with which Keras collects garbage each time.
        layer._untrack_variable(variable)
        layer.__dict__.pop(name)
    layer._tracker.lock()
    layer.lora_enabled = False
    layer.lora_rank = layer.lora_alpha = None
