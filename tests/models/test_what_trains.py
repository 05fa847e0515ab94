"""Training learns as in float32, or is refused: quantised weights, adapters, microbatches, frozen weights."""

import functools

import keras
import numpy as np
import pytest

from keras_gemma.kernels import int8_logits
from keras_gemma.models import GemmaRewardModel
from keras_gemma.models.reversible_embedding import ReversibleEmbedding

TEXTS = ["the License", "a work", "you may", "12 34"]
ALL = ["query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"]
CALL_COMPILE_AGAIN = "call `compile` again"


@pytest.fixture(scope="module")
def history(make_model):
    """`history(mode, adapters, microbatches)`: what `fit` reports of a small task."""

    @functools.cache
    def fit(mode, adapters, microbatches):
        keras.utils.set_random_seed(0)
        model = make_model(hidden_dim=16, intermediate_dim=32)
        if mode:
            model.quantize(mode)
        if adapters:
            model.backbone.enable_lora(4, target_layer_names=ALL)
        model.compile(keras.optimizers.Adam(0.02), gradient_accumulation_steps=microbatches)
        return model.fit(TEXTS, batch_size=4, epochs=6, shuffle=False, verbose=0).history

    return fit


@pytest.mark.parametrize(
    "mode, adapters, microbatches",
    [("float8", False, 1), ("float8", False, 2), ("int8", True, 2), ("int4", True, 1)],
)
def test_learns_as_in_float32(history, mode, adapters, microbatches):
    expected, received = history(None, adapters, 1), history(mode, adapters, microbatches)
    learned = expected["loss"][0] - expected["loss"][-1]
    assert learned > 0.1
    # int4 is further away to begin with.
    assert received["loss"][0] - received["loss"][-1] == pytest.approx(learned, rel=0.15)
    assert received["gradient_norm"][0] == pytest.approx(expected["gradient_norm"][0], rel=0.25)
    assert max(received["gradient_norm"]) < 2 * max(expected["gradient_norm"])


def gradient(function, x, upstream):
    """Of the sum of `function(x) * upstream`."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.grad(lambda x: keras.ops.sum(function(x) * upstream))(x)
    if backend == "tensorflow":
        import tensorflow as tf

        x = tf.convert_to_tensor(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(function(x) * upstream)
        return tape.gradient(total, x)
    import torch

    x = torch.tensor(x, requires_grad=True)
    (function(x) * torch.tensor(upstream)).sum().backward()
    return x.grad


def head(mode, dtype, adapters):
    embedding = ReversibleEmbedding(60, 16, dtype=dtype)
    embedding.build()
    embedding._embeddings.assign(np.random.default_rng(0).normal(size=(60, 16)))
    config = None
    if mode in ("int4 per row", "int4 of rounded inputs"):
        rounded = keras.quantizers.AbsMaxQuantizer(axis=-1) if "inputs" in mode else None
        config = keras.quantizers.Int4QuantizationConfig(block_size=None, activation_quantizer=rounded)
    if mode == "int8 of weights":
        config = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
        config.weight_quantizer = keras.quantizers.AbsMaxQuantizer(axis=-1)
    embedding.quantize(mode.split()[0], config=config)
    if adapters:
        embedding.enable_lora(2)
        embedding.lora_embeddings_b.assign(np.random.default_rng(1).normal(size=(2, 16)))
    return embedding


@pytest.mark.multi_backend
@pytest.mark.parametrize("mode", ["int8", "int8 of weights", "int4", "int4 per row", "int4 of rounded inputs"])
def test_a_quantised_head_has_the_logits_and_gradients_of_its_embeddings(mode):
    embedding = head(mode, "float32", adapters=mode in ("int8", "int4"))
    table = keras.ops.convert_to_numpy(embedding(np.arange(60)))
    hidden = np.random.default_rng(2).normal(size=(2, 3, 16)).astype("float32")
    upstream = np.random.default_rng(3).normal(size=(2, 3, 60)).astype("float32")
    logits = keras.ops.convert_to_numpy(embedding(hidden, reverse=True))
    # Rounded inputs are half of 1/127 off at most.
    np.testing.assert_allclose(logits, hidden @ table.T, atol=0.02 * np.abs(logits).max())
    received = gradient(lambda x: embedding(x, reverse=True), hidden, upstream)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(received), upstream @ table, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_logits_are_float32_under_bfloat16(mode):
    embedding = head(mode, "bfloat16", adapters=False)
    hidden = np.random.default_rng(2).normal(size=(2, 30, 16))
    logits = embedding(keras.ops.cast(hidden, "bfloat16"), reverse=True)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert len(np.unique(keras.ops.convert_to_numpy(logits))) > 0.99 * 2 * 30 * 60


def test_integers_are_multiplied_exactly():
    table = np.array([[100, -3], [7, 127]], "int8")
    rounding = keras.quantizers.AbsMaxQuantizer(axis=-1)
    logits = int8_logits(np.array([[127.0, 1.0]], "float32"), table, np.array([2.0, 4.0], "float32"), rounding)
    np.testing.assert_allclose(logits, [[(12700 - 3) / 2, (889 + 127) / 4]], rtol=1e-6)


@pytest.mark.multi_backend
def test_next_scales_of_float8_are_no_gradients(make_model):
    model = make_model()
    model.quantize("float8")
    model.compile(keras.optimizers.SGD(0.0), gradient_accumulation_steps=2)
    model.fit(TEXTS, batch_size=4, epochs=1, verbose=0)
    histories = [v for v in model.trainable_variables if v.path.endswith("kernel_amax_history")]
    # Of two microbatches: the largest weight, not twice as much.
    for history in histories:
        kernel = next(v for v in model.variables if v.path == history.path.replace("_amax_history", ""))
        assert float(np.max(history)) == pytest.approx(float(np.abs(kernel).max()), rel=1e-6)


# === Refused ===


@pytest.mark.parametrize("names", [["query", "q_proj"], [], "query", ["pre_ffw_norm"]])
def test_unknown_targets_freeze_nothing(make_model, names):
    backbone = make_model(with_preprocessor=False).backbone
    before = len(backbone.trainable_weights)
    with pytest.raises(ValueError, match=r"'query'.*Received"):
        backbone.enable_lora(2, target_layer_names=names)
    assert len(backbone.trainable_weights) == before


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
def test_a_rank_is_at_least_one(make_model, rank):
    with pytest.raises(ValueError, match=f"Received: rank={rank}"):
        make_model(with_preprocessor=False).backbone.enable_lora(rank)


@pytest.mark.parametrize(
    "mode, sentence", [(None, "weights are all frozen"), ("int8", "Quantised weights do not train")]
)
def test_fit_with_nothing_to_learn_is_refused(make_model, mode, sentence):
    model = make_model()
    if mode:
        model.quantize(mode)
    else:
        model.trainable = False
    model.compile()
    with pytest.raises(ValueError, match=sentence):
        model.fit(TEXTS, verbose=0)


def test_a_reward_model_trains_its_head_on_frozen_weights(make_model):
    model = GemmaRewardModel(make_model().backbone)
    model.backbone.trainable = False
    rows, margins = np.ones((2, 2, 5), "int32"), np.zeros(2)
    model.compile()
    model.fit({"token_ids": rows, "padding_mask": rows}, margins, batch_size=2, verbose=0)
    model.trainable = False
    model.compile()
    with pytest.raises(ValueError, match="frozen"):
        model.fit({"token_ids": rows, "padding_mask": rows}, margins, verbose=0)


def enable_lora(model):
    model.backbone.enable_lora(2)


def freeze(model):
    model.backbone.token_embedding.trainable = False


@pytest.mark.parametrize("change", [enable_lora, freeze])
def test_other_weights_to_train_need_another_compile(make_model, change):
    model = make_model()
    model.compile(keras.optimizers.SGD(0.5))
    model.fit(TEXTS, batch_size=4, verbose=0)
    change(model)
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match=CALL_COMPILE_AGAIN):
            train(TEXTS)
    model.compile(keras.optimizers.SGD(0.5))
    before = [keras.ops.convert_to_numpy(variable) for variable in model.variables]
    model.fit(TEXTS, batch_size=4, epochs=2, verbose=0)
    changed = [(v.value != old).any() for v, old in zip(model.variables, before)]
    assert changed == [variable.trainable for variable in model.variables]


@pytest.mark.multi_backend
def test_predictions_follow_adapters_and_frozen_weights(make_model):
    model = make_model(num_layers=2)
    first, second = (block.ffw_linear for block in model.backbone.transformer_layers)

    def differs():
        direct = model(model.preprocessor(TEXTS)[0])
        return np.abs(model.predict(TEXTS, batch_size=4, verbose=0) - keras.ops.convert_to_numpy(direct)).max()

    first.trainable = False
    assert differs() < 1e-4
    # As many weights of the same shapes train, but others.
    first.trainable, second.trainable = True, False
    assert differs() < 1e-4
    model.backbone.enable_lora(2)
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, 0.5))
    assert differs() < 1e-4
    model.backbone.merge_lora()
    assert differs() < 1e-4


@pytest.mark.multi_backend
def test_a_weight_that_does_not_bear_upon_the_loss_stays(make_model):
    model = make_model()
    model.backbone.layer_norm._tracker.unlock()
    idle = model.backbone.layer_norm.add_weight(shape=(3,), initializer="ones", name="idle")
    model.compile(keras.optimizers.Adam(0.1))
    logs = model.fit(TEXTS, batch_size=4, epochs=2, verbose=0).history
    assert np.isfinite(logs["gradient_norm"]).all()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(idle), np.ones(3))
