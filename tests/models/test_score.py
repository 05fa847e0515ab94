import keras
import numpy as np
import pytest
from keras import ops

from tests.numerics.references import batch
from tests.numerics.references import keras_hub_twin
from tests.numerics.references import logits
from tests.numerics.references import ours

SHAPE = {
    "vocabulary_size": 50, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1,
    "hidden_dim": 8, "intermediate_dim": 32, "head_dim": 8,
}  # fmt: skip

pytestmark = pytest.mark.multi_backend


@pytest.fixture(scope="module")
def pair():
    model = ours(SHAPE)
    return model, keras_hub_twin(model, SHAPE)


@pytest.fixture(scope="module")
def inputs():
    return batch(50, lengths=(6, 4))


def assert_near(received, expected, mask):
    received, expected = ops.convert_to_numpy(received), ops.convert_to_numpy(expected)
    real = mask.astype(bool)
    np.testing.assert_allclose(received[real], expected[real], rtol=0, atol=1e-4)


def test_logits_are_keras_hubs(pair, inputs):
    model, twin = pair
    ids, mask = inputs["token_ids"], inputs["padding_mask"]
    assert_near(model.score(ids, mask), twin.score(ids, ops.cast(mask, "bool")), mask)
    assert_near(model.score(ids, mask), logits(model, inputs), mask)


def test_losses_are_keras_hubs(pair, inputs):
    model, twin = pair
    ids, mask = inputs["token_ids"], inputs["padding_mask"]
    arguments = {"scoring_mode": "loss", "target_ids": np.roll(ids, -1, axis=1)}
    received = model.score(ids, mask, **arguments)
    assert received.shape == ids.shape
    assert_near(received, twin.score(ids, ops.cast(mask, "bool"), **arguments), mask)


def test_without_a_mask_every_token_counts(pair, inputs):
    model, _ = pair
    ids = inputs["token_ids"]
    everything = np.ones_like(ids)
    assert_near(model.score(ids), model.score(ids, everything), everything)


def test_the_intercept_sees_and_changes_every_layer(pair, inputs):
    model, twin = pair
    ids, mask = inputs["token_ids"], inputs["padding_mask"]
    seen = []

    def doubled(x, index):
        seen.append((index, tuple(x.shape)))
        return 2.0 * x if index == 0 else x

    received = model.score(ids, mask, layer_intercept_fn=doubled)
    assert seen == [(index, (2, 6, 8)) for index in (-1, 0, 1)]
    assert_near(received, twin.score(ids, ops.cast(mask, "bool"), layer_intercept_fn=doubled), mask)
    assert np.abs(ops.convert_to_numpy(received) - logits(model, inputs)).max() > 0.01


def test_the_intercept_changes_the_embeddings_too(pair, inputs):
    model, _ = pair
    received = model.score(inputs["token_ids"], layer_intercept_fn=lambda x, i: 0.0 * x if i == -1 else x)
    assert np.abs(ops.convert_to_numpy(received)).max() < 1e-6


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="jax.grad")
def test_losses_have_gradients_for_the_embeddings(pair, inputs):
    import jax

    model, _ = pair
    ids = inputs["token_ids"]

    def loss(shift):
        scores = model.score(
            ids,
            scoring_mode="loss",
            target_ids=ids,
            layer_intercept_fn=lambda x, index: x + shift if index == -1 else x,
        )
        return scores.sum()

    gradient = jax.grad(loss)(np.zeros((2, 6, 8), "float32"))
    assert np.abs(gradient).max() > 1e-3


def test_unknown_modes_and_missing_targets_are_refused(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="'logits' or 'loss'"):
        model.score(np.ones((1, 2), "int32"), scoring_mode="perplexity")
    with pytest.raises(ValueError, match="target_ids"):
        model.score(np.ones((1, 2), "int32"), scoring_mode="loss")
