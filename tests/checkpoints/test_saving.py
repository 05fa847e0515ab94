"""Saving replaces a preset as a whole, or leaves a folder that does not load."""

import json
import os
import shutil

import keras_hub
import numpy as np
import pytest

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor
from keras_gemma.models import GemmaTokenizer

SHAPE = {
    "vocabulary_size": 500, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1,
    "hidden_dim": 8, "intermediate_dim": 16, "head_dim": 4,
}  # fmt: skip


@pytest.fixture
def make_model(vocabulary):
    def make(value, sequence_length=16):
        preprocessor = GemmaCausalLMPreprocessor(GemmaTokenizer(vocabulary), sequence_length=sequence_length)
        model = GemmaCausalLM(GemmaBackbone(**SHAPE), preprocessor)
        model.backbone.set_weights([np.full_like(weight, value) for weight in model.backbone.get_weights()])
        return model

    return make


def _values(model):
    return {float(value) for weight in model.backbone.get_weights() for value in np.unique(weight)}


def _files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


WHOLE = [
    "assets/tokenizer/vocabulary.spm", "config.json", "metadata.json", "model.weights.h5",
    "preprocessor.json", "task.json", "tokenizer.json",
]  # fmt: skip


def test_a_later_save_leaves_nothing_of_the_former(make_model, tmp_path):
    make_model(1).save_to_preset(tmp_path, max_shard_size=1.6e-5)
    assert "model_00001.weights.h5" in _files(tmp_path)
    (tmp_path / "README.md").write_text("The user's own.")
    make_model(2).save_to_preset(tmp_path)
    assert _files(tmp_path) == sorted([*WHOLE, "README.md"])
    assert _values(GemmaCausalLM.from_preset(tmp_path)) == {2.0}


@pytest.mark.parametrize("max_shard_size", [10, 1.6e-5])
def test_an_interrupted_save_is_never_a_mixture(make_model, tmp_path, monkeypatch, max_shard_size):
    make_model(1, sequence_length=11).save_to_preset(tmp_path / "former", max_shard_size=1.6e-5)
    new = make_model(2, sequence_length=22)
    whole = {(1.0, 11), (2.0, 22)}
    renames, seen = 0, set()
    while True:
        folder = shutil.copytree(tmp_path / "former", tmp_path / f"after_{renames}")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", _failing_after(renames, os.replace))
            try:
                new.save_to_preset(folder, max_shard_size=max_shard_size)
                break
            except KeyboardInterrupt:
                seen.add(_state(folder))
        renames += 1
    assert renames > 6
    assert seen <= whole | {None}
    assert _state(folder) == (2.0, 22)


def _failing_after(count, replace):
    calls = iter(range(count))

    def replace_or_fail(source, target):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return replace(source, target)

    return replace_or_fail


def _state(folder):
    try:
        model = GemmaCausalLM.from_preset(folder)
    except (ValueError, FileNotFoundError):
        return None
    (value,) = _values(model)
    return value, model.preprocessor.sequence_length


def test_what_cannot_be_saved_leaves_the_folder_as_it_was(make_model, tmp_path):
    model = make_model(1)
    model.save_to_preset(tmp_path / "preset")
    before = {name: (tmp_path / "preset" / name).read_bytes() for name in _files(tmp_path / "preset")}
    with pytest.raises(ValueError, match=r"max_shard_size.*token_embedding"):
        model.save_to_preset(tmp_path / "preset", max_shard_size=1e-6)
    model.preprocessor.tokenizer.set_proto(None)
    with pytest.raises(ValueError, match="vocabulary"):
        model.save_to_preset(tmp_path / "preset")
    with pytest.raises(ValueError, match="vocabulary"):
        model.save_to_preset(tmp_path / "new")
    assert before == {name: (tmp_path / "preset" / name).read_bytes() for name in _files(tmp_path / "preset")}
    assert not (tmp_path / "new").exists()


def test_piece_by_piece(make_model, tmp_path):
    model = make_model(1, sequence_length=11)
    model.backbone.save_to_preset(tmp_path)
    model.preprocessor.save_to_preset(tmp_path)
    loaded = GemmaCausalLM.from_preset(tmp_path)
    assert (_values(loaded), loaded.preprocessor.sequence_length) == ({1.0}, 11)
    assert keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path)).preprocessor.sequence_length == 11

    make_model(1).save_to_preset(tmp_path)
    model.preprocessor.save_to_preset(tmp_path)
    assert GemmaCausalLM.from_preset(tmp_path).preprocessor.sequence_length == 11
    model.preprocessor.tokenizer.save_to_preset(tmp_path)
    assert _files(tmp_path) == WHOLE


def test_a_preset_keeps_the_sampler_that_its_model_was_compiled_with(make_model, tmp_path):
    model = make_model(0.5)
    for sampler in (keras_hub.samplers.TopPSampler(p=0.8, temperature=0.7), keras_hub.samplers.GreedySampler()):
        model.compile(sampler=sampler)
        model.save_to_preset(tmp_path)
        loaded = GemmaCausalLM.from_preset(tmp_path)
        assert loaded.sampler.get_config() == sampler.get_config()
        assert type(loaded.sampler) is type(sampler)
        keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path))
    task = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps({**task, "sampler": {"class_name": "TopKSampler", "config": 3}}))
    with pytest.raises(ValueError, match=r"task\.json. of .* damaged sampler"):
        GemmaCausalLM.from_preset(tmp_path)
