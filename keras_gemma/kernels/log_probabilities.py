"""What a model thinks of tokens that are there, a few tokens at a time or with small logits kept.

hidden states ─→ log-probabilities ─→ a caller's loss ─→ its slopes ─→ gradients of a weighted cross-entropy
"""

import functools

from keras import ops

from keras_gemma.kernels import platform
from keras_gemma.kernels.platform import on_jax
from keras_gemma.kernels.products import einsum_float32
from keras_gemma.kernels.sharding import shardings_of_weight
from keras_gemma.kernels.sharding import shardings_that_divide
from keras_gemma.kernels.vocabulary import chunks_of_tokens
from keras_gemma.kernels.vocabulary import columns_at_once
from keras_gemma.kernels.vocabulary import is_exact_in_float32
from keras_gemma.kernels.vocabulary import is_target
from keras_gemma.kernels.vocabulary import jax_sums_of_tokens
from keras_gemma.kernels.weighted_tokens import over_chunks
from keras_gemma.kernels.weighted_tokens import skips_tokens
from keras_gemma.kernels.weighted_tokens import weighted_first


def token_log_probabilities(hidden, embeddings, targets, mask=None, known=None, vocabulary_size=None):
    """What the model thinks of tokens that are there, without the tensor `[B, T, V]`, unless it is small.

    On JAX log-probabilities have gradients: those of a cross-entropy, in which the slope of a loss by the
    log-probability of a token is the weight of that token. Entropies have none, and on other backends neither has.

    Args:
        hidden, embeddings, targets: as of `vocabulary_loss`.
        mask: optional tensor `[B, T]`, 0 where nobody asks. What is said of such tokens means nothing.
        known: optional pair, what this function said before of the same tokens. It is said again, and only gradients
            are computed.
        vocabulary_size: optional int. The distribution is over the first so many ids, as where the rows of an embedding
            after them are padding that is never drawn. `None` for all.

    Returns:
        Float32 log-probabilities `[B, T]` of the targets, and float32 entropies `[B, T]` of the distributions that they
        were drawn from, in nats.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.kernels import token_log_probabilities
    >>> hidden, embeddings = np.zeros((1, 3, 2), "float32"), np.zeros((4, 2), "float32")
    >>> logps, entropies = token_log_probabilities(hidden, embeddings, np.zeros((1, 3), "int32"))
    >>> np.round(np.array(logps), 4), np.round(np.array(entropies), 4)
    (array([[-1.3863, -1.3863, -1.3863]], dtype=float32), array([[1.3863, 1.3863, 1.3863]], dtype=float32))
    """
    shardings = shardings_of_weight(embeddings)
    hidden, embeddings, targets = (ops.convert_to_tensor(x) for x in (hidden, embeddings, targets))
    if vocabulary_size is not None and vocabulary_size < embeddings.shape[0]:
        embeddings = embeddings[:vocabulary_size]
        shardings = shardings_that_divide(embeddings.shape, *shardings)
    mask = ops.ones(targets.shape, "float32") if mask is None else ops.convert_to_tensor(mask)
    if on_jax():
        return _jax_log_probabilities(*shardings)(hidden, embeddings, targets, mask, known)
    return known or _in_chunks(ops.stop_gradient(hidden), ops.stop_gradient(embeddings), targets, mask)


def _in_chunks(hidden, embeddings, targets, mask):
    embeddings = ops.cast(embeddings, hidden.dtype)
    rows, length = targets.shape
    width = columns_at_once(rows, length)
    if on_jax() and skips_tokens(chunks=-(-length // width)):
        order = weighted_first(mask)
        chunks = chunks_of_tokens(*map(order.one_row, (hidden, targets, mask)), width * rows)
        _, found = over_chunks(lambda _, one: (None, _scored(one[0], embeddings, one[1])), None, chunks, skips=True)
        return tuple(order.back(x.reshape(-1)[: rows * length]) for x in found)
    missing = -length % width

    def chunks(x):
        x = ops.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (len(x.shape) - 2)])
        return ops.swapaxes(ops.reshape(x, (x.shape[0], -1, width, *x.shape[2:])), 0, 1)

    outputs = ops.map(lambda one: _scored(one[0], embeddings, one[1]), (chunks(hidden), chunks(targets)))
    return tuple(ops.reshape(ops.swapaxes(x, 0, 1), (rows, -1))[:, :length] for x in outputs)


def _scored(hidden, embeddings, targets):
    """Log-probabilities and entropies of a chunk `[B, t, …]`."""
    logits = einsum_float32("btd,vd->btv", hidden, embeddings)
    log_normaliser = ops.logsumexp(logits, axis=-1)
    of_target = ops.sum(ops.where(is_target(logits, targets), logits, 0.0), axis=-1)
    mean_logit = ops.sum(ops.exp(logits - log_normaliser[..., None]) * logits, axis=-1)
    return of_target - log_normaliser, log_normaliser - mean_logit


# === JAX: gradients ===


@functools.cache
def _jax_log_probabilities(parts, whole):
    """Function of hidden states, embeddings, targets, mask and what is known. Shardings as of `vocabulary`."""
    import jax

    @jax.custom_vjp
    def log_probabilities(hidden, embeddings, targets, mask, known):
        return known or _in_chunks(hidden, embeddings, targets, mask)

    def forward(hidden, embeddings, targets, mask, known):
        into_table = embeddings.perturbed
        hidden, embeddings, targets, mask = (x.value for x in (hidden, embeddings, targets, mask))
        known = known and tuple(x.value for x in known)
        if known is None and _keeps_logits(hidden, embeddings):
            found, kept = _with_exponentials(hidden, embeddings, targets)
        else:
            found, kept = known or _in_chunks(hidden, embeddings, targets, mask), None
        return found, (hidden, {"learned" if into_table else "frozen": embeddings}, targets, kept)

    def backward(saved, cotangents):
        hidden, embeddings, targets, kept = saved
        into_table = "learned" in embeddings
        (embeddings,) = embeddings.values()
        slopes = cotangents[0]
        if isinstance(slopes, jax.custom_derivatives.SymbolicZero):
            slopes = ops.zeros(slopes.shape, slopes.dtype)
        if kept is not None:
            of_hidden, of_table = _gradients_of_exponentials(hidden, embeddings, targets, slopes, *kept, into_table)
        else:

            def objective(hidden, embeddings):
                return jax_sums_of_tokens(parts, whole, hidden, embeddings, targets, -slopes)[0]

            gradients = jax.grad(objective, (0, 1) if into_table else (0,))(hidden, embeddings)
            of_hidden, of_table = gradients if into_table else (*gradients, None)
        return of_hidden, of_table, None, None, None

    log_probabilities.defvjp(forward, backward, symbolic_zeros=True)
    return log_probabilities


def _keeps_logits(hidden, embeddings):
    rows, length = hidden.shape[:2]
    return is_exact_in_float32(hidden) and 4 * rows * length * embeddings.shape[0] <= platform.KEPT_BYTES_ON_CPU


def _with_exponentials(hidden, embeddings, targets):
    """Log-probabilities and entropies, and the exponentials of all logits `[B * T, V]` with their sums."""
    from jax import lax

    shape, hidden, targets = targets.shape, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1, 1)
    logits = einsum_float32("td,vd->tv", hidden, embeddings.astype(hidden.dtype))
    largest = ops.max(logits, axis=-1)
    # XLA would compute them anew for each of their uses.
    exponentials = lax.optimization_barrier(ops.exp(logits - largest[:, None]))
    normaliser = ops.sum(exponentials, axis=-1)
    log_normaliser = ops.log(normaliser) + largest
    logps = ops.take_along_axis(logits, targets, axis=-1)[:, 0] - log_normaliser
    entropies = log_normaliser - ops.sum(exponentials * logits, axis=-1) / normaliser
    return (logps.reshape(shape), entropies.reshape(shape)), (exponentials, normaliser)


def _gradients_of_exponentials(hidden, embeddings, targets, slopes, exponentials, normaliser, into_table):
    """Gradients by `hidden` and, where it learns, by `embeddings`.

    The exponentials go into the products as they are; normaliser, slope and target are dealt with in the small tensors
    on the other side.
    """
    states, targets, slopes = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), slopes.reshape(-1, 1)
    table = embeddings.astype(hidden.dtype)
    scale = slopes / normaliser[:, None]
    of_hidden = slopes * ops.take(table, targets, axis=0) - ops.matmul(exponentials, table) * scale
    of_hidden = of_hidden.reshape(hidden.shape)
    if not into_table:
        return of_hidden, None
    of_table = -einsum_float32("tv,td->vd", exponentials, states * scale)
    return of_hidden, of_table.at[targets].add(slopes * states).astype(embeddings.dtype)
