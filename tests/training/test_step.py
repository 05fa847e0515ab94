"""The step of `fit`: without logits, in microbatches, with other losses and metrics."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.training import NextTokenLoss
from keras_gemma.training import Perplexity
from keras_gemma.training import TokenAccuracy

SHAPE = {
    "vocabulary_size": 50, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 8,
    "intermediate_dim": 16, "head_dim": 4,
}  # fmt: skip
ROWS, LENGTH = 6, 5


def make_model(optimizer=None, **compiled):
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM(GemmaBackbone(**SHAPE))
    # Far from uniform, so that tokens differ in their loss.
    model.backbone.token_embedding.embeddings.assign(model.backbone.token_embedding.embeddings * 3.0)
    model.compile(optimizer=optimizer or keras.optimizers.SGD(0.5), **compiled)
    return model


@pytest.fixture(scope="module")
def batch():
    """Rows of very uneven weight, so that means of microbatches are not the mean of the batch."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, SHAPE["vocabulary_size"], (ROWS, LENGTH + 1)).astype("int32")
    weights = rng.uniform(0, 1, (ROWS, LENGTH)) * (np.arange(LENGTH) < rng.integers(0, LENGTH + 1, (ROWS, 1)))
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((ROWS, LENGTH), "int32")}
    return x, ids[:, 1:], weights.astype("float32")


def trained(model, batch, steps=2):
    """Logs of the last step, and all weights after it."""
    for _ in range(steps):
        logs = model.train_on_batch(*batch, return_dict=True)
    return {name: float(value) for name, value in logs.items()}, model.get_weights()


class LogitsSeen(keras.metrics.Mean):
    """A metric that is not of the kind that needs no logits."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(ops.cast(ops.shape(y_pred)[-1], "float32"))


@pytest.fixture(scope="module")
def whole(batch):
    return trained(make_model(), batch)


def assert_equal(received, expected, ignored=()):
    logs, weights = received
    for name in {*logs, *expected[0]} - {*ignored}:
        assert logs[name] == pytest.approx(expected[0][name], rel=2e-5), name
    for weight, wanted in zip(weights, expected[1]):
        np.testing.assert_allclose(weight, wanted, atol=1e-5)


@pytest.mark.multi_backend
# 4 does not divide the 6 rows.
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_make_the_step_of_the_batch(batch, whole, microbatches):
    model = make_model(gradient_accumulation_steps=microbatches)
    assert_equal(trained(model, batch), whole)


@pytest.mark.multi_backend
def test_other_metrics_get_logits_and_change_nothing(batch, whole):
    model = make_model(weighted_metrics=[Perplexity(), TokenAccuracy()], metrics=[LogitsSeen(name="vocabulary")])
    received = trained(model, batch)
    assert received[0]["vocabulary"] == SHAPE["vocabulary_size"]
    assert_equal(received, whole, ignored=["vocabulary"])


def test_another_loss_is_accumulated_too(batch, whole):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    model = make_model(loss=loss, weighted_metrics=None, gradient_accumulation_steps=2)
    assert_equal(trained(model, batch), whole, ignored=["perplexity", "token_accuracy"])


def test_z_loss_is_that_of_the_logits(batch):
    logits_model = make_model(loss=NextTokenLoss(z_loss=0.1), metrics=[LogitsSeen(name="vocabulary")])
    received = trained(make_model(loss=NextTokenLoss(z_loss=0.1)), batch)
    assert_equal(received, trained(logits_model, batch), ignored=["vocabulary"])
    assert received[0]["loss"] > np.log(received[0]["perplexity"]) + 0.1


def test_a_negative_z_loss_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        NextTokenLoss(z_loss=-1.0)


def test_no_microbatches_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        make_model(gradient_accumulation_steps=0)


def test_the_loss_of_an_epoch_is_that_of_its_tokens(batch):
    # Batches of uneven weight: their mean loss would be another.
    model = make_model(keras.optimizers.SGD(0.0))
    logs = model.fit(*batch[:2], sample_weight=batch[2], batch_size=2, verbose=0).history
    assert np.log(logs["perplexity"][0]) == pytest.approx(logs["loss"][0], rel=1e-5)
    assert logs["tokens"][0] == ROWS * LENGTH
    evaluated = model.evaluate(*batch[:2], sample_weight=batch[2], batch_size=4, verbose=0, return_dict=True)
    assert evaluated["loss"] == pytest.approx(logs["loss"][0], rel=1e-5)
    assert set(evaluated) == {"loss", "perplexity", "token_accuracy"}


def test_a_subclass_with_a_loss_of_its_own_gets_logits(batch):
    class Squared(GemmaCausalLM):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            assert y_pred.shape[-1] == SHAPE["vocabulary_size"]
            return ops.mean(ops.square(y_pred))

    model = Squared(GemmaBackbone(**SHAPE))
    model.compile(optimizer=keras.optimizers.SGD(0.5))
    first = model.train_on_batch(*batch, return_dict=True)["loss"]
    assert model.train_on_batch(*batch, return_dict=True)["loss"] < 2 * first


@pytest.mark.multi_backend
def test_the_norm_is_that_of_all_gradients_before_clipping(batch):
    # With plain SGD the change of the weights is the gradient.
    model = make_model(keras.optimizers.SGD(1.0, global_clipnorm=1e-3))
    before = model.get_weights()
    clipped = model.train_on_batch(*batch, return_dict=True)["gradient_norm"]
    change = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(model.get_weights(), before)))
    assert change == pytest.approx(1e-3, rel=1e-2)
    free = make_model(keras.optimizers.SGD(1.0))
    before = free.get_weights()
    norm = free.train_on_batch(*batch, return_dict=True)["gradient_norm"]
    change = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(free.get_weights(), before)))
    assert float(norm) == pytest.approx(change, rel=1e-4) and float(clipped) == pytest.approx(float(norm), rel=1e-5)


def test_a_saved_model_goes_on_without_logits(batch, tmp_path):
    model = make_model(loss=NextTokenLoss(z_loss=0.1), gradient_accumulation_steps=2)
    model.train_on_batch(*batch)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.gradient_accumulation_steps == 2 and loaded.loss.z_loss == 0.1
    assert loaded._trains_without_logits
    assert_equal(
        trained(loaded, batch, 1), trained(model, batch, 1), ignored=["tokens", "perplexity", "loss", "token_accuracy"]
    )


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="reads XLA's memory plan")
def test_a_step_has_no_room_for_the_logits_of_its_batch():
    rows, vocabulary = 64, 20_000
    model = GemmaCausalLM(GemmaBackbone(**{**SHAPE, "vocabulary_size": vocabulary, "num_layers": 1}))
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    ids = np.ones((rows, 64), "int32")
    memory = compiled_step(model, ({"token_ids": ids, "padding_mask": ids}, ids, ids.astype("float32")))
    assert memory.temp_size_in_bytes < rows * 64 * vocabulary * 4 / 4


def compiled_step(model, data):
    import jax

    model.optimizer.build(model.trainable_variables)
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([variable.value for variable in group] for group in variables)
    return jax.jit(model.train_step).lower(state, data).compile().memory_analysis()
