"""GPTQ and AWQ: measured on texts, saved, loaded, continued."""

import keras_hub
import numpy as np
import pytest
from keras.quantizers import AWQConfig
from keras.quantizers import GPTQConfig
from keras.src.quantizers.gptq import GPTQ
from keras.src.quantizers.gptq_core import stream_hessians

from keras_gemma.models import GemmaCausalLM
from keras_gemma.models.einsum_dense import EinsumDense

TEXTS = ["the License", "a work", "you may", "12 34"]
LONGER = ["You may reproduce and distribute copies of the Work or Derivative Works thereof in any medium."] * 2


def config(cls, model, **kwargs):
    settings = {"num_samples": 2, "sequence_length": 15, "group_size": 4, **kwargs}
    return cls(dataset=LONGER, tokenizer=model.preprocessor.tokenizer, **settings)


def logits(model):
    return model.predict(TEXTS, batch_size=4, verbose=0)


@pytest.mark.parametrize("mode, cls", [("gptq", GPTQConfig), ("awq", AWQConfig)])
def test_calibrated_models_are_saved_loaded_and_continued(make_model, tmp_path, mode, cls):
    model = make_model()
    before = logits(model)
    model.quantize(mode, config=config(cls, model))
    after = logits(model)
    # Kernels of 8 rows: a model in which four bits are few.
    assert 0 < np.sqrt(np.mean((after - before) ** 2)) < 0.6 * np.std(before)
    model.save_to_preset(tmp_path / "preset")
    restored = GemmaCausalLM.from_preset(tmp_path / "preset", sequence_length=12)
    np.testing.assert_allclose(logits(restored), after, atol=1e-5)
    if mode == "gptq":
        assert restored.generate("the License", max_length=10) == model.generate("the License", max_length=10)
    peer = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path / "preset"))
    x = {name: np.array(values, "int32") for name, values in model.preprocessor(TEXTS)[0].items()}
    differences = np.abs(np.array(peer(x)) - np.array(model(x))).max(axis=-1)
    assert (differences[x["padding_mask"] > 0] < 1e-4).all()
    # Their weights do not train, and take no adapters.
    restored.compile()
    with pytest.raises(ValueError, match="Quantised weights do not train"):
        restored.fit(TEXTS, verbose=0)
    with pytest.raises(ValueError, match=mode):
        restored.backbone.enable_lora(2)


def test_adapters_are_merged_before_calibration(make_model):
    model = make_model()
    model.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="merge_lora"):
        model.quantize("gptq", config=config(GPTQConfig, model))


def test_every_head_is_measured_by_itself():
    """What GPTQ minimises for heads `[N, D, H]` is the error of each: none makes up for another's."""
    layer = EinsumDense("btd,ndh->btnh", output_shape=(None, 2, 4), name="query")
    inputs = np.random.default_rng(0).normal(size=(1, 5, 8)).astype("float32")
    layer.build(inputs.shape)
    outputs = np.array(layer(inputs))
    settings = GPTQConfig(dataset=["x"], tokenizer=None, group_size=-1)
    layer.quantize("gptq", config=settings)
    solver = GPTQ(layer, settings)
    with stream_hessians({"q": layer}, {"q": solver}):
        np.testing.assert_allclose(layer(inputs), outputs, atol=1e-6)
    gram = 2 / 10 * np.kron(np.eye(2), inputs[0].T @ inputs[0])
    np.testing.assert_allclose(solver.hessian, gram, atol=1e-5)
