"""The GeGLU feed-forward in training, with a backward pass of its own where the one of JAX is slow."""

import functools
import math

from keras import ops

from keras_gemma.kernels import platform
from keras_gemma.kernels.platform import has_all_tokens
from keras_gemma.kernels.platform import on_jax_cpu

# Of GELU's approximation by a hyperbolic tangent (Hendrycks and Gimpel, arXiv 1606.08415, section 2).
ROOT = math.sqrt(2.0 / math.pi)
CUBIC = 0.044715


def prefers_own_geglu(x):
    """Whether training on tensors like `x` is faster here through `geglu` than through a layer for each product."""
    return on_jax_cpu() and str(x.dtype) == "float32" and has_all_tokens()


def geglu(x, gating, gating_2, linear):
    """`(gelu(x · gating) * (x · gating_2)) · linear`, with a backward pass of its own (JAX).

    XLA for CPUs computes `xᵀ · y` a third slower than a product whose left operand has been transposed before, which
    the gradients of the weights are here. Of the two branches, the backward pass computes the gate once more where it
    is larger than `KEPT_BYTES_ON_CPU`. GELU is the approximation by a hyperbolic tangent.

    Args:
        x: float tensor `[B, T, D]`.
        gating: float tensor `[D, F]`.
        gating_2: float tensor `[D, F]`.
        linear: float tensor `[F, D]`.

    Returns:
        A tensor `[B, T, D]`.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.kernels.feed_forward import geglu
    >>> ones = np.ones((2, 2), "float32")
    >>> round(float(geglu(ones[None], ones, ones, ones)[0, 0, 0]), 3)
    7.818
    """
    x, gating, gating_2, linear = (ops.convert_to_tensor(tensor) for tensor in (x, gating, gating_2, linear))
    rows = ops.reshape(x, (-1, x.shape[-1]))
    return ops.reshape(_jax_geglu()(rows, gating, gating_2, linear), x.shape)


@functools.cache
def _jax_geglu():
    """Function of `rows` `[R, D]` and the three weights."""
    import jax
    from jax import lax

    def after(earlier, x):
        # What is added is zero, but XLA cannot know that before `earlier` is there.
        return x + 0.0 * earlier[0, 0]

    def transposed(x):
        # Without the barrier XLA makes one product of a product and the transposition of an operand.
        return lax.optimization_barrier(x.T)

    @jax.custom_vjp
    def geglu(rows, gating, gating_2, linear):
        return forward(rows, gating, gating_2, linear)[0]

    def forward(rows, gating, gating_2, linear):
        gate, up = rows @ gating, rows @ gating_2
        kept = gate if gate.size * gate.dtype.itemsize <= platform.KEPT_BYTES_ON_CPU else None
        return (gate * _share(gate) * up) @ linear, (rows, gating, gating_2, linear, kept, up)

    def backward(saved, of_result):
        rows, gating, gating_2, linear, kept, up = saved
        # XLA would find the gate in the forward pass, and keep it.
        gate = after(of_result, rows) @ gating if kept is None else after(of_result, kept)
        up = after(of_result, up)
        share = _share(gate)
        of_gated = of_result @ linear.T
        of_gate = of_gated * up * (share + gate * _slope_of_share(gate))
        of_up = of_gated * (gate * share)
        of_rows = of_gate @ gating.T + of_up @ gating_2.T
        # An optimizer may write to a weight when its gradient is there. XLA copies the weight for those that may come
        # later, and here nobody does.
        rows, of_result = transposed(after(of_rows, rows)), transposed(after(of_rows, of_result))
        of_linear = transposed(of_result @ (gate * share * up))
        return of_rows, rows @ of_gate, rows @ of_up, of_linear

    geglu.defvjp(forward, backward)
    return geglu


def _share(x):
    """What GELU lets through of `x`."""
    return 0.5 * (1.0 + ops.tanh(ROOT * (x + CUBIC * x * x * x)))


def _slope_of_share(x):
    tanh = ops.tanh(ROOT * (x + CUBIC * x * x * x))
    return 0.5 * (1.0 - tanh * tanh) * ROOT * (1.0 + 3.0 * CUBIC * x * x)
