import keras
import numpy as np
import pytest
from gradients import value_and_gradients
from keras import ops

from keras_gemma import kernels
from keras_gemma.kernels import vocabulary

B, T, D, V = 2, 37, 16, 300


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    weights = (rng.random((B, T)) > 0.3) * rng.uniform(0.5, 2.0, (B, T))
    return {
        "hidden": rng.standard_normal((B, T, D)).astype("float32"),
        # Far from uniform: some targets are nearly certain, where rounding would show.
        "embeddings": rng.standard_normal((V, D)).astype("float32"),
        "targets": rng.integers(0, V, (B, T)).astype("int32"),
        "weights": weights.astype("float32"),
    }


def plain(hidden, embeddings, targets, weights, z_loss):
    """The definition, on whole logits."""
    logits = ops.einsum("btd,vd->btv", ops.cast(hidden, "float32"), ops.cast(embeddings, "float32"))
    log_normaliser = ops.logsumexp(logits, axis=-1)
    of_target = ops.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ops.sum(weights * (log_normaliser - of_target + z_loss * ops.square(log_normaliser)))


def both(batch, z_loss, chunk_tokens, monkeypatch, dtype="float32"):
    monkeypatch.setattr(vocabulary, "TOKENS_AT_ONCE", chunk_tokens)
    monkeypatch.setattr(vocabulary, "TOKENS_AT_ONCE_ON_CPU", chunk_tokens)
    targets, weights = (ops.convert_to_tensor(batch[name]) for name in ("targets", "weights"))
    inputs = [ops.cast(batch["hidden"], dtype), ops.convert_to_tensor(batch["embeddings"])]
    chunked = value_and_gradients(
        lambda h, e: kernels.vocabulary_loss(h, e, targets, weights, z_loss).objective, *inputs
    )
    return chunked, value_and_gradients(lambda h, e: plain(h, e, targets, weights, z_loss), *inputs)


# One chunk; chunks that divide the length; a last chunk that is not full.
@pytest.mark.multi_backend
@pytest.mark.parametrize(("chunk_tokens", "z_loss"), [(1000, 0.1), (2, 0.0), (10, 0.1)])
def test_value_and_gradients_are_those_of_whole_logits(batch, chunk_tokens, z_loss, monkeypatch):
    (value, gradients), (expected, expected_gradients) = both(batch, z_loss, chunk_tokens, monkeypatch)
    assert value == pytest.approx(expected, rel=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max())


def test_bfloat16_products_add_up_in_float32(batch, monkeypatch):
    (value, gradients), (expected, expected_gradients) = both(batch, 0.0, 10, monkeypatch, dtype="bfloat16")
    assert value == pytest.approx(expected, rel=5e-3)
    assert [str(g.dtype) for g in gradients] == ["bfloat16", "float32"]
    for gradient, wanted in zip(gradients, expected_gradients):
        np.testing.assert_allclose(np.float32(gradient), np.float32(wanted), atol=0.02 * np.abs(wanted).max())


@pytest.mark.multi_backend
def test_sums_of_a_batch(batch):
    logits = np.einsum("btd,vd->btv", batch["hidden"], batch["embeddings"])
    batch = {**batch, "targets": np.where(np.arange(T) % 3, batch["targets"], logits.argmax(-1)).astype("int32")}
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probabilities, batch["targets"][..., None], axis=-1)[..., 0]
    hits = logits.argmax(-1) == batch["targets"]
    for sums in (kernels.vocabulary_loss(**batch), kernels.logits_loss(logits, batch["targets"], batch["weights"])):
        assert float(sums.cross_entropy) == pytest.approx((batch["weights"] * losses).sum(), rel=1e-5)
        assert float(sums.correct) == pytest.approx((batch["weights"] * hits).sum(), rel=1e-5)
        assert float(sums.weight) == pytest.approx(batch["weights"].sum(), rel=1e-5)
        assert float(sums.objective) == float(sums.cross_entropy)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="reads XLA's memory plan")
@pytest.mark.parametrize("with_gradients", [False, True])
def test_no_tensor_of_all_logits(with_gradients):
    import jax

    tokens, vocabulary = 2048, 4000
    hidden = jax.ShapeDtypeStruct((1, tokens, 8), "float32")
    embeddings = jax.ShapeDtypeStruct((vocabulary, 8), "float32")
    integers = jax.ShapeDtypeStruct((1, tokens), "int32")
    weights = jax.ShapeDtypeStruct((1, tokens), "float32")

    def loss(hidden, embeddings, targets, weights):
        return kernels.vocabulary_loss(hidden, embeddings, targets, weights).objective

    function = jax.grad(loss, (0, 1)) if with_gradients else loss
    compiled = jax.jit(function).lower(hidden, embeddings, integers, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocabulary * 4 / 2


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="reads XLA's program")
def test_a_frozen_table_costs_no_product():
    import jax

    def loss(hidden, embeddings):
        return kernels.vocabulary_loss(hidden, embeddings, np.zeros((1, 8), "int32"), np.ones((1, 8))).objective

    # An odd number of rows: XLA counts the body of a loop over parts of the table once.
    arguments = np.ones((1, 8, 4), "float32"), np.ones((33, 4), "float32")
    flops = [
        jax.jit(jax.grad(loss, which)).lower(*arguments).compile().cost_analysis()["flops"] for which in (0, (0, 1))
    ]
    # Two products a chunk, logits and their gradient for the hidden states, against three.
    assert flops[0] < 0.8 * flops[1]


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
def test_tokens_without_weight_have_no_logits(batch, monkeypatch):
    """What they are is not seen: their chunks are left out."""
    import jax

    monkeypatch.setattr(vocabulary, "TOKENS_AT_ONCE", 8)
    monkeypatch.setattr(vocabulary, "TOKENS_AT_ONCE_ON_CPU", 8)
    rng = np.random.default_rng(1)
    # Three chunks of eight tokens, here and there in both rows.
    mask = rng.permutation(np.arange(B * T) < 24).reshape(B, T)
    weights = np.where(mask, batch["weights"] + 0.1, 0.0).astype("float32")
    poisoned = np.where(mask[..., None], batch["hidden"], np.nan).astype("float32")

    def loss(hidden, embeddings):
        return kernels.vocabulary_loss(hidden, embeddings, batch["targets"], weights).objective

    def expected_loss(hidden, embeddings):
        return plain(hidden, embeddings, batch["targets"], weights, 0.0)

    embeddings = batch["embeddings"]
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(poisoned, embeddings)
    expected, wanted = jax.jit(jax.value_and_grad(expected_loss, (0, 1)))(batch["hidden"], embeddings)
    np.testing.assert_allclose([value, jax.jit(loss)(poisoned, embeddings)], expected, rtol=1e-5)
    for gradient, one in zip(gradients, wanted):
        np.testing.assert_allclose(gradient, one, atol=1e-5 * np.abs(one).max())

    found = kernels.token_log_probabilities(poisoned, embeddings, batch["targets"], mask.astype("float32"))
    for one, other in zip(found, kernels.token_log_probabilities(batch["hidden"], embeddings, batch["targets"])):
        np.testing.assert_allclose(one[mask], other[mask], rtol=1e-5)
        assert not one[~mask].any()

    nothing = kernels.vocabulary_loss(poisoned, embeddings, batch["targets"], 0.0 * weights)
    assert [float(one) for one in nothing] == [0.0] * 4
