"""Log-probabilities of tokens, and gradients of losses of them, beside those of whole logits."""

import keras
import numpy as np
import pytest

from keras_gemma import kernels
from keras_gemma.kernels import platform
from keras_gemma.kernels import vocabulary
from tests.numerics.precision import rounding

jax = pytest.importorskip("jax")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
B, T, D, V = 2, 37, 16, 300


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return {
        "hidden": random.standard_normal((B, T, D)).astype("float32"),
        # Far from uniform: some targets are nearly certain, where rounding would show.
        "embeddings": random.standard_normal((V, D)).astype("float32"),
        "targets": random.integers(0, V, (B, T)).astype("int32"),
        "mask": (random.random((B, T)) > 0.3).astype("float32"),
    }


@pytest.fixture(params=["kept", "in chunks", "without those that nobody asks for"])
def way(request, monkeypatch):
    """How logits are dealt with on a CPU."""
    if request.param != "kept":
        monkeypatch.setattr(platform, "KEPT_BYTES_ON_CPU", 0)
        monkeypatch.setattr(vocabulary, "TOKENS_AT_ONCE_ON_CPU", 40 if request.param == "in chunks" else 8)
    return request.param


def plain(hidden, embeddings, targets):
    logps = jax.nn.log_softmax(hidden.astype("float32") @ embeddings.astype("float32").T)
    entropies = -(jax.numpy.exp(logps) * logps).sum(axis=-1)
    return jax.numpy.take_along_axis(logps, targets[..., None], axis=-1)[..., 0], entropies


def loss(logps, mask):
    """Something crooked: slopes differ by token, in sign too, and some are 0."""
    return (mask * jax.numpy.maximum(jax.numpy.sin(logps), -0.9)).sum()


def test_values_are_those_of_whole_logits(batch, way):
    asked = batch["mask"] > 0
    for found, expected in zip(kernels.token_log_probabilities(**batch), plain(*list(batch.values())[:3])):
        np.testing.assert_allclose(np.array(found)[asked], np.array(expected)[asked], rtol=0, atol=rounding(expected))


@pytest.mark.parametrize("dtype, tolerance", [("float32", rounding(1)), ("bfloat16", 0.02)])
def test_gradients_are_those_of_whole_logits(batch, way, dtype, tolerance):
    targets, mask = batch["targets"], batch["mask"]

    def found(hidden, embeddings):
        logps, entropies = kernels.token_log_probabilities(hidden, embeddings, targets, mask)
        return loss(logps, mask), (logps, entropies)

    def expected(hidden, embeddings):
        return loss(plain(hidden, embeddings, targets)[0], mask)

    arguments = jax.numpy.asarray(batch["hidden"], dtype), jax.numpy.asarray(batch["embeddings"])
    (_, scored), gradients = jax.jit(jax.value_and_grad(found, (0, 1), has_aux=True))(*arguments)
    wanted = jax.jit(jax.grad(expected, (0, 1)))(*arguments)
    for gradient, one in zip(gradients, wanted):
        assert gradient.dtype == one.dtype
        np.testing.assert_allclose(np.float32(gradient), np.float32(one), atol=tolerance * np.abs(one).max())
    for values, one in zip(scored, plain(*arguments, targets)):
        np.testing.assert_allclose(values * mask, one * mask, atol=10 * tolerance)


def test_what_is_known_is_said_again_and_has_the_same_gradients(batch, way):
    known = kernels.token_log_probabilities(**batch)

    def objective(hidden, embeddings, known):
        scored = kernels.token_log_probabilities(hidden, embeddings, batch["targets"], batch["mask"], known)
        return loss(scored[0], batch["mask"]), scored

    arguments = batch["hidden"], batch["embeddings"]
    both = [jax.grad(objective, (0, 1), has_aux=True)(*arguments, one) for one in (None, known)]
    for one, other in zip(*map(jax.tree.leaves, both)):
        np.testing.assert_allclose(one, other, atol=rounding(other, 256))
    _, said = objective(*arguments, known)
    assert all(one is other for one, other in zip(said, known))


def test_entropies_have_no_gradients(batch, way):
    def objective(hidden):
        return kernels.token_log_probabilities(hidden, *list(batch.values())[1:])[1].sum()

    assert not jax.grad(objective)(batch["hidden"]).any()


def test_a_frozen_table_costs_no_product(batch, way):
    # An odd number of rows: XLA counts the body of a loop over parts of the table once.
    arguments, targets = (batch["hidden"][:, :8], batch["embeddings"][:-1]), batch["targets"][:, :8] % (V - 1)

    def objective(hidden, embeddings):
        return loss(kernels.token_log_probabilities(hidden, embeddings, targets)[0], 1.0)

    flops = [
        jax.jit(jax.grad(objective, which)).lower(*arguments).compile().cost_analysis()["flops"]
        for which in (0, (0, 1))
    ]
    assert flops[0] < 0.85 * flops[1]


@pytest.mark.parametrize("with_gradients", [False, True])
def test_no_tensor_of_all_logits_unless_it_is_small(with_gradients, monkeypatch):
    tokens, rows = 2048, 4000
    shapes = (1, tokens, 8), (rows, 8)
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]

    def objective(hidden, embeddings):
        return kernels.token_log_probabilities(hidden, embeddings, np.zeros((1, tokens), "int32"))[0].sum()

    def temporary():
        function = jax.grad(objective, (0, 1)) if with_gradients else objective
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary() < tokens * rows * 4 / 2
    monkeypatch.setattr(platform, "KEPT_BYTES_ON_CPU", tokens * rows * 4)
    assert (temporary() > tokens * rows * 4) == with_gradients
