"""Matrix products: float32 results under every dtype, and the forms that a CPU computes fast."""

from keras import ops

from keras_gemma.kernels.platform import on_jax
from keras_gemma.kernels.platform import on_jax_cpu

# XLA's library for CPUs packs the right operand of a product at every call. Up to so many rows of activations it
# is cheaper to let them be the right operand instead of the weight.
FEW_ROWS = 64
# About so many rows of activations stay in the cache between the products of a feed-forward.
ROWS_IN_CACHE = 256


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
    if on_jax():
        import jax.numpy as jnp

        return jnp.einsum(equation, left, right, preferred_element_type="float32")
    return ops.einsum(equation, ops.cast(left, "float32"), ops.cast(right, "float32"))


def prefers_packed_weights():
    """Whether `project` on rearranged weights is faster here than a layer's own product."""
    return on_jax_cpu()


def project(x, weight):
    """Multiplies every row of `x` with a weight whose rows are the outputs.

    Args:
        x: float tensor `[..., D]`.
        weight: float tensor `[F, D]`.

    Returns:
        A tensor `[..., F]`.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.kernels import project
    >>> np.asarray(project(np.ones((1, 2), "float32"), np.array([[1.0, 2.0], [3.0, 4.0]], "float32"))).tolist()
    [[3.0, 7.0]]
    """
    rows = ops.reshape(x, (-1, ops.shape(x)[-1]))
    few = on_jax_cpu() and rows.shape[0] <= FEW_ROWS
    product = _weight_first(rows, weight) if few else ops.matmul(rows, ops.transpose(weight))
    return ops.reshape(product, (*ops.shape(x)[:-1], ops.shape(weight)[0]))


def _weight_first(rows, weight):
    from jax import lax

    product = lax.dot_general(weight, rows, (((1,), (1,)), ((), ())))
    # Without the barriers XLA turns the product round again to save the transposition, and what comes next goes through
    # it column by column.
    return lax.optimization_barrier(lax.optimization_barrier(product).T)


def in_row_chunks(function, *tensors):
    """Applies `function`, which treats every row alike, to chunks of rows whose temporaries fit into a CPU's cache.

    Args:
        function: callable of as many tensors `[R, ...]` as are given to one tensor `[R, F]`.
        *tensors: tensors `[B, T, ...]`.

    Returns:
        A tensor `[B, T, F]`.
    """
    batch, length = ops.shape(tensors[0])[:2]
    rows = batch * length
    tensors = [ops.reshape(x, (rows, *ops.shape(x)[2:])) for x in tensors]
    chunks = -(-rows // ROWS_IN_CACHE) if on_jax_cpu() else 1
    if chunks == 1:
        result = function(*tensors)
    else:
        result = _mapped(function, tensors, chunks, -(-rows // chunks))[:rows]
    return ops.reshape(result, (batch, length, ops.shape(result)[-1]))


def _mapped(function, tensors, chunks, chunk):
    from jax import lax

    missing = chunks * chunk - tensors[0].shape[0]
    padded = [ops.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in tensors]
    result = lax.map(lambda xs: function(*xs), tuple(x.reshape(chunks, chunk, *x.shape[1:]) for x in padded))
    return result.reshape(chunks * chunk, -1)
