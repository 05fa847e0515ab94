"""Damaged files of every format load, where the damage does not matter, or are refused by name.

Hundreds of each in a process of its own: `pytest -m slow tests/checkpoints/test_damaged_inputs.py -s` shows the counts.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from canonical_tensors import refuses
from checkpoints import damaged_inputs
from checkpoints.damaged_inputs import SIZES

from keras_gemma.checkpoints import inspect
from keras_gemma.checkpoints import load_adapters
from keras_gemma.checkpoints.tensor_files import safetensors_tensors
from keras_gemma.damaged import DamagedFileError
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaTokenizer

QUICK = ("hf", "hf_json", "m.gguf", "m.weights.h5", "m.ckpt", "vocabulary.spm", "rows.jsonl", "rows.parquet")


@pytest.fixture(scope="module")
def goods(tmp_path_factory, vocabulary):
    return damaged_inputs.goods(tmp_path_factory.mktemp("goods"), vocabulary)


@pytest.mark.parametrize("name", [*QUICK, "rows.array_record", "flax", "ocdbt", "peft"])
def test_some_damaged_files(goods, name):
    counts, wrong = damaged_inputs.results(goods[name], seed=7, count=3 if name in ("flax", "hf") else 8)
    assert not wrong
    assert counts["refused"] > 0
    assert damaged_inputs.outcome(goods[name], goods[name].path) == "loads"


@pytest.mark.slow
def test_hundreds_of_damaged_files(tmp_path, vocabulary):
    (tmp_path / "vocabulary").write_bytes(vocabulary)
    (tmp_path / "goods").mkdir()
    root = Path(__file__).parents[2]
    command = [sys.executable, damaged_inputs.__file__, "all", tmp_path / "goods", "3", "100", tmp_path / "vocabulary"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    counts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(*counts, sep="\n")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(counts) == len(os.listdir(tmp_path / "goods"))
    assert not [line for line in done.stdout.splitlines() if not line.startswith("{")]


# === What the safetensors library refuses ===


def _safetensors(path, header, data=b"\0" * 16):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def _entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        pytest.param({"a": _entry(0, 8), "b": _entry(8, 12, (1,))}, id="trailing bytes"),
        pytest.param({"a": _entry(0, 4, (1,)), "b": _entry(8, 16)}, id="a hole"),
        pytest.param({"a": _entry(0, 12, (3,)), "b": _entry(8, 16)}, id="an overlap"),
        pytest.param({"a": _entry(0, 8), "b": _entry(8, 16, (3,))}, id="a shape that needs more"),
        pytest.param({"a": _entry(0, 8), "b": _entry(8, 16, dtype="F16")}, id="a type that needs less"),
        pytest.param({"a": _entry(0, 8), "b": _entry(8, 24, (4,))}, id="an end outside"),
        pytest.param(
            b'{"a":%s,"a":%s}' % (json.dumps(_entry(0, 16, (4,))).encode(), json.dumps(_entry(0, 16, (4,))).encode()),
            id="a name twice",
        ),
        pytest.param(b'{"a":' * 100_000, id="deep nests"),
    ],
)
def test_what_the_safetensors_library_refuses(tmp_path, header):
    _safetensors(tmp_path / "good.safetensors", {"a": _entry(0, 8), "b": _entry(8, 16)})
    assert [tensor.name for tensor in safetensors_tensors(tmp_path / "good.safetensors")] == ["a", "b"]
    _safetensors(tmp_path / "m.safetensors", header)
    refuses(lambda: safetensors_tensors(tmp_path / "m.safetensors"), "m.safetensors", error=DamagedFileError)


# === Small inputs that took long or crashed ===


def _edited(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def good(goods, tmp_path, request):
    return Path(shutil.copytree(goods[request.param].path, tmp_path / "good"))


@pytest.mark.parametrize("good", ["hf"], indirect=True)
@pytest.mark.parametrize("layers", [2**31, 2**70, -1, True, 2.0, "2", {}])
def test_a_number_of_layers_that_is_none(good, layers):
    _edited(good / "config.json", num_hidden_layers=layers)
    refuses(lambda: GemmaBackbone.from_preset(good), "config.json", "num_layers", "from 1 to 1,000")
    refuses(lambda: inspect(good), "config.json", "num_layers", "from 1 to 1,000")


@pytest.mark.parametrize("good", ["flax"], indirect=True)
def test_deep_nests_and_large_chunks_of_zarr(good):
    file = good / "transformer/layer_0/attn/q_einsum.w/.zarray"
    content = json.loads(file.read_text())
    file.write_text("[" * 200_000)
    refuses(lambda: inspect(good), good, "q_einsum.w", "nested too deeply")
    file.write_text(json.dumps({**content, "chunks": [2, 2**40, 4]}))
    refuses(lambda: inspect(good), good, "q_einsum.w", "chunks")


@pytest.mark.parametrize("good", ["peft"], indirect=True)
@pytest.mark.parametrize("pattern", ["(.|l|a|[e-z])*[^.-z]", "((a{1000}){1000}){1000}", "(", "a" * 501])
def test_patterns_of_adapters_take_no_time(good, pattern):
    backbone = GemmaBackbone(**SIZES)
    _edited(good / "adapter_config.json", alpha_pattern={r"q_pro[j]": 4, pattern: 4})
    refuses(lambda: load_adapters(backbone, good), "adapter_config.json", "attern")


def test_a_long_row_of_start_tokens(make_preprocessor):
    preprocessor = make_preprocessor()
    start = preprocessor.tokenizer.start_token_id
    assert preprocessor.prompt_ids("<bos>" * 400_000 + "a") == [start, *preprocessor.tokenizer.encode("a")]


def test_a_vocabulary_that_is_none(tmp_path):
    (tmp_path / "v.spm").write_bytes(b"no vocabulary")
    refuses(lambda: GemmaTokenizer(tmp_path / "v.spm"), "v.spm", "SentencePiece", error=DamagedFileError)
    refuses(lambda: GemmaTokenizer(b"no vocabulary"), "SentencePiece", error=DamagedFileError)


# === Settings where they enter ===


@pytest.mark.parametrize(
    "name, values",
    [
        ("layer_norm_epsilon", [np.nan, np.inf, 0, -1e-6, True, "1e-6", None]),
        ("dropout", [2.0, 1.0, -0.1, np.nan, True, "0"]),
        ("head_dim", [3, 0, 4.0, True, "4"]),
        ("num_layers", [0, -1, 1001, 2.0, True]),
        ("vocabulary_size", [0, -5, 2**40, {}, None]),
        ("num_key_value_heads", [0, 3, -1]),
        ("intermediate_dim", [15, 0]),
        ("sliding_window_size", [0, {}, True]),
    ],
)
def test_settings_of_a_backbone(name, values):
    for value in values:
        refuses(lambda value=value: GemmaBackbone(**{**SIZES, name: value}), f"`{name}`", "Received")


def test_settings_of_a_preprocessor(make_preprocessor):
    for value in ({}, 0, -1, 1.5, True, "12", None):
        refuses(lambda value=value: make_preprocessor(sequence_length=value), "`sequence_length`", "Received")
    refuses(lambda: make_preprocessor(add_start_token="yes"), "`add_start_token` is True or False")
