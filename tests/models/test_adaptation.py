"""LoRA, quantization, and saving with compile state."""

import keras
import numpy as np
import pytest

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM

TEXTS = ["the License", "a work", "you may", "12 34"]

pytestmark = pytest.mark.multi_backend


def logits(model):
    return model.predict(TEXTS, batch_size=4, verbose=0)


def values(model):
    return {weight.path: keras.ops.convert_to_numpy(weight.value) for weight in model.backbone.weights}


@pytest.fixture
def tuned(make_model):
    """A model whose adapters of rank 2 `fit` has changed, and its weights before."""
    model = make_model()
    model.backbone.enable_lora(2)
    before = values(model)
    model.compile(optimizer=keras.optimizers.Adam(0.05))
    model.fit(TEXTS, batch_size=4, epochs=2, verbose=0)
    return model, before


def test_only_adapters_train_and_change(tuned):
    model, before = tuned
    trainable = {weight.path for weight in model.trainable_weights}
    assert {path.split("/", 1)[1] for path in trainable} == {
        f"attention/{name}/lora_kernel_{factor}" for name in ("query", "value") for factor in "ab"
    }
    changed = {path for path, value in values(model).items() if (value != before[path]).any()}
    assert changed == trainable


def test_enabling_lora_changes_no_logit(make_model):
    model = make_model()
    before = logits(model)
    model.backbone.enable_lora(2)
    np.testing.assert_allclose(logits(model), before, atol=1e-6)


def test_adapters_are_saved_and_loaded_alone(tuned, make_model, tmp_path):
    model, before = tuned
    path = str(tmp_path / "adapters.lora.h5")
    model.backbone.save_lora_weights(path)
    fresh = make_model()
    for weight in fresh.backbone.weights:
        weight.assign(before[weight.path])
    # Not by `predict`: on TensorFlow it would keep the graph without adapters until the next `compile`.
    untuned = keras.ops.convert_to_numpy(fresh(fresh.preprocessor(TEXTS)[0]))
    assert np.abs(untuned - logits(model)).max() > 1e-3
    fresh.backbone.load_lora_weights(path)
    np.testing.assert_allclose(logits(fresh), logits(model), atol=1e-5)


def test_a_preset_holds_the_adapters_merged(tuned, tmp_path):
    model, _ = tuned
    model.save_to_preset(str(tmp_path / "preset"))
    restored = GemmaCausalLM.from_preset(str(tmp_path / "preset"))
    assert not any("lora" in weight.path for weight in restored.weights)
    np.testing.assert_allclose(logits(restored), logits(model), atol=1e-5)


def test_a_saved_model_keeps_logits_config_and_compile_state(make_model, tmp_path):
    model = make_model()
    model.compile(optimizer=keras.optimizers.AdamW(0.0123, weight_decay=0.5))
    model.fit(TEXTS, batch_size=4, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    assert type(restored) is GemmaCausalLM and type(restored.backbone) is GemmaBackbone
    assert restored.backbone.get_config() == model.backbone.get_config()
    assert restored.preprocessor.sequence_length == model.preprocessor.sequence_length
    np.testing.assert_allclose(logits(restored), logits(model), atol=1e-6)
    assert type(restored.optimizer) is type(model.optimizer)
    assert float(restored.optimizer.learning_rate) == pytest.approx(0.0123)
    assert int(restored.optimizer.iterations) == 2
    # The next step is the one that the first model would take, moments of the optimizer included.
    for each in (model, restored):
        each.fit(TEXTS, batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_allclose(logits(restored), logits(model), atol=1e-5)


def test_a_saved_model_keeps_its_adapters(tuned, tmp_path):
    model, _ = tuned
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(logits(restored), logits(model), atol=1e-5)


def test_int8_logits_stay_near(make_model):
    model = make_model(hidden_dim=32, intermediate_dim=64)
    before = logits(model)
    model.quantize("int8")
    assert any(weight.dtype == "int8" for weight in model.backbone.weights)
    after = logits(model)
    assert after.dtype == "float32"
    assert np.sqrt(np.mean((after - before) ** 2)) < 0.1 * np.std(before)


def test_int8_models_are_saved_and_loaded(make_model, tmp_path):
    model = make_model()
    model.quantize("int8")
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(logits(restored), logits(model), atol=1e-5)


def test_dropout_acts_in_training_only(make_model):
    model = make_model(dropout=0.9)
    x = model.preprocessor(TEXTS)[0]
    keras.utils.set_random_seed(0)
    resting, training = (keras.ops.convert_to_numpy(model(x, training=training)) for training in (False, True))
    np.testing.assert_allclose(resting, logits(model), atol=1e-5)
    assert np.abs(training - resting).max() > 1e-3
