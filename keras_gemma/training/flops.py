"""Floating point operations: what a model needs for a token, and what a device can do in a second."""

import keras

# Dense bfloat16 FLOP/s of one device as its vendor states it, by how its name begins; the longest beginning counts.
# TPU: cloud.google.com/tpu/docs, a chip; one core of the two that JAX counts apart on TPU7x.
# NVIDIA: data sheets of the tensor core GPUs, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def training_flops_per_token(config, sequence_length, causal=False, trainable_share=1.0):
    """Operations that forward and backward pass of a `GemmaBackbone` and its tied output take for one token.

    Counted are the products with matrices, two operations for each weight and pass: the blocks' kernels and the
    embedding once, as the output projection (to look a token up takes none). The backward pass repeats each product
    for its input and for its weights. Attention adds scores and weighted values, `2 · 2 · T · N · H` a layer forward
    and twice that backward. This is appendix B of PaLM (Chowdhery et al., arXiv 2204.02311), 6 operations a parameter
    and `12 · L · N · H · T` for attention over all `T` positions; what is computed twice to save memory does not
    count, so the quotient of this and the time taken is the *model's* utilization, not the hardware's.

    Args:
        config: dict, of `GemmaBackbone.get_config`.
        sequence_length: int, `T`. Positions in a row.
        causal: bool. Counts the `(T + 1) / 2` positions that a token sees on average, in place of PaLM's `T`.
        trainable_share: float. The share of weights that receive a gradient; with LoRA nearly 0, which saves the
            products for the weights.

    Returns:
        A float.

    Example:

    >>> from keras_gemma.training import training_flops_per_token
    >>> gemma_2b = {
    ...     "vocabulary_size": 256_000, "num_layers": 18, "num_query_heads": 8, "num_key_value_heads": 1,
    ...     "hidden_dim": 2048, "intermediate_dim": 32_768, "head_dim": 256,
    ... }
    >>> f"{training_flops_per_token(gemma_2b, sequence_length=8192):.3g}"
    '1.87e+10'
    """
    seen = (sequence_length + 1) / 2 if causal else sequence_length
    products = 2 * (_block_parameters(config) + _output_parameters(config))
    return products * (2 + trainable_share) + _attention_flops(config, seen) * 3


def forward_flops_per_token(config, positions_seen, logits=True):
    """Operations that the forward pass takes for one token. See `training_flops_per_token`.

    Args:
        config: dict, of `GemmaBackbone.get_config`.
        positions_seen: float. Positions that the token attends to, itself included.
        logits: bool. Whether its logits are wanted.

    Returns:
        A float.
    """
    parameters = _block_parameters(config) + (_output_parameters(config) if logits else 0)
    return 2 * parameters + _attention_flops(config, positions_seen)


def _attention_flops(config, seen):
    return 2 * 2 * seen * config["num_query_heads"] * config["head_dim"] * config["num_layers"]


def _output_parameters(config):
    return config["vocabulary_size"] * config["hidden_dim"]


def _block_parameters(config):
    heads = 2 * config["num_query_heads"] + 2 * config["num_key_value_heads"]
    attention = heads * config["head_dim"] * config["hidden_dim"]
    # `intermediate_dim` counts both branches of the GeGLU.
    feed_forward = config["intermediate_dim"] * config["hidden_dim"] * 3 // 2
    return config["num_layers"] * (attention + feed_forward)


def peak_flops(kind=None):
    """Peak bfloat16 FLOP/s of one device.

    Args:
        kind: name of the device, as JAX and CUDA have it. By default that of the first one here.

    Returns:
        A float, or `None` for a device whose peak is not known (any CPU, and slices of a GPU).
    """
    kind = device_kind() if kind is None else kind
    if "MIG" in kind:
        return None
    beginnings = [name for name in PEAK_FLOPS if kind == name or kind.startswith((f"{name} ", f"{name}-"))]
    return PEAK_FLOPS[max(beginnings, key=len)] if beginnings else None


def device_kind():
    """Name of the first device that the backend computes on, such as `"TPU v4"` or `"NVIDIA H200"`."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.devices()[0].device_kind
    if backend == "torch":
        import torch

        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "") if gpus else "cpu"


def device_count():
    """Number of devices that share the work: those of the current `keras.distribution`, otherwise one."""
    distribution = keras.distribution.distribution()
    return distribution.device_mesh.devices.size if distribution else 1
