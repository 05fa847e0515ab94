"""Adapters: files that say what they are for, and back to a model without."""

import keras
import keras_hub
import numpy as np
import pytest

from keras_gemma.models import GemmaBackbone

SHAPE = {
    "vocabulary_size": 64, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1,
    "hidden_dim": 16, "intermediate_dim": 32, "head_dim": 8,
}  # fmt: skip
EVERYTHING = [
    "token_embedding", "query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear",
]  # fmt: skip
ONES = np.ones((1, 5), "int32")


def make(cls=GemmaBackbone, mode=None, **other):
    keras.utils.set_random_seed(0)
    backbone = cls(**{**SHAPE, **other})
    if mode:
        backbone.quantize(mode)
    return backbone


def tuned(backbone, rank=3, names=None, **alpha):
    backbone.enable_lora(rank, target_layer_names=names, **alpha)
    random = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        variable.assign(0.3 * random.normal(size=variable.shape))
    return backbone


def outputs(backbone):
    hidden = backbone({"token_ids": ONES, "padding_mask": ONES})
    return keras.ops.convert_to_numpy(keras.ops.cast(hidden, "float32"))


@pytest.mark.parametrize(
    "mode, names", [(None, ["ffw_linear"]), (None, ["query", "value", "ffw_linear"]), ("int8", EVERYTHING)]
)
def test_adapters_of_any_layers_are_saved_and_loaded(tmp_path, mode, names):
    backbone = tuned(make(mode=mode), names=names, lora_alpha=5)
    backbone.save_lora_weights(tmp_path / "x.lora.h5")
    other = make(mode=mode)
    assert np.abs(outputs(other) - outputs(backbone)).max() > 0.01
    other.load_lora_weights(tmp_path / "x.lora.h5")
    np.testing.assert_allclose(outputs(other), outputs(backbone), atol=1e-5)
    assert [v.path for v in other.trainable_variables] == [v.path for v in backbone.trainable_variables]
    # Into adapters that are there as well.
    again = tuned(make(mode=mode), names=names)
    again.load_lora_weights(tmp_path / "x.lora.h5")
    np.testing.assert_allclose(outputs(again), outputs(backbone), atol=1e-5)


@pytest.mark.parametrize(
    "writer, reader", [(keras_hub.models.GemmaBackbone, GemmaBackbone), (GemmaBackbone, keras_hub.models.GemmaBackbone)]
)
def test_files_are_those_of_keras_hub(tmp_path, writer, reader):
    backbone = tuned(make(writer), rank=2)
    backbone.save_lora_weights(str(tmp_path / "x.lora.h5"))
    other = make(reader)
    other.load_lora_weights(str(tmp_path / "x.lora.h5"))
    for one, another in zip(backbone.trainable_variables, other.trainable_variables):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(another))


@pytest.mark.parametrize("writer", [GemmaBackbone, keras_hub.models.GemmaBackbone])
@pytest.mark.parametrize(
    "other, sentence",
    [
        ({"num_layers": 3}, "no layer. It has 2 blocks"),
        ({"num_layers": 1}, "of a smaller model"),
        ({"head_dim": 4}, "shapes"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, writer, other, sentence):
    tuned(make(writer, **other)).save_lora_weights(str(tmp_path / "x.lora.h5"))
    backbone = make()
    before, trainable = outputs(backbone), len(backbone.trainable_weights)
    with pytest.raises(ValueError, match=sentence) as error:
        backbone.load_lora_weights(str(tmp_path / "x.lora.h5"))
    assert "x.lora.h5" in str(error.value)
    assert len(backbone.trainable_weights) == trainable
    np.testing.assert_array_equal(outputs(backbone), before)


def test_other_adapters_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.lora.h5"
    tuned(make(), rank=2, names=["key"]).save_lora_weights(path)
    for there in (tuned(make(), rank=2), tuned(make(), rank=1, names=["key"])):
        with pytest.raises(ValueError, match=r"rank 2 for key.*disable_lora"):
            there.load_lora_weights(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"x\.lora\.h5"):
        make().load_lora_weights(path)
    with pytest.raises(FileNotFoundError, match=r"none\.lora\.h5"):
        make().load_lora_weights(tmp_path / "none.lora.h5")
    with pytest.raises(ValueError, match=r"ends with `\.lora\.h5`"):
        tuned(make()).save_lora_weights(tmp_path / "x.h5")
    with pytest.raises(ValueError, match="enable_lora"):
        make().save_lora_weights(path)


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_adapters_are_taken_away_and_merged(mode):
    backbone = make(mode=mode)
    bare, variables, trainable = outputs(backbone), len(backbone.variables), len(backbone.trainable_variables)
    tuned(backbone, names=EVERYTHING, lora_alpha=1)
    adapted = outputs(backbone)
    assert np.abs(adapted - bare).max() > 0.01
    backbone.disable_lora()
    np.testing.assert_array_equal(outputs(backbone), bare)
    assert (len(backbone.variables), len(backbone.trainable_variables)) == (variables, trainable)
    tuned(backbone, names=EVERYTHING, lora_alpha=1)
    backbone.merge_lora()
    assert (len(backbone.variables), len(backbone.trainable_variables)) == (variables, trainable)
    # Sums are quantised anew.
    np.testing.assert_allclose(outputs(backbone), adapted, atol={None: 1e-5, "int8": 0.1, "int4": 1.5}[mode])
    for method in (backbone.disable_lora, backbone.merge_lora):
        with pytest.raises(ValueError, match="enable_lora"):
            method()


def test_adapters_are_merged_in_float32(tmp_path):
    backbone = tuned(make(dtype="mixed_bfloat16"))
    layer = backbone.transformer_layers[0].attention.query_dense
    first, second, kernel = (np.array(v) for v in (layer.lora_kernel_a, layer.lora_kernel_b, layer._kernel))
    backbone.merge_lora()
    np.testing.assert_allclose(np.array(layer._kernel), kernel + first @ second, atol=1e-6)


def test_adapters_are_given_once():
    backbone = tuned(make())
    with pytest.raises(ValueError, match="disable_lora"):
        backbone.enable_lora(2)
    for method in (lambda: make(mode="float8").enable_lora(2), lambda: backbone.quantize("float8")):
        with pytest.raises(ValueError, match="float8"):
            method()
