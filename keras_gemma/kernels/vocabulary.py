"""Cross-entropy over a large vocabulary, a few tokens at a time.

With 256,000 rows the logits of a batch are the largest tensor in training. They are formed here for a chunk of
tokens, turned into the loss and, on JAX, at once into its gradients, and forgotten. Where one device has all tokens,
chunks of tokens without weight, as those of prompts are in tuning, are left out (see `weighted_tokens`).
"""

import functools
import math
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_gemma.kernels.platform import has_all_tokens
from keras_gemma.kernels.platform import on_jax
from keras_gemma.kernels.platform import on_jax_cpu
from keras_gemma.kernels.platform import shards_of_batch
from keras_gemma.kernels.platform import shards_of_columns
from keras_gemma.kernels.products import einsum_float32
from keras_gemma.kernels.sharding import shardings_of_weight
from keras_gemma.kernels.weighted_tokens import over_chunks
from keras_gemma.kernels.weighted_tokens import skips_tokens
from keras_gemma.kernels.weighted_tokens import weighted_first

# Enough rows for the matrix unit to be busy, few enough for their logits to be small.
TOKENS_AT_ONCE = 2048
TOKENS_AT_ONCE_ON_CPU = 256
# Into so many the gradient of the table is cut on a CPU, if its rows divide.
PARTS_OF_TABLE = 16


class TokenSums(NamedTuple):
    """Float32 scalars, summed over the tokens of a batch with their weights.

    Attributes:
        objective: cross-entropy in nats and z-loss. The only one that has gradients.
        cross_entropy: cross-entropy in nats.
        correct: tokens that the largest logit names.
        weight: the weights themselves.
    """

    objective: Any
    cross_entropy: Any
    correct: Any
    weight: Any


def vocabulary_loss(hidden, embeddings, targets, weights, z_loss=0.0):
    """Cross-entropy of the logits `hidden · embeddingsᵀ`, without the tensor `[B, T, V]` forwards or backwards.

    Logits, softmax and sums are float32; operands of the products keep the dtype of `hidden`. On JAX the gradients
    are formed in the forward pass, while a chunk's logits are at hand, and accumulated in float32. Elsewhere the
    backward pass computes the logits of each chunk once more.

    The z-loss adds `z_loss · log²Z`, where `Z` is the sum of the exponentials of a token's logits (Chowdhery et al.,
    arXiv 2204.02311, section 5).

    Args:
        hidden: float tensor `[B, T, D]`.
        embeddings: float tensor `[V, D]`, or the `keras.Variable`, whose parts `keras.distribution` may have put on
            several devices: they are gathered once, and each device adds the gradient of its own part up.
        targets: int tensor `[B, T]`, in `[0, V)`.
        weights: float tensor `[B, T]`, 0 where a token does not count.
        z_loss: float. Coefficient of the z-loss.

    Returns:
        `TokenSums`.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.kernels import vocabulary_loss
    >>> hidden, embeddings = np.zeros((1, 3, 2), "float32"), np.zeros((4, 2), "float32")
    >>> sums = vocabulary_loss(hidden, embeddings, np.zeros((1, 3), "int32"), np.ones((1, 3), "float32"))
    >>> round(float(sums.cross_entropy), 4), float(sums.weight)
    (4.1589, 3.0)
    """
    weights = ops.cast(weights, "float32")
    shardings = shardings_of_weight(embeddings)
    hidden, embeddings, targets = (ops.convert_to_tensor(x) for x in (hidden, embeddings, targets))
    if on_jax():
        sums = jax_sums_of_tokens(*shardings, hidden, embeddings, targets, weights, z_loss)
    else:
        sums = _recomputed_sums(hidden, embeddings, targets, weights, z_loss)
    return TokenSums(*sums, ops.sum(weights))


def logits_loss(logits, targets, weights, z_loss=0.0):
    """`vocabulary_loss` of logits `[B, T, V]` that are there already."""
    weights = ops.cast(weights, "float32")
    *sums, _ = _sums_of_logits(ops.cast(logits, "float32"), targets, weights, z_loss)
    return TokenSums(*sums, ops.sum(weights))


def columns_at_once(batch, length):
    """Columns of a chunk, of each device's own: its tokens come from all rows and devices, so that all have work."""
    shards = shards_of_columns(length)
    tokens = TOKENS_AT_ONCE_ON_CPU if on_jax_cpu() else TOKENS_AT_ONCE * shards_of_batch() * shards
    columns = min(length // shards, max(1, tokens // (batch or 1) // shards))
    chunks = -(-(length // shards) // columns)
    return -(-(length // shards) // chunks)


def chunks_of_tokens(hidden, targets, weights, width):
    """`[B, T, …]` → `[chunks, B, shards * width, …]`; columns that fill the last chunk up have no weight.

    A chunk has `width` columns of every device among which columns are cut: none is sent to another.
    """
    length = hidden.shape[1]
    shards = shards_of_columns(length)
    chunks = -(-(length // shards) // width)
    missing = chunks * width - length // shards

    def split(x):
        rows, rest = x.shape[0], x.shape[2:]
        x = ops.reshape(x, (rows, shards, length // shards, *rest))
        x = ops.pad(x, [(0, 0), (0, 0), (0, missing), *[(0, 0)] * len(rest)]) if missing else x
        x = ops.moveaxis(ops.reshape(x, (rows, shards, chunks, width, *rest)), 2, 0)
        return ops.reshape(x, (chunks, rows, shards * width, *rest))

    return split(hidden), split(targets), split(weights)


def _sums_of_logits(logits, targets, weights, z_loss):
    """Sums of a chunk `[…, V]`, and its log-normalisers `[…, 1]`."""
    largest = ops.max(logits, axis=-1, keepdims=True)
    log_normaliser = ops.log(ops.sum(ops.exp(logits - largest), axis=-1, keepdims=True)) + largest
    of_target = ops.sum(ops.where(is_target(logits, targets), logits, 0.0), axis=-1)
    losses = log_normaliser[..., 0] - of_target
    cross_entropy = ops.sum(weights * losses)
    objective = cross_entropy + z_loss * ops.sum(weights * ops.square(log_normaliser[..., 0]))
    correct = ops.sum(weights * ops.cast(of_target >= largest[..., 0], "float32"))
    return objective, cross_entropy, correct, log_normaliser


def is_target(logits, targets):
    # A comparison and not a gather: it fuses, and a vocabulary cut over devices stays where it is.
    columns = ops.arange(logits.shape[-1], dtype="int32")
    return columns == ops.cast(targets, "int32")[..., None]


# === JAX: gradients in the forward pass ===


def jax_sums_of_tokens(parts, whole, hidden, embeddings, targets, weights, z_loss=0.0):
    """`objective`, `cross_entropy` and `correct` of `TokenSums`.

    Args:
        parts, whole: the shardings of the embeddings as they lie and as they are used, or twice `None`.
        hidden, embeddings, targets, weights, z_loss: tensors as of `vocabulary_loss`.
    """
    length = hidden.shape[1]
    width = length and columns_at_once(hidden.shape[0], length)
    skips = width > 0 and skips_tokens(chunks=-(-length // width))
    tokens = hidden, targets, weights
    if skips:
        tokens, width = map(weighted_first(weights).one_row, tokens), width * hidden.shape[0]
    hidden, *others = chunks_of_tokens(*tokens, width)
    objective, (cross_entropy, correct) = _jax_sums(parts, whole, skips)(hidden, embeddings, *others, z_loss)
    return objective, cross_entropy, correct


@functools.cache
def _jax_sums(parts, whole, skips=False):
    """Function of chunks `[C, B, t, …]` to the objective, with gradients, and the other two sums, without.

    With `skips`, tokens with weight come first.
    """
    import jax
    import jax.numpy as jnp
    from jax import lax

    def laid_out(x, sharding):
        return x if sharding is None else lax.with_sharding_constraint(x, sharding)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
    def sums(hidden, embeddings, targets, weights, z_loss):
        table = laid_out(embeddings.astype(hidden.dtype), whole)

        def add_chunk(totals, chunk):
            hidden, targets, weights = chunk
            *new, _ = _sums_of_logits(einsum_float32("btd,vd->btv", hidden, table), targets, weights, z_loss)
            return [total + one for total, one in zip(totals, new)], None

        start = [jnp.float32(0)] * 3
        (objective, *others), _ = over_chunks(add_chunk, start, (hidden, targets, weights), skips)
        return objective, tuple(others)

    def forward(hidden, embeddings, targets, weights, z_loss):
        into_table = embeddings.perturbed
        hidden, embeddings, targets, weights = (x.value for x in (hidden, embeddings, targets, weights))
        table = laid_out(embeddings.astype(hidden.dtype), whole)
        gradients_of = _gradients_in_cache if is_exact_in_float32(hidden) else _gradients_of_errors

        def add_chunk(carry, chunk):
            totals, of_table = carry
            new, of_hidden, add_to = gradients_of(table, *chunk, z_loss)
            of_table = laid_out(add_to(of_table), parts) if into_table else None
            return ([total + one for total, one in zip(totals, new)], of_table), of_hidden.astype(hidden.dtype)

        zeros = laid_out(jnp.zeros(table.shape, "float32"), parts) if into_table else None
        start = [jnp.float32(0)] * 3, zeros
        totals, of_hidden = over_chunks(add_chunk, start, (hidden, targets, weights), skips)
        (objective, *others), of_table = totals
        # The dtype that the gradient must have; it was accumulated in float32.
        of_table = of_table.astype(embeddings.dtype) if into_table else None
        return (objective, tuple(others)), (of_hidden, of_table)

    def backward(z_loss, gradients, cotangents):
        scale = cotangents[0]
        if isinstance(scale, jax.custom_derivatives.SymbolicZero):
            scale = 0.0
        of_hidden, of_table = (x if x is None else (x * scale).astype(x.dtype) for x in gradients)
        return of_hidden, of_table, None, None

    sums.defvjp(forward, backward, symbolic_zeros=True)
    return sums


def _gradients_of_errors(table, hidden, targets, weights, z_loss):
    """Sums of a chunk, its gradient for `hidden`, and a function that adds the one for `table` to a tensor."""
    logits = einsum_float32("btd,vd->btv", hidden, table)
    *sums, log_normaliser = _sums_of_logits(logits, targets, weights, z_loss)
    probabilities = ops.exp(logits - log_normaliser) * (1.0 + 2.0 * z_loss * log_normaliser)
    errors = weights[..., None] * (probabilities - ops.cast(is_target(logits, targets), "float32"))
    # Not before: near a probability of 1 the difference would be lost in bfloat16.
    errors = ops.cast(errors, hidden.dtype)

    def add_to(of_table):
        return of_table + einsum_float32("btv,btd->vd", errors, hidden)

    return sums, einsum_float32("btv,vd->btd", errors, table), add_to


def is_exact_in_float32(hidden):
    return on_jax_cpu() and str(hidden.dtype) == "float32" and has_all_tokens()


def _gradients_in_cache(table, hidden, targets, weights, z_loss):
    """As `_gradients_of_errors`, with fewest passes over the logits, which are what costs time on a CPU.

    The exponentials go into the products as they are, and normaliser, weight and target are dealt with in the small
    tensors on the other side.
    """
    from jax import lax

    shape = hidden.shape
    hidden, targets, weights = hidden.reshape(-1, shape[-1]), targets.reshape(-1), weights.reshape(-1)
    logits = einsum_float32("td,vd->tv", hidden, table)
    largest = ops.max(logits, axis=-1)
    of_target = ops.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    # After all that reads the logits, so that the exponentials can take their place. Without the barrier XLA computes
    # them anew for each of their three uses.
    shift = largest + 0.0 * of_target
    exponentials = lax.optimization_barrier(ops.exp(logits - shift[:, None]))
    normaliser = ops.sum(exponentials, axis=-1)
    log_normaliser = ops.log(normaliser) + largest

    cross_entropy = ops.sum(weights * (log_normaliser - of_target))
    objective = cross_entropy + z_loss * ops.sum(weights * ops.square(log_normaliser))
    correct = ops.sum(weights * ops.cast(of_target >= largest, "float32"))

    scale = (weights * (1.0 + 2.0 * z_loss * log_normaliser) / normaliser)[:, None]
    of_hidden = ops.matmul(exponentials, table) * scale - weights[:, None] * ops.take(table, targets, axis=0)

    def add_to(of_table):
        of_table = _add_product(of_table, exponentials, hidden * scale)
        return of_table.at[targets].add(-weights[:, None] * hidden)

    return (objective, cross_entropy, correct), of_hidden.reshape(shape), add_to


def _add_product(total, left, right):
    """`total + leftᵀ · right`, some rows at a time: their product is added before it leaves the cache."""
    from jax import lax

    parts = math.gcd(total.shape[0], PARTS_OF_TABLE)
    rows = total.shape[0] // parts

    def add_part(index, total):
        columns = lax.dynamic_slice_in_dim(left, index * rows, rows, 1)
        part = lax.dynamic_slice_in_dim(total, index * rows, rows, 0)
        part = part + einsum_float32("tv,td->vd", columns, right)
        return lax.dynamic_update_slice_in_dim(total, part, index * rows, 0)

    return lax.fori_loop(0, parts, add_part, total)


# === Elsewhere: chunks that the backward pass computes once more ===


def _recomputed_sums(hidden, embeddings, targets, weights, z_loss):
    table = ops.cast(embeddings, hidden.dtype)

    @keras.remat
    def sums(hidden, table, targets, weights):
        return _sums_of_logits(einsum_float32("btd,vd->btv", hidden, table), targets, weights, z_loss)[:3]

    length = hidden.shape[1]
    if not length:
        return sums(hidden, table, targets, weights)
    width = columns_at_once(hidden.shape[0], length)
    parts = [
        sums(hidden[:, i : i + width], table, targets[:, i : i + width], weights[:, i : i + width])
        for i in range(0, length, width)
    ]
    return [sum(values) for values in zip(*parts)]
