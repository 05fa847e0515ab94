"""Folders made by transformers load to the same logits; damage and other architectures are refused."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from canonical_tensors import refuses

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM

QUERY = "model.layers.1.self_attn.q_proj.weight"
QUERY_PATH = "decoder_block_1/attention/query/kernel"
FIRST_SHARD = "model-00001-of-"


def _reference(shape):
    config = transformers.GemmaConfig(
        vocab_size=shape["vocabulary_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_query_heads"],
        num_key_value_heads=shape["num_key_value_heads"],
        hidden_size=shape["hidden_dim"],
        intermediate_size=shape["intermediate_dim"] // 2,
        head_dim=shape["head_dim"],
    )
    torch.manual_seed(1)
    model = transformers.GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if "norm" in name else 0.1)
    return model


def _logits(reference):
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        return reference(ids).logits.float().numpy()


@pytest.fixture
def folder(tmp_path, shape, vocabulary):
    reference = _reference(shape)
    reference.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(vocabulary)
    return tmp_path


ONE_SHAPE = pytest.mark.parametrize("shape", ["2b"], indirect=True)


@pytest.mark.multi_backend
def test_logits_of_transformers(folder, logits):
    expected = _logits(transformers.GemmaForCausalLM.from_pretrained(folder))
    model = GemmaCausalLM.from_preset(folder)
    np.testing.assert_allclose(logits(model), expected, atol=1e-4)
    assert model.preprocessor.tokenizer.detokenize(model.preprocessor.tokenizer("as it is")) == "as it is"


def test_sharded_and_bfloat16(folder, shape, logits):
    whole = GemmaCausalLM.from_preset(folder, dtype="bfloat16")
    (folder / "model.safetensors").unlink()
    _reference(shape).to(torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    np.testing.assert_array_equal(logits(GemmaCausalLM.from_preset(folder, dtype="bfloat16")), logits(whole))


@ONE_SHAPE
def test_a_bare_model_and_a_tied_head(folder, shape):
    whole = GemmaBackbone.from_preset(folder)
    reference = _reference(shape)
    reference.model.save_pretrained(folder)
    bare = GemmaBackbone.from_preset(folder)
    state = {name: value.contiguous().clone() for name, value in reference.state_dict().items()}
    assert "lm_head.weight" in state
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors")
    tied = GemmaBackbone.from_preset(folder)
    for values in zip(whole.get_weights(), bare.get_weights(), tied.get_weights()):
        np.testing.assert_array_equal(values[0], values[1])
        np.testing.assert_array_equal(values[0], values[2])


def _refuses(folder, *parts, error=ValueError):
    refuses(lambda: GemmaCausalLM.from_preset(folder), *parts, error=error)


def _change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@ONE_SHAPE
def test_other_architectures_are_refused_by_name(folder):
    for model_type in ("gemma2", "llama"):
        _change_config(folder, model_type=model_type)
        _refuses(folder, model_type)
    _change_config(folder, model_type="gemma", quantization_config={"load_in_8bit": True})
    _refuses(folder, "quantization_config")
    _change_config(folder, quantization_config=None, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    _refuses(folder, "10000", "1000000")


@ONE_SHAPE
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    _refuses(folder, name, error=FileNotFoundError)


@ONE_SHAPE
def test_truncated_file(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 100, len(content) - 1):
        path.write_bytes(content[:length])
        _refuses(folder, "model.safetensors", "truncated")


def _rewrite(path, change):
    """Writes a safetensors file again, with its tensors as `change` leaves them."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


@ONE_SHAPE
def test_missing_additional_and_mismatched_tensors(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, "model.layers.4.stray": tensors[QUERY]}, path)
    _refuses(folder, "model.safetensors", "model.layers.4.stray")
    safetensors.numpy.save_file(tensors, path)
    _rewrite(path, lambda header: header[QUERY].update(shape=header[QUERY]["shape"][:1] + [8, 4]))
    _refuses(folder, "model.safetensors", QUERY, QUERY_PATH, "(32, 8, 4)", "(32, 32)")
    _rewrite(path, lambda header: header[QUERY].update(dtype="I32"))
    _refuses(folder, "model.safetensors", QUERY, "I32")
    safetensors.numpy.save_file({name: array for name, array in tensors.items() if name != QUERY}, path)
    _refuses(folder, "model.safetensors", QUERY, QUERY_PATH)


@ONE_SHAPE
@pytest.mark.parametrize(
    "entry",
    [
        [],
        {"dtype": "F32", "shape": [32, 32]},
        {"dtype": "F32", "data_offsets": [0, 4096]},
        {"shape": [32, 32], "data_offsets": [0, 4096]},
        {"dtype": "F32", "shape": 1024, "data_offsets": [0, 4096]},
        {"dtype": "F32", "shape": [-32, -32], "data_offsets": [0, 4096]},
        {"dtype": "F32", "shape": [32, 32], "data_offsets": [-100, 3996]},
        {"dtype": "F32", "shape": [32, 32], "data_offsets": [4096, 0]},
    ],
)
def test_damaged_headers(folder, entry):
    _rewrite(folder / "model.safetensors", lambda header: header.update({QUERY: entry}))
    _refuses(folder, "model.safetensors", QUERY)


@ONE_SHAPE
def test_a_header_that_is_a_list(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    _refuses(folder, "model.safetensors", "list")


@ONE_SHAPE
@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {QUERY: 3}}, {"weight_map": {QUERY: ".."}}])
def test_damaged_indices(folder, content):
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    _refuses(folder, "model.safetensors.index.json")
