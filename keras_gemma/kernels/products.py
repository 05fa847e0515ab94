"""Products whose result is float32 whatever the operands are."""

import keras
from keras import ops


def einsum_float32(equation, left, right):
    """Einsum accumulated and returned in float32.

    On JAX the operands keep their dtype and the matrix unit accumulates in float32; elsewhere they are
    converted first, which gives the same numbers with more memory traffic.

    Args:
        equation: string. An einsum equation of two operands.
        left: floating tensor.
        right: floating tensor.

    Returns:
        A float32 tensor.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.kernels import einsum_float32
    >>> ones = np.ones((2, 3), "float32")
    >>> np.asarray(einsum_float32("td,vd->tv", ones, ones)).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    if keras.backend.backend() == "jax":
        import jax.numpy as jnp

        return jnp.einsum(equation, left, right, preferred_element_type="float32")
    return ops.einsum(equation, ops.cast(left, "float32"), ops.cast(right, "float32"))
