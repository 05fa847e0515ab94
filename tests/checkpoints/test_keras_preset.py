"""Folders in the Keras format: keras-hub's, old and new, quantised or not, and ours read by keras-hub alone."""

import json
import os
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor
from keras_gemma.models import GemmaTokenizer

ONE_SHAPE = pytest.mark.parametrize("shape", ["7b"], indirect=True)

LOADED_BY_KERAS_HUB_ALONE = """
import sys
import keras, keras_hub, numpy as np
model = keras_hub.models.GemmaCausalLM.from_preset(sys.argv[1])
assert "keras_gemma" not in sys.modules
ids = np.arange(1, 13).reshape(2, 6)
logits = model({"token_ids": ids, "padding_mask": np.ones_like(ids)})
np.save(sys.argv[2], keras.ops.convert_to_numpy(logits))
assert model.preprocessor.sequence_length == 24
"""


@pytest.mark.multi_backend
def test_keras_hub_to_keras_gemma_and_back(preset, tmp_path, logits):
    expected = logits(keras_hub.models.GemmaCausalLM.from_preset(str(preset)))
    model = GemmaCausalLM.from_preset(preset)
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)

    model.save_to_preset(tmp_path / "ours")
    back = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path / "ours"))
    assert type(back) is keras_hub.models.GemmaCausalLM
    np.testing.assert_allclose(logits(back), expected, atol=1e-6)


@ONE_SHAPE
def test_a_loaded_model_learns(preset):
    model = GemmaCausalLM.from_preset(preset)
    history = model.fit(["to be or not to be"] * 4, batch_size=2, epochs=2, verbose=0).history["loss"]
    assert history[1] < history[0]


@ONE_SHAPE
def test_keras_hub_without_this_package_loads_ours(preset, tmp_path, logits):
    model = GemmaCausalLM.from_preset(preset)
    model.save_to_preset(tmp_path / "ours", max_shard_size=1e-4)
    assert (tmp_path / "ours" / "model_00001.weights.h5").exists()
    output = tmp_path / "logits.npy"
    command = [sys.executable, "-P", "-c", LOADED_BY_KERAS_HUB_ALONE, str(tmp_path / "ours"), str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(output), logits(model), atol=1e-5)


@ONE_SHAPE
def test_settings_are_respected_and_replaced(preset):
    assert GemmaCausalLM.from_preset(preset).preprocessor.add_end_token is False
    assert GemmaCausalLM.from_preset(preset, sequence_length=7).preprocessor.sequence_length == 7
    assert GemmaCausalLM.from_preset(preset, preprocessor=None).preprocessor is None
    preprocessor = GemmaCausalLMPreprocessor.from_preset(preset)
    assert (preprocessor.sequence_length, preprocessor.add_end_token) == (24, False)
    assert GemmaCausalLMPreprocessor.from_preset(preset, sequence_length=7).sequence_length == 7
    assert GemmaBackbone.from_preset(preset, dropout=0.25).dropout == 0.25
    with pytest.raises(ValueError, match="sequence_length"):
        GemmaCausalLM.from_preset(preset, sequence_length=7, preprocessor=preprocessor)


@ONE_SHAPE
def test_tokenizer(preset, vocabulary):
    tokenizer = GemmaTokenizer.from_preset(preset, sequence_length=5)
    assert tokenizer.proto == vocabulary
    assert tokenizer.sequence_length == 5
    assert tokenizer.detokenize(GemmaTokenizer.from_preset(preset)("two  spaces")) == "two  spaces"


@ONE_SHAPE
def test_a_task_saved_without_preprocessor_has_none(preset, tmp_path):
    GemmaCausalLM.from_preset(preset, preprocessor=None).save_to_preset(tmp_path / "ours")
    assert GemmaCausalLM.from_preset(tmp_path / "ours").preprocessor is None
    assert keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path / "ours")).preprocessor is None


@pytest.mark.multi_backend
@ONE_SHAPE
def test_dtype(preset, tmp_path, logits):
    model = GemmaCausalLM.from_preset(preset, dtype="bfloat16")
    assert {v.dtype for v in model.backbone.trainable_variables} == {"bfloat16"}
    model.save_to_preset(tmp_path / "ours", max_shard_size=1e-4)
    # Floating weights follow the current policy, as in keras-hub.
    again = GemmaBackbone.from_preset(tmp_path / "ours")
    assert {v.dtype for v in again.trainable_variables} == {"float32"}
    for ours, saved in zip(again.variables, model.backbone.variables):
        difference = keras.ops.cast(ours, "float32") - keras.ops.cast(saved, "float32")
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(difference), 0)


@ONE_SHAPE
def test_the_file_keeps_the_models_dtype(preset, tmp_path):
    GemmaBackbone.from_preset(preset, dtype="bfloat16").save_to_preset(tmp_path / "half")
    weights = "model.weights.h5"
    assert (tmp_path / "half" / weights).stat().st_size < 0.8 * (preset / weights).stat().st_size


@ONE_SHAPE
def test_load_weights_false(preset, logits):
    model = GemmaCausalLM.from_preset(preset, load_weights=False)
    loaded = GemmaCausalLM.from_preset(preset)
    assert [v.shape for v in model.variables] == [v.shape for v in loaded.variables]
    assert not np.allclose(logits(model), logits(loaded))


def _rename(content, old, new):
    return json.loads(json.dumps(content).replace(old, new))


@ONE_SHAPE
def test_names_of_keras_nlp(preset, logits):
    expected = logits(GemmaCausalLM.from_preset(preset))
    for path in preset.glob("*.json"):
        path.write_text(json.dumps(_rename(json.loads(path.read_text()), "keras_hub", "keras_nlp")))
    # The first presets had no task.json, and named the weights in config.json.
    (preset / "task.json").unlink()
    config = json.loads((preset / "config.json").read_text())
    del config["config"]["dtype"]
    (preset / "config.json").write_text(json.dumps({**config, "weights": "first.weights.h5", "assets": []}))
    (preset / "model.weights.h5").rename(preset / "first.weights.h5")

    model = GemmaCausalLM.from_preset(preset)
    np.testing.assert_allclose(logits(model), expected, atol=1e-6)
    assert model.preprocessor.sequence_length == 24


@ONE_SHAPE
def test_int8(preset, tmp_path, logits):
    reference = keras_hub.models.GemmaCausalLM.from_preset(str(preset))
    reference.backbone.quantize("int8")
    reference.save_to_preset(tmp_path / "int8")
    expected = logits(reference)

    model = GemmaCausalLM.from_preset(tmp_path / "int8")
    assert model.backbone.token_embedding.embeddings.dtype == "int8"
    # Activations are rounded to 8 bits too: a last bit of float32 can tip one of them over to the next step.
    np.testing.assert_allclose(logits(model), expected, atol=0.02)
    _assert_same_weights(model, reference)
    model.save_to_preset(tmp_path / "ours")
    back = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path / "ours"))
    _assert_same_weights(back, reference)
    np.testing.assert_allclose(logits(back), expected, atol=0.02)
    half = GemmaCausalLM.from_preset(tmp_path / "int8", dtype="bfloat16")
    assert half.backbone.token_embedding.embeddings.dtype == "int8"
    assert half.backbone.layer_norm.scale.dtype == "bfloat16"


def _assert_same_weights(model, expected):
    for one, other in zip(model.backbone.weights, expected.backbone.weights, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other))


@ONE_SHAPE
def test_lora_is_merged(preset, tmp_path, logits):
    model = GemmaCausalLM.from_preset(preset)
    model.backbone.enable_lora(2)
    for block in model.backbone.transformer_layers:
        factor = block.attention.query_dense.lora_kernel_b
        factor.assign(np.full(factor.shape, 0.1))
    model.save_to_preset(tmp_path / "ours")
    np.testing.assert_allclose(logits(GemmaCausalLM.from_preset(tmp_path / "ours")), logits(model), atol=1e-4)


@ONE_SHAPE
def test_dropout_draws_after_loading(preset):
    backbone = GemmaBackbone.from_preset(preset, dropout=0.5)
    ones = np.ones((2, 5), "int32")
    outputs = [
        keras.ops.convert_to_numpy(backbone({"token_ids": ones, "padding_mask": ones}, training=True)) for _ in range(2)
    ]
    assert not np.allclose(*outputs)


def test_presets_of_other_architectures_are_refused_by_name(tmp_path):
    keras_hub.models.GPT2Backbone(
        vocabulary_size=10, num_layers=1, num_heads=1, hidden_dim=4, intermediate_dim=8, max_sequence_length=8
    ).save_to_preset(tmp_path)
    with pytest.raises(ValueError, match="GPT2Backbone"):
        GemmaBackbone.from_preset(tmp_path)


@ONE_SHAPE
def test_gemma_2_is_refused(preset):
    config = json.loads((preset / "config.json").read_text())
    config["config"]["use_post_ffw_norm"] = True
    (preset / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Gemma 1 has"):
        GemmaBackbone.from_preset(preset)


@ONE_SHAPE
def test_variables_take_the_layout_of_the_distribution(preset):
    if keras.config.backend() != "jax":
        pytest.skip("keras.distribution works on JAX")
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), keras.distribution.list_devices()[:1])
    layout_map = GemmaBackbone.get_layout_map(mesh)
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout_map))
    try:
        backbone = GemmaBackbone.from_preset(preset)
    finally:
        keras.distribution.set_distribution(before)
    assert tuple(backbone.token_embedding.embeddings.value.sharding.spec) == ("model", "batch")
