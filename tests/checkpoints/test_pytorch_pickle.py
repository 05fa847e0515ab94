"""What torch saved as gemma_pytorch and Hugging Face have it is read to the bit; nothing but tensors is unpickled."""

import json
import os
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from canonical_tensors import DTYPES
from canonical_tensors import SIZES
from canonical_tensors import assert_logits
from canonical_tensors import assert_same
from canonical_tensors import canonical_arrays
from canonical_tensors import stored_in_memory

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import convert
from keras_gemma.checkpoints import hugging_face
from keras_gemma.checkpoints import pytorch_pickle
from keras_gemma.checkpoints.converting import opened

QKV = "model.layers.1.self_attn.qkv_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(params=SIZES)
def shape(request):
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def _tensor(array):
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _rows(array):
    """(N, D, H) as (N·H, D): head after head, one row for each of a head's numbers."""
    return np.concatenate([head.T for head in array])


def _state(sizes, arrays):
    """The state of google's gemma_pytorch."""
    state = {"embedder.weight": arrays["embedding"], "model.norm.weight": arrays["final_norm"]}
    for index in range(sizes.num_layers):
        layer, block = f"model.layers.{index}.", f"blocks.{index}."
        state[layer + "self_attn.qkv_proj.weight"] = np.concatenate(
            [_rows(arrays[block + part]) for part in ("query", "key", "value")]
        )
        state[layer + "self_attn.o_proj.weight"] = np.concatenate(list(arrays[block + "output"])).T
        state[layer + "input_layernorm.weight"] = arrays[block + "attention_norm"]
        state[layer + "post_attention_layernorm.weight"] = arrays[block + "ffw_norm"]
        for part in ("gate", "up", "down"):
            state[layer + f"mlp.{part}_proj.weight"] = arrays[block + part].T
    rotations = torch.polar(torch.ones(8, sizes.head_dim // 2), torch.ones(8, sizes.head_dim // 2))
    return {"freqs_cis": rotations, **{name: _tensor(array) for name, array in state.items()}}


def _save(path, state):
    torch.save({"model_state_dict": state}, path)
    return path


@pytest.fixture
def state():
    return _state(SIZES["2b"], canonical_arrays(SIZES["2b"]))


# === gemma_pytorch ===


def test_what_torch_saved_is_read_to_the_bit(tmp_path, shape, dtype):
    arrays = canonical_arrays(SIZES[shape], dtype)
    path = _save(tmp_path / "gemma-2b.ckpt", _state(SIZES[shape], arrays))
    for place in (path, tmp_path):
        assert pytorch_pickle.is_here(place)
        checkpoint = pytorch_pickle.checkpoint(place)
        assert checkpoint.format == "pytorch" and checkpoint.sizes == SIZES[shape]
        assert checkpoint.proto() is None
        assert_same(checkpoint.tensors, arrays)
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    assert pytorch_pickle.checkpoint(path).proto() == b"pieces"


@pytest.mark.parametrize("kind", ["gemma_pytorch", "hugging_face"])
def test_to_another_format(tmp_path, shape, dtype, kind):
    arrays, source = canonical_arrays(SIZES[shape], dtype), tmp_path / "source"
    source.mkdir()
    if kind == "gemma_pytorch":
        source = _save(source / "gemma.ckpt", _state(SIZES[shape], arrays))
    else:
        torch.save(_hugging_face(source, SIZES[shape], arrays), source / "pytorch_model.bin")
    assert convert(source, tmp_path / "keras", format="keras", progress=False).format == "pytorch"
    written = opened(tmp_path / "keras")
    assert written.format == "keras" and written.sizes == SIZES[shape]
    assert_same(written.tensors, arrays)


def test_logits_of_the_layers_of_torch(tmp_path, shape):
    sizes = SIZES[shape]
    state = _state(sizes, canonical_arrays(sizes))
    path = _save(tmp_path / "gemma.ckpt", state)
    blocks = [_linears(state, f"model.layers.{index}.", sizes) for index in range(sizes.num_layers)]
    embedding, final_norm = state["embedder.weight"].numpy(), state["model.norm.weight"].numpy()
    assert_logits(pytorch_pickle.checkpoint(path), embedding, blocks, final_norm)


def _linears(state, layer, sizes):
    heads, key_value_heads, head_dim = sizes.num_query_heads, sizes.num_key_value_heads, sizes.head_dim

    def linear(name):
        return lambda x: torch.nn.functional.linear(torch.from_numpy(x), state[f"{layer}{name}.weight"].double())

    def project(x):
        qkv = linear("self_attn.qkv_proj")(x)
        parts = qkv.split([heads * head_dim, key_value_heads * head_dim, key_value_heads * head_dim], dim=-1)
        return [part.view(*part.shape[:2], -1, head_dim).numpy() for part in parts]

    return {
        "attention_norm": state[layer + "input_layernorm.weight"].numpy(),
        "project": lambda x: project(x.astype("float64")),
        "output": lambda x: linear("self_attn.o_proj")(x.reshape(*x.shape[:2], -1)).numpy(),
        "ffw_norm": state[layer + "post_attention_layernorm.weight"].numpy(),
        "gate": lambda x: linear("mlp.gate_proj")(x).numpy(),
        "up": lambda x: linear("mlp.up_proj")(x).numpy(),
        "down": lambda x: linear("mlp.down_proj")(x).numpy(),
    }


def test_without_rotations_heads_are_of_256(tmp_path):
    sizes = canonical.Sizes(10, 1, 2, 1, 3, 4, 256)
    arrays = canonical_arrays(sizes)
    state = _state(sizes, arrays)
    del state["freqs_cis"]
    checkpoint = pytorch_pickle.checkpoint(_save(tmp_path / "gemma.ckpt", state))
    assert checkpoint.sizes == sizes
    assert_same(checkpoint.tensors, arrays)


def _quantized(state):
    quantized = {}
    random = torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        if tensor.ndim == 2 and name != "freqs_cis":
            quantized[name] = torch.randint(-128, 128, tensor.shape, dtype=torch.int8, generator=random)
            quantized[name + "_scaler"] = torch.rand(len(tensor), generator=random) / 100
        else:
            quantized[name] = tensor
    return quantized


def test_int8_times_the_scale_of_its_row(tmp_path, shape):
    sizes = SIZES[shape]
    quantized = _quantized(_state(sizes, canonical_arrays(sizes)))
    plain = {
        name: tensor * quantized[name + "_scaler"].unsqueeze(-1) if tensor.dtype == torch.int8 else tensor
        for name, tensor in quantized.items()
        if not name.endswith("_scaler")
    }
    received = pytorch_pickle.checkpoint(_save(tmp_path / "int8.ckpt", quantized)).tensors
    expected = pytorch_pickle.checkpoint(_save(tmp_path / "plain.ckpt", plain)).tensors
    assert received["blocks.1.key"].dtype == np.float32
    assert_same(received, {name: tensor.read() for name, tensor in expected.items()})


# === Hugging Face ===


def _hugging_face(folder, sizes, arrays):
    stored = stored_in_memory(arrays)
    state = {t.name: _tensor(t.read()) for t in canonical.arranged(hugging_face.table_of(sizes), stored)}
    config = {
        "model_type": "gemma", "vocab_size": sizes.vocabulary_size, "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_query_heads, "num_key_value_heads": sizes.num_key_value_heads,
        "hidden_size": sizes.hidden_dim, "intermediate_size": sizes.intermediate_dim // 2, "head_dim": sizes.head_dim,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return state


def test_pytorch_model_bin(tmp_path, shape, dtype):
    arrays = canonical_arrays(SIZES[shape], dtype)
    state = _hugging_face(tmp_path, SIZES[shape], arrays)
    assert not pytorch_pickle.is_here(tmp_path)
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, tmp_path / "pytorch_model.bin")
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    assert pytorch_pickle.is_here(tmp_path)
    checkpoint = pytorch_pickle.checkpoint(tmp_path)
    assert checkpoint.format == "pytorch" and checkpoint.sizes == SIZES[shape] and checkpoint.proto() == b"pieces"
    assert_same(checkpoint.tensors, arrays)


def test_pytorch_model_bin_in_shards(tmp_path):
    arrays = canonical_arrays(SIZES["7b"], ml_dtypes.bfloat16)
    state = _hugging_face(tmp_path, SIZES["7b"], arrays)
    files = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in state if files[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert pytorch_pickle.is_here(tmp_path)
    assert_same(pytorch_pickle.checkpoint(tmp_path).tensors, arrays)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_safetensors_go_before_pickles(tmp_path, name):
    for other in ("config.json", "pytorch_model.bin", "gemma.ckpt"):
        (tmp_path / other).touch()
    assert pytorch_pickle.is_here(tmp_path)
    (tmp_path / name).touch()
    assert not pytorch_pickle.is_here(tmp_path)


def test_other_architectures_of_hugging_face_are_refused(tmp_path):
    state = _hugging_face(tmp_path, SIZES["2b"], canonical_arrays(SIZES["2b"]))
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    _refuses(tmp_path, "gemma2")


# === What is refused ===


def _refuses(path, *parts):
    with pytest.raises(ValueError) as raised:
        for tensor in pytorch_pickle.checkpoint(path).tensors.values():
            tensor.read()
    for part in (str(path), *parts):
        assert part in str(raised.value)


def test_missing_tensors_are_named(tmp_path, state):
    for name in (QKV, "embedder.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight"):
        kept = {key: tensor for key, tensor in state.items() if key != name}
        _refuses(_save(tmp_path / "gemma.ckpt", kept), "lacks", name)


@pytest.mark.parametrize("name", ["pre_feedforward_layernorm.weight", "self_attn.query_norm.weight"])
def test_additional_tensors_are_named(tmp_path, state, name):
    state["model.layers.1." + name] = torch.zeros(4)
    _refuses(_save(tmp_path / "gemma.ckpt", state), "model.layers.1." + name, "Gemma 1")


def test_misshapen_tensors_are_named(tmp_path, state):
    _refuses(_save(tmp_path / "gemma.ckpt", {**state, DOWN: state[DOWN].T}), DOWN, "(24, 16)", "(16, 24)")
    rotations = torch.polar(torch.ones(8, 64), torch.ones(8, 64))
    _refuses(_save(tmp_path / "gemma.ckpt", {**state, "freqs_cis": rotations}), "H = 128", "qkv_proj", "o_proj")


def test_integers_and_scalers_that_do_not_fit_are_refused(tmp_path, state):
    path = tmp_path / "gemma.ckpt"
    _refuses(_save(path, {**state, DOWN: state[DOWN].to(torch.int32)}), DOWN, "int32")
    whole = state[DOWN].to(torch.int8)
    _refuses(_save(path, {**state, DOWN: whole}), "lacks", DOWN + "_scaler")
    _refuses(_save(path, {**state, DOWN: whole, DOWN + "_scaler": torch.ones(3)}), DOWN + "_scaler", "(3,)")
    _refuses(_save(path, {**state, DOWN + "_scaler": torch.ones(16)}), DOWN + "_scaler")
    _refuses(_save(path, {**state, DOWN: state[DOWN].to_sparse()}), DOWN, "dense")
    _refuses(_save(path, {**state, DOWN: 3}), DOWN, "int")


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class _Harmless:
    pass


def test_nothing_but_tensors_is_unpickled(tmp_path, state):
    path, made = tmp_path / "gemma.ckpt", tmp_path / "made"
    _refuses(_save(path, {**state, "run": _Code(str(made))}), "Only tensors are loaded", "mkdir")
    _refuses(_save(path, {**state, "run": _Harmless()}), "Only tensors are loaded", "_Harmless")
    path.write_bytes(pickle.dumps(_Code(str(made))))
    _refuses(path, "torch.save")
    assert not made.exists()


def test_truncated_and_other_files_are_refused(tmp_path, state):
    path = _save(tmp_path / "gemma.ckpt", state)
    content = path.read_bytes()
    for length in (0, 3, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        _refuses(path, "truncated")
    path.write_bytes(b"no pickle at all" * 40)
    _refuses(path, "torch.save")
    begin = content.index(b"model_state_dict")
    path.write_bytes(content[:begin] + bytes(200) + content[begin + 200 :])
    _refuses(path)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    _refuses(path, "torch.save")
    torch.save(state, path)
    _refuses(path, "model_state_dict")
    torch.save({"model_state_dict": {**state, 7: torch.ones(2)}}, path)
    _refuses(path, "by name", "7")
    torch.save({7: state}, path)
    _refuses(path, "model_state_dict")
    torch.save([torch.ones(2)], path)
    _refuses(path, "list")


def test_one_checkpoint_of_several_is_to_be_named(tmp_path, state):
    assert not pytorch_pickle.is_here(tmp_path)
    for name in ("a.ckpt", "b.ckpt"):
        _save(tmp_path / name, state)
    _refuses(tmp_path, "a.ckpt", "b.ckpt")
    assert pytorch_pickle.checkpoint(tmp_path / "a.ckpt").sizes == SIZES["2b"]


def test_the_missing_library_is_named(tmp_path, state, monkeypatch):
    path = _save(tmp_path / "gemma.ckpt", state)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"keras_gemma\[torch\]"):
        pytorch_pickle.checkpoint(path)
