"""Tokens with weight before those without, so that work on a chunk of tokens can end where the weights do (JAX)."""

import math
from typing import Any
from typing import NamedTuple

from keras_gemma.kernels.platform import has_all_tokens
from keras_gemma.kernels.platform import is_for_any_batch
from keras_gemma.kernels.platform import jax_platform

# Of fewer chunks hardly one is left out, and on a CPU a loop of known length was faster by a tenth.
FEWEST_CHUNKS = 4


def skips_tokens(chunks):
    """Whether of so many chunks those of tokens without weight are left out.

    Devices that share tokens would have different numbers of chunks and wait for each other. A TPU runs the program
    that was planned for it.
    """
    return chunks >= FEWEST_CHUNKS and has_all_tokens() and jax_platform() != "tpu" and not is_for_any_batch()


class Order(NamedTuple):
    """An order of the tokens of a batch.

    Attributes:
        order: int tensor `[B * T]`, where each token comes from.
        places: int tensor `[B * T]`, where each token goes.
        shape: `(B, T)`.
    """

    order: Any
    places: Any
    shape: Any

    def one_row(self, x):
        """`[B, T, …]` → `[1, B * T, …]` in this order."""
        return _permuted(x.reshape(-1, *x.shape[2:]), self.order, self.places)[None]

    def back(self, x):
        """`[B * T]` in this order → `[B, T]`."""
        return x[self.places].reshape(self.shape)


def weighted_first(weights):
    """The `Order` in which tokens with weight come first, for the rest as they are.

    Args:
        weights: tensor `[B, T]`.
    """
    import jax.numpy as jnp

    order = jnp.argsort(weights.reshape(-1) == 0, stable=True)
    return Order(order, jnp.argsort(order), weights.shape)


def over_chunks(function, start, chunks, skips):
    """`jax.lax.scan`, which ends with the last chunk that has weights.

    Args:
        function: callable `(carry, chunk) → (carry, outputs)`.
        start: the first carry.
        chunks: tuple of tensors `[C, …]`, the last of which is weights, in the order of `weighted_first`.
        skips: bool. Otherwise no chunk is left out.

    Returns:
        The last carry, and outputs `[C, …]`, 0 for chunks that were left out.
    """
    import jax
    import jax.numpy as jnp
    from jax import lax

    if not skips:
        return lax.scan(function, start, chunks)

    def step(index, state):
        carry, outputs = state
        carry, new = function(carry, jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, False), chunks))
        return carry, jax.tree.map(lambda x, one: lax.dynamic_update_index_in_dim(x, one, index, 0), outputs, new)

    weights = chunks[-1]
    first = jax.tree.map(lambda x: x[0], chunks)
    shapes = jax.eval_shape(function, start, first)[1]
    outputs = jax.tree.map(lambda x: jnp.zeros((len(weights), *x.shape), x.dtype), shapes)
    with_weight = -(-jnp.count_nonzero(weights) // math.prod(weights.shape[1:]))
    return lax.fori_loop(0, with_weight, step, (start, outputs))


def _permuted(x, order, places):
    """`x[order]`, whose gradient is gathered too: compilers for CPUs scatter row by row."""
    import jax

    @jax.custom_vjp
    def permuted(x, order, places):
        return x[order]

    permuted.defvjp(
        lambda x, order, places: (x[order], places), lambda places, gradient: (gradient[places], None, None)
    )
    return permuted(x, order, places)
