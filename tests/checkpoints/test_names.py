"""Presets known by name, and where their files come from, without a network."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import keras
import keras_hub
import pytest

from keras_gemma.checkpoints.filling import without_values
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor
from keras_gemma.models import GemmaTokenizer

OFFICIAL = [name for name, preset in GemmaCausalLM.presets.items() if "kaggle_handle" in preset]
HUB_PRESETS = keras_hub.models.GemmaBackbone.presets


@pytest.mark.parametrize("cls", [GemmaBackbone, GemmaCausalLM, GemmaCausalLMPreprocessor, GemmaTokenizer])
def test_every_class_lists_the_presets(cls):
    assert {"gemma_2b_en", "gemma_1.1_instruct_7b_en", "code_gemma_7b_en"} <= set(cls.presets)
    with pytest.raises(ValueError, match=r"Received: 'gemma_3b'.*gemma_2b_en"):
        cls.from_preset("gemma_3b")


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_presets_are_those_of_keras_hub(name):
    ours, theirs = GemmaCausalLM.presets[name], HUB_PRESETS[name]
    assert ours["kaggle_handle"] == theirs["kaggle_handle"]
    assert ours["metadata"]["params"] == theirs["metadata"]["params"]


def test_all_of_gemma_1_is_listed():
    first = {name for name, preset in HUB_PRESETS.items() if "/gemma/keras/" in preset["kaggle_handle"]}
    first |= {name for name, preset in HUB_PRESETS.items() if "/codegemma/keras/" in preset["kaggle_handle"]}
    assert set(OFFICIAL) == first


def test_keras_hub_keeps_its_own_lists():
    for preset in keras_hub.models.CausalLM.presets.values():
        assert "folder" not in preset
    assert "gemma_tiny_en" not in keras_hub.models.Backbone.presets


@pytest.mark.parametrize("name", OFFICIAL)
def test_configurations_have_the_parameters_of_the_report(name):
    # Shapes only: the values would take up to 34 GB.
    with without_values():
        backbone = GemmaBackbone.from_preset(name, load_weights=False)
    assert backbone.count_params() == GemmaBackbone.presets[name]["metadata"]["params"]


def _no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")


def test_without_vocabulary_at_hand(monkeypatch, tmp_path):
    _no_network(monkeypatch, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match="preprocessor=None"):
        GemmaCausalLM.from_preset("gemma_2b_en", load_weights=False)


@pytest.fixture
def saved(tmp_path, shape, reference_model):
    reference_model(shape).save_to_preset(tmp_path / "saved")
    return tmp_path / "saved"


ONE_SHAPE = pytest.mark.parametrize("shape", ["2b"], indirect=True)


@ONE_SHAPE
def test_kaggle_handles(saved, shape, monkeypatch, tmp_path):
    """A name, and a handle, through kagglehub's own cache."""
    from kagglehub.cache import Cache
    from kagglehub.handle import parse_model_handle

    _no_network(monkeypatch, tmp_path)
    kaggle = GemmaCausalLM.presets["gemma_2b_en"]["kaggle_handle"]
    handle, cache = parse_model_handle(kaggle.removeprefix("kaggle://")), Cache()
    for path in saved.rglob("*.*"):
        name = str(path.relative_to(saved))
        target = Path(cache.get_path(handle, name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        cache.mark_as_complete(handle, name)
    assert GemmaBackbone.from_preset("gemma_2b_en").num_layers == shape["num_layers"]
    assert GemmaCausalLMPreprocessor.from_preset(kaggle).sequence_length == 24
    assert GemmaTokenizer.from_preset("gemma_2b_en").vocabulary_size() == 500


@ONE_SHAPE
def test_hugging_face_handles_with_shards(saved, monkeypatch, tmp_path):
    """A handle through huggingface_hub's own cache."""
    GemmaBackbone.from_preset(saved).save_to_preset(saved, max_shard_size=1e-4)
    assert (saved / "model_00001.weights.h5").exists()
    cache = tmp_path / "cache"
    repository = cache / "models--someone--gemma"
    shutil.copytree(saved, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = GemmaCausalLM.from_preset("hf://someone/gemma")
    assert model.preprocessor.sequence_length == 24
    for ours, whole in zip(model.backbone.get_weights(), GemmaBackbone.from_preset(saved).get_weights()):
        assert keras.ops.all(ours == whole)


@pytest.mark.network
def test_download_of_an_official_vocabulary():
    assert GemmaTokenizer.from_preset("gemma_2b_en").vocabulary_size() == 256000
