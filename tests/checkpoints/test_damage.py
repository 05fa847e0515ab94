"""A folder that is not complete and consistent is refused whole, with the file and the variable named."""

import json
import shutil

import h5py
import pytest
from canonical_tensors import refuses

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM

QUERY = "layers/gemma_decoder_block_2/attention/query_dense/vars/0"
QUERY_PATH = "decoder_block_2/attention/query/kernel"


@pytest.fixture(scope="module")
def sound(tmp_path_factory, vocabulary, reference_model):
    folder = tmp_path_factory.mktemp("sound")
    shape = {
        "vocabulary_size": 500, "num_layers": 3, "num_query_heads": 2, "num_key_value_heads": 1,
        "hidden_dim": 8, "intermediate_dim": 16, "head_dim": 4,
    }  # fmt: skip
    model = reference_model(shape)
    model.save_to_preset(folder / "whole")
    model.save_to_preset(folder / "sharded", max_shard_size=1.6e-5)
    return folder


@pytest.fixture
def preset(sound, tmp_path):
    return shutil.copytree(sound / "whole", tmp_path / "preset")


@pytest.fixture
def sharded(sound, tmp_path):
    return shutil.copytree(sound / "sharded", tmp_path / "preset")


def _refuses(folder, *parts, error=ValueError):
    refuses(lambda: GemmaCausalLM.from_preset(folder), *parts, error=error)


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5", "assets/tokenizer/vocabulary.spm"])
def test_missing_file(preset, name):
    (preset / name).unlink()
    _refuses(preset, name, error=FileNotFoundError)


def test_missing_shard(sharded):
    assert len(list(sharded.glob("model_*"))) > 1
    (sharded / "model_00001.weights.h5").unlink()
    _refuses(sharded, "model_00001.weights.h5", error=FileNotFoundError)


@pytest.mark.parametrize("name", ["config.json", "task.json", "model.weights.h5", "assets/tokenizer/vocabulary.spm"])
def test_truncated_file(preset, name):
    content = (preset / name).read_bytes()
    (preset / name).write_bytes(content[: len(content) * 2 // 3])
    _refuses(preset, name)


@pytest.mark.parametrize("name", ["model.weights.json", "model_00000.weights.h5"])
def test_truncated_sharded_file(sharded, name):
    content = (sharded / name).read_bytes()
    (sharded / name).write_bytes(content[: len(content) * 2 // 3])
    _refuses(sharded, name)


def test_empty_weights(preset):
    (preset / "model.weights.h5").write_bytes(b"")
    _refuses(preset, "model.weights.h5")


def test_missing_tensor(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        del file[QUERY]
    _refuses(preset, "model.weights.h5", QUERY, QUERY_PATH)


def test_additional_tensor(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        file["layers/gemma_decoder_block_3/ffw_linear/vars/0"] = [1.0]
    _refuses(preset, "model.weights.h5", "layers/gemma_decoder_block_3/ffw_linear/vars/0")


def test_mismatched_shape(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        value = file[QUERY][()]
        del file[QUERY]
        file[QUERY] = value[:1]
    _refuses(preset, "model.weights.h5", QUERY, QUERY_PATH, "(1, 8, 4)", "(2, 8, 4)")


def test_mismatched_dtype(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        value = file[QUERY][()].astype("int32")
        del file[QUERY]
        file[QUERY] = value
    _refuses(preset, QUERY, QUERY_PATH, "int32", "float32")


def test_configuration_of_another_model(preset):
    content = json.loads((preset / "config.json").read_text())
    content["config"]["num_layers"] = 2
    (preset / "config.json").write_text(json.dumps(content))
    _refuses(preset, "task.json", "config.json", "num_layers")
    (preset / "task.json").unlink()
    _refuses(preset, "layers/gemma_decoder_block_2/")


def test_two_shards_with_the_same_tensor(sharded):
    shutil.copy(sharded / "model_00000.weights.h5", sharded / "model_00001.weights.h5")
    _refuses(sharded, "model_00000.weights.h5", "model_00001.weights.h5")


def test_a_shard_outside_the_folder_is_refused(sharded):
    index = json.loads((sharded / "model.weights.json").read_text())
    index["weight_map"] = {name: f"../{shard}" for name, shard in index["weight_map"].items()}
    (sharded / "model.weights.json").write_text(json.dumps(index))
    _refuses(sharded, "model.weights.json", "../model_0000")


def test_a_tensor_in_another_file_is_refused(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        del file[QUERY]
        file[QUERY] = h5py.ExternalLink("other.h5", "tensor")
    _refuses(preset, QUERY)


def test_neither_format(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="registered_name"):
        GemmaBackbone.from_preset(tmp_path)
