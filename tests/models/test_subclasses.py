"""What users derive from the models and what Keras does with them: presets, clones, exports, torch."""

import keras
import numpy as np
import pytest
from generation.conftest import rows_of

from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaRewardModel

INPUTS = {
    "token_ids": np.array([[2, 9, 30, 4, 0], [2, 8, 0, 0, 0]]),
    "padding_mask": np.array([[1] * 4 + [0], [1, 1, 0, 0, 0]]),
}
SETTINGS = {"stop_token_ids": None, "max_new_tokens": 5}


class WithHead(GemmaCausalLM):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.value_head = keras.layers.Dense(1)
        self.value_head.build((None, self.backbone.hidden_dim))


def test_a_layer_of_ones_own_begins_fresh_and_is_kept(make_model, tmp_path):
    model = make_model()
    model.save_to_preset(str(tmp_path / "base"))
    own = WithHead.from_preset(str(tmp_path / "base"))
    inputs = {name: values.astype("int32") for name, values in INPUTS.items()}
    np.testing.assert_allclose(own(inputs), model(inputs), atol=1e-6)
    own.value_head.kernel.assign(own.value_head.kernel + 1.0)
    own.save_to_preset(str(tmp_path / "own"))
    again = WithHead.from_preset(str(tmp_path / "own"))
    np.testing.assert_array_equal(again.value_head.kernel, own.value_head.kernel)
    # What was saved with a head is not loaded without it.
    (tmp_path / "own" / "task.weights.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"task\.weights\.h5"):
        WithHead.from_preset(str(tmp_path / "own"))


@pytest.mark.multi_backend
def test_clones(make_model):
    model = make_model()
    model.compile(sampler="top_k")
    clone = keras.models.clone_model(model)
    assert len(clone.weights) == len(model.weights)
    clone.set_weights(model.get_weights())
    inputs = {name: values.astype("int32") for name, values in INPUTS.items()}
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(clone(inputs)), keras.ops.convert_to_numpy(model(inputs)), atol=1e-6
    )
    clone.fit(inputs, inputs["token_ids"], verbose=0)
    assert model.get_compile_config()["sampler"]["class_name"] == "TopKSampler"
    reward = GemmaRewardModel(model.backbone)
    assert len(keras.models.clone_model(reward).weights) == len(reward.weights)
    assert "centring" in reward.get_compile_config()


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch exports other formats")
def test_exports_take_any_batch_and_length(make_model, tmp_path):
    tf = pytest.importorskip("tensorflow")
    model = make_model()
    for name, exported in (("model", model), ("backbone", model.backbone)):
        exported.export(str(tmp_path / name), verbose=False)
        loaded = tf.saved_model.load(str(tmp_path / name))
        for rows, repeats in ((1, 1), (2, 1), (2, 30)):
            inputs = {key: np.tile(values[:rows], (1, repeats)).astype("int32") for key, values in INPUTS.items()}
            np.testing.assert_allclose(loaded.serve(inputs).numpy(), np.asarray(exported(inputs)), atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch")
@pytest.mark.multi_backend
def test_torch_finds_the_parameters(make_model):
    model = make_model()
    for of in (model, model.backbone):
        parameters = list(of.parameters())
        assert [id(p) for p in parameters] == [id(weight.value) for weight in of.weights]
        assert len(dict(of.named_parameters())) == len(of.weights)
    inputs = {name: values.astype("int32") for name, values in INPUTS.items()}
    model(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_overridden_call_with_cache_chooses_the_tokens(make_model):
    class Forbidding(GemmaCausalLM):
        forbidden = ()
        calls = 0

        def call_with_cache(self, token_ids, cache, cache_update_index):
            self.__dict__["calls"] = self.calls + 1
            logits, hidden, cache = super().call_with_cache(token_ids, cache, cache_update_index)
            of_token = keras.ops.arange(keras.ops.shape(logits)[-1])[:, None] == np.array([-1, *self.forbidden])
            return keras.ops.where(keras.ops.any(of_token, axis=-1), -1e9, logits), hidden, cache

    model = make_model()
    own = Forbidding(model.backbone, model.preprocessor)
    for settings in (
        {}, {"temperature": 1.0, "seed": 3, "num_return_sequences": 2, "repetition_penalty": 1.2},
        {"sampler": "beam"}, {"sampler": "contrastive"},
    ):  # fmt: skip
        before = own.calls
        assert rows_of(own.generate(INPUTS, **settings, **SETTINGS)) == rows_of(
            model.generate(INPUTS, **settings, **SETTINGS)
        )
        assert own.calls > before
    texts = ["The license", "a"]
    free = model.generate(texts, strip_prompt=True, **SETTINGS)
    assert ["".join(p for row, p in own.stream(texts, **SETTINGS) if row == i) for i in (0, 1)] == free
    own.__dict__["forbidden"] = set(np.concatenate(rows_of(model.generate(INPUTS, strip_prompt=True, **SETTINGS))))
    rows = rows_of(own.generate(INPUTS, strip_prompt=True, **SETTINGS))
    assert not own.forbidden & set(np.concatenate(rows))


def test_an_overridden_generate_step_is_called(make_model):
    class Own(GemmaCausalLM):
        seen = ()

        def generate_step(self, inputs, stop_token_ids=None):
            self.__dict__["seen"] = (*self.seen, (tuple(inputs["token_ids"].shape), stop_token_ids))
            return super().generate_step(inputs, stop_token_ids=stop_token_ids)

    model = make_model()
    own = Own(model.backbone, model.preprocessor)
    texts = ["The license", "a"]
    settings = {"max_new_tokens": 5, "stop_token_ids": [1]}
    for further in ({}, {"temperature": 1.0, "seed": 3}, {"strip_prompt": True, "stop": "e"}):
        assert own.generate(texts, **settings, **further) == model.generate(texts, **settings, **further)
    longest = max(len(model.preprocessor.prompt_ids(text)) for text in texts)
    assert own.seen == (((2, longest + 5), (1,)),) * 3
    assert rows_of(own.generate(INPUTS, stop_token_ids=None)) == rows_of(model.generate(INPUTS, stop_token_ids=None))
    assert rows_of(own.generate_step(INPUTS)) == rows_of(model.generate_step(INPUTS))
    for call in (lambda: own.stream("a"), lambda: own.generate("a", return_log_probs=True)):
        with pytest.raises(ValueError, match="overridden `generate_step`"):
            call()


def test_what_was_never_compiled_says_so(make_model):
    model = make_model(with_preprocessor=False)
    bare = GemmaCausalLM(model.backbone, compile=False)
    reward = GemmaRewardModel(model.backbone, compile=False)
    for of in (bare, reward):
        for method in ("fit", "evaluate"):
            with pytest.raises(ValueError, match=rf"`{method}` needs .*`compile\(\)`"):
                getattr(of, method)(INPUTS)
    assert rows_of(bare.generate(INPUTS, **SETTINGS)) == rows_of(model.generate(INPUTS, **SETTINGS))
