"""Root mean square normalisation, with a backward pass that keeps nothing but its input where memory is slow."""

import functools

from keras import ops

from keras_gemma.kernels.platform import has_all_tokens
from keras_gemma.kernels.platform import on_jax_cpu


def rms_normalize(x, scale, epsilon):
    """`x / sqrt(mean(x², axis=-1) + epsilon) * scale` (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: float32 tensor `[..., D]`.
        scale: float32 tensor `[D]`.
        epsilon: float.

    Returns:
        A float32 tensor `[..., D]`.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.kernels import rms_normalize
    >>> normalized = rms_normalize(np.array([[3.0, 4.0]], "float32"), np.ones(2, "float32"), 0.0)
    >>> [round(float(value), 3) for value in normalized[0]]
    [0.849, 1.131]
    """
    if on_jax_cpu() and has_all_tokens():
        return _jax_rms_normalize()(ops.convert_to_tensor(x), ops.convert_to_tensor(scale), epsilon)
    return x * _reciprocal(x, epsilon) * scale


def _reciprocal(x, epsilon):
    return ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + epsilon)


@functools.cache
def _jax_rms_normalize():
    import jax

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def normalize(x, scale, epsilon):
        return x * _reciprocal(x, epsilon) * scale

    def forward(x, scale, epsilon):
        return normalize(x, scale, epsilon), (x, scale)

    def backward(epsilon, saved, of_result):
        x, scale = saved
        # XLA would keep the normalised input from the forward pass till now; it cannot know that this adds zero.
        x = x + 0.0 * of_result[(0,) * of_result.ndim]
        reciprocal = _reciprocal(x, epsilon)
        normalized, of_normalized = x * reciprocal, of_result * scale
        along = ops.mean(of_normalized * normalized, axis=-1, keepdims=True)
        of_scale = ops.sum(of_result * normalized, axis=tuple(range(x.ndim - 1)))
        return reciprocal * (of_normalized - normalized * along), of_scale

    normalize.defvjp(forward, backward)
    return normalize
