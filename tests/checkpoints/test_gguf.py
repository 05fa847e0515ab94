"""GGUF files keep what they are given, as llama.cpp has it; what they cannot keep or Gemma 1 is not, is refused."""

import json
import sys
import tracemalloc
import urllib.request
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from canonical_tensors import refuses

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import gguf_file
from keras_gemma.checkpoints import tokenizer_files
from keras_gemma.checkpoints.hugging_face import HuggingFacePreset
from keras_gemma.checkpoints.keras_preset import fill_from
from keras_gemma.checkpoints.locating import read_json
from keras_gemma.checkpoints.tensor_files import StoredTensor
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaTokenizer

Kind = gguf.GGMLQuantizationType

_MINIATURE = {"vocabulary_size": 512, "num_layers": 2, "num_query_heads": 2, "head_dim": 32, "intermediate_dim": 128}
# Rows that are whole blocks of Q8_0; as 7B: heads × head_dim ≠ width.
SIZES = {
    "2b": canonical.Sizes(**_MINIATURE, num_key_value_heads=1, hidden_dim=64),
    "7b": canonical.Sizes(**_MINIATURE, num_key_value_heads=2, hidden_dim=96),
}
# Rows that are whole blocks of Q4_K and Q6_K.
WIDE = canonical.Sizes(
    vocabulary_size=40, num_layers=1, num_query_heads=2, num_key_value_heads=2, hidden_dim=256, intermediate_dim=512,
    head_dim=128,
)  # fmt: skip
TEXTS = ["All the rights, 2004.", "  white   space\n\n", "naïve 日本 \t", "<start_of_turn>user\nhi<end_of_turn>"]
IDS = np.arange(1, 13).reshape(2, 6)
QUERY = "blk.1.attn_q.weight"
FLOAT16 = 2**-11  # what a number may lose in it, in parts of it
BOTH_SIZES = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def _stored(name, array):
    return StoredTensor("memory", name, array.shape, array.dtype, lambda: array)


def _tensors(sizes, dtype="float32"):
    random = np.random.default_rng(3)
    arrays = {name: random.normal(0, 0.3, shape).astype(dtype) for name, shape in canonical.shapes(sizes).items()}
    return {name: _stored(name, array) for name, array in arrays.items()}


@pytest.fixture
def written(tmp_path):
    """`written(sizes, tensors, proto, dtype)`: path of a file."""

    def write(sizes, tensors, proto=None, dtype=None):
        path = str(tmp_path / "model.gguf")
        gguf_file.write(path, sizes, tensors, proto, dtype)
        return path

    return write


@pytest.fixture
def path(written, vocabulary):
    return written(SIZES["2b"], _tensors(SIZES["2b"]), vocabulary)


@pytest.fixture
def edited(path, tmp_path):
    """`edited(settings, tensors, without)`: path of a copy of the file with other settings and tensors."""

    def edit(settings=None, tensors=None, without=()):
        reader, target = gguf.GGUFReader(path), str(tmp_path / "edited.gguf")
        settings, tensors = settings or {}, tensors or {}
        writer = gguf.GGUFWriter(target, "gemma")
        writer.kv_data[0].clear()
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name not in without:
                item = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(name, settings.pop(name, field.contents()), field.types[0], item)
        for name, value in settings.items():
            of_type = {int: "UINT32", float: "FLOAT32", str: "STRING"}[type(value)]
            writer.add_key_value(name, value, gguf.GGUFValueType[of_type])
        for tensor in reader.tensors:
            if tensor.name not in without:
                writer.add_tensor(tensor.name, *tensors.pop(tensor.name, (tensor.data, None, tensor.tensor_type)))
        for name, value in tensors.items():
            writer.add_tensor(name, *value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return target

    return edit


# === Tensors ===


@BOTH_SIZES
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip(written, sizes, dtype):
    tensors = _tensors(sizes, dtype)
    back = gguf_file.checkpoint(written(sizes, tensors))
    assert back.sizes == sizes
    assert list(back.tensors) == list(tensors)
    for name, tensor in tensors.items():
        array, expected = back.tensors[name].read(), tensor.read()
        is_norm = expected.ndim == 1
        assert array.dtype == back.tensors[name].dtype == ("float32" if is_norm else dtype)
        if is_norm and dtype == "float32":
            np.testing.assert_allclose(array, expected, atol=2**-23, rtol=0)
        else:
            np.testing.assert_array_equal(array, expected.astype(array.dtype))


def test_what_was_read_is_written_to_the_same_bytes(written, tmp_path, vocabulary):
    path = written(SIZES["7b"], _tensors(SIZES["7b"], "bfloat16"), vocabulary)
    back, again = gguf_file.checkpoint(path), str(tmp_path / "again.gguf")
    gguf_file.write(again, back.sizes, back.tensors, back.proto())
    assert Path(again).read_bytes() == Path(path).read_bytes()


@BOTH_SIZES
def test_as_the_library_maps_models_of_transformers(written, tmp_path, sizes, vocabulary):
    torch, reference = _reference(sizes)
    reference.save_pretrained(tmp_path)
    source = HuggingFacePreset(str(tmp_path), read_json(tmp_path / "config.json")).checkpoint()
    path = written(sizes, source.tensors, vocabulary)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA, sizes.num_layers)
    parameters = dict(reference.named_parameters())
    assert len(held) == len(parameters)
    for name, parameter in parameters.items():
        tensor = held[names.get_name(name, try_suffixes=(".weight",))]
        assert tensor.tensor_type == Kind.F32
        expected = parameter.detach().numpy() + ("norm" in name)
        np.testing.assert_array_equal(tensor.data, expected.astype("float32"))

    with torch.no_grad():
        theirs = reference(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(_logits(path), theirs, atol=1e-5)


def _logits(path):
    checkpoint = gguf_file.checkpoint(path)
    backbone = GemmaBackbone(**checkpoint.sizes._asdict())
    fill_from(checkpoint, backbone)
    return np.asarray(GemmaCausalLM(backbone)({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))


def _reference(sizes):
    import torch
    import transformers

    config = transformers.GemmaConfig(
        vocab_size=sizes.vocabulary_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_query_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        hidden_size=sizes.hidden_dim,
        intermediate_size=sizes.intermediate_dim // 2,
        head_dim=sizes.head_dim,
    )
    torch.manual_seed(1)
    model = transformers.GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if "norm" in name else 0.05)
    return torch, model


@BOTH_SIZES
def test_as_llama_cpp_computes(written, sizes, vocabulary):
    tensors = {name: _stored(name, tensor.read() / 3) for name, tensor in _tensors(sizes).items()}
    path = written(sizes, tensors, vocabulary)
    ask = _llama_cpp(path)
    last = _logits(path)[0, -1]
    expected = last - np.logaddexp.reduce(last)
    wanted = {"prompt": IDS[0].tolist(), "n_predict": 1, "temperature": 0, "n_probs": sizes.vocabulary_size}
    (answer,) = ask("/completion", wanted)["completion_probabilities"]
    received = {entry["id"]: entry["logprob"] for entry in answer["top_logprobs"]}
    assert len(received) == sizes.vocabulary_size
    # llama.cpp keeps keys and values in float16, and its sums are of the kind that the processor is quickest at.
    scale = np.abs(last).max()
    np.testing.assert_allclose([received[index] for index in range(len(expected))], expected, atol=2 * FLOAT16 * scale)
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    for text in TEXTS:
        tokens = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        assert tokens == [processor.bos_id(), *processor.encode(text)]
    # Its own engine runs the file's template: without one it would talk ChatML.
    messages = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", " b "), ("user", "c"))]
    prompt = ask("/apply-template", {"messages": messages})["prompt"]
    expected = GemmaTokenizer(vocabulary).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt.removeprefix("<bos>") == expected.removeprefix("<bos>")


def _llama_cpp(path):
    """A function that asks llama.cpp's server, which lives for as long as the function does."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 64
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def ask(where, body):
        content = json.dumps(body).encode()
        request = urllib.request.Request(
            server.listening_address + where, content, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    return ask


def test_each_tensor_is_read_once(written):
    sizes, reads = SIZES["2b"], []
    tensors = {name: _counted(tensor, reads) for name, tensor in _tensors(sizes).items()}
    written(sizes, tensors)
    assert sorted(reads) == sorted(tensors)


def _counted(tensor, reads):
    def read():
        reads.append(tensor.name)
        return tensor.read()

    return StoredTensor(tensor.file, tensor.name, tensor.shape, tensor.dtype, read)


# === Quantized ===


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [7, canonical.ROWS_AT_ONCE])
def test_q8_0_as_the_library_quantizes(written, monkeypatch, source, rows):
    monkeypatch.setattr(canonical, "ROWS_AT_ONCE", rows)
    sizes = SIZES["7b"]
    tensors = _tensors(sizes, source)
    path = written(sizes, tensors, dtype="q8_0")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert reader.get_field("general.quantization_version").contents() == gguf.GGML_QUANT_VERSION
    expected = {tensor.name: tensor.read() for tensor in canonical.arranged(gguf_file.table_of(sizes), tensors)}
    for tensor in reader.tensors:
        if "norm" in tensor.name:
            assert tensor.tensor_type == Kind.F32
        else:
            assert tensor.tensor_type == Kind.Q8_0
            wanted = gguf.quants.quantize(expected[tensor.name].astype("float32"), Kind.Q8_0)
            np.testing.assert_array_equal(tensor.data, wanted)
    back = gguf_file.checkpoint(path)
    for name, tensor in tensors.items():
        array = tensor.read().astype("float32")
        assert back.tensors[name].dtype == back.tensors[name].read().dtype == "float32"
        assert np.abs(back.tensors[name].read() - array).max() < np.abs(array).max() * (0.5 / 127 + FLOAT16)


def _q4_k(array):
    """Blocks of 256 with one scale and one minimum: all of the six bits that each sub-block has for its own are set."""
    blocks = array.reshape(-1, 256)
    lowest = blocks.min(1, keepdims=True)
    scale = ((blocks.max(1, keepdims=True) - lowest) / 15 / 63).astype("float16")
    offset = (-lowest / 63).astype("float16")
    numbers = np.rint((blocks + 63 * offset.astype("float32")) / (63 * scale.astype("float32")))
    numbers = numbers.clip(0, 15).astype("uint8").reshape(-1, 4, 2, 32)
    packed = (numbers[:, :, 0] | numbers[:, :, 1] << 4).reshape(-1, 128)
    scales = np.full((len(blocks), 12), 255, "uint8")
    return np.concatenate([scale.view("uint8"), offset.view("uint8"), scales, packed], 1)


def _q6_k(array):
    """Blocks of 256 with one scale: those that each sixteen have for their own are one."""
    blocks = array.reshape(-1, 256)
    scale = (np.abs(blocks).max(1, keepdims=True) / 31).astype("float16")
    numbers = (np.rint(blocks / scale.astype("float32")).clip(-32, 31) + 32).astype("uint8").reshape(-1, 2, 4, 32)
    low, high = numbers & 15, numbers >> 4
    low = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    high = (high << np.array([0, 2, 4, 6], "uint8")[:, None]).sum(2, dtype="uint8").reshape(-1, 64)
    return np.concatenate([low, high, np.ones((len(blocks), 16), "uint8"), scale.view("uint8")], 1)


# How to quantize, and how far off a number may be, in parts of the largest of all: half a step, but Q4_0 has one step
# less on one side; and what its scale loses.
QUANTIZED = {
    "Q8_0": (lambda array: gguf.quants.quantize(array, Kind.Q8_0), 0.5 / 127 + FLOAT16),
    "Q4_0": (lambda array: gguf.quants.quantize(array, Kind.Q4_0), 1 / 8 + FLOAT16),
    "Q4_K": (_q4_k, 0.5 * 2 / 15 + FLOAT16),
    "Q6_K": (_q6_k, 0.5 / 31 + FLOAT16),
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("rows", [7, canonical.ROWS_AT_ONCE])
def test_quantized_kinds_are_read_as_the_library_reads_them(written, monkeypatch, name, rows):
    monkeypatch.setattr(canonical, "ROWS_AT_ONCE", rows)
    quantize, part = QUANTIZED[name]
    tensors = _tensors(WIDE)
    source = gguf.GGUFReader(written(WIDE, tensors))
    path, packed = source.data.filename + ".quantized", {}
    writer = gguf.GGUFWriter(path, "gemma")
    for field in source.fields.values():
        if field.name.startswith("gemma."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in source.tensors:
        if "norm" in tensor.name:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            packed[tensor.name] = quantize(np.array(tensor.data)).reshape(len(tensor.data), -1)
            writer.add_tensor(tensor.name, packed[tensor.name], raw_dtype=Kind[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = gguf_file.checkpoint(path)
    for stored, blocks in packed.items():
        expected = gguf.quants.dequantize(blocks, Kind[name])
        np.testing.assert_array_equal(checkpoint.stored[stored].read(), expected)
    for stored, tensor in tensors.items():
        array = tensor.read()
        assert np.abs(checkpoint.tensors[stored].read() - array).max() <= np.abs(array).max() * part


def test_memory_of_quantizing_and_of_reading_it(written):
    sizes = SIZES["2b"]._replace(vocabulary_size=64 * 1024, num_layers=1)
    tensors = _tensors(sizes)
    largest = tensors["embedding"].read().nbytes
    tracemalloc.start()
    try:
        path = written(sizes, tensors, dtype="q8_0")
        assert tracemalloc.get_traced_memory()[1] < 1.5 * largest
        checkpoint = gguf_file.checkpoint(path)
        assert tracemalloc.get_traced_memory()[0] < 0.1 * largest
        tracemalloc.reset_peak()
        checkpoint.tensors["embedding"].read()
        assert tracemalloc.get_traced_memory()[1] < 1.5 * largest
    finally:
        tracemalloc.stop()


# === Settings and vocabulary ===


def test_settings(path, vocabulary):
    settings = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    lists = {name: settings.pop(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")}
    assert settings.pop("gemma.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert {name: value for name, value in settings.items() if not name.startswith("GGUF.")} == {
        "general.architecture": "gemma",
        "general.name": "Gemma",
        "general.file_type": 0,
        "gemma.context_length": 8192,
        "gemma.embedding_length": 64,
        "gemma.block_count": 2,
        "gemma.feed_forward_length": 64,
        "gemma.attention.head_count": 2,
        "gemma.attention.head_count_kv": 1,
        "gemma.attention.key_length": 32,
        "gemma.attention.value_length": 32,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.eot_token_id": 6,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": tokenizer_files.CHAT_TEMPLATE,
    }
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    assert {name: len(values) for name, values in lists.items()} == dict.fromkeys(lists, 512)
    assert lists["tokens"][:500] == [processor.id_to_piece(index) for index in range(500)]
    assert lists["scores"][:500] == [processor.get_score(index) for index in range(500)]
    assert lists["token_type"][:9] == [*[gguf.TokenType.CONTROL] * 3, 2, *[gguf.TokenType.USER_DEFINED] * 4, 6]
    assert lists["tokens"][500:] == [f"[PAD{index}]" for index in range(500, 512)]
    assert set(lists["token_type"][500:]) == {gguf.TokenType.UNUSED}


def _parsed(proto):
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(proto)


def _content(proto):
    model = _parsed(proto)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    return pieces, model.trainer_spec, model.normalizer_spec


def test_vocabulary_round_trip(path, vocabulary):
    back = gguf_file.checkpoint(path).proto()
    assert _content(back) == _content(vocabulary)
    expected = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    received = sentencepiece.SentencePieceProcessor(model_proto=back)
    for text in TEXTS:
        assert received.encode(text) == expected.encode(text)
        assert received.decode(received.encode(text)) == text


def test_marks_of_turns_that_are_control_pieces(edited, path, vocabulary):
    types = gguf.GGUFReader(path).get_field("tokenizer.ggml.token_type").contents()
    types[5] = types[6] = int(gguf.TokenType.CONTROL)
    back = gguf_file.checkpoint(edited({"tokenizer.ggml.token_type": types})).proto()
    assert _content(back) == _content(vocabulary)


def test_without_vocabulary(written, edited):
    sizes = SIZES["2b"]
    assert gguf_file.checkpoint(edited({"tokenizer.ggml.model": "no_vocab"})).proto() is None
    assert gguf_file.checkpoint(written(sizes, _tensors(sizes))).proto() is None


def _refuses_to_read(path, *parts):
    def read():
        checkpoint = gguf_file.checkpoint(path)
        return checkpoint.proto(), checkpoint.tensors

    refuses(read, path, *parts)


def test_damaged_vocabularies(edited, path):
    _refuses_to_read(edited({"tokenizer.ggml.model": "gpt2"}), "gpt2")
    _refuses_to_read(edited(without=["tokenizer.ggml.scores"]), "tokenizer.ggml.scores")
    _refuses_to_read(edited(without=["tokenizer.ggml.bos_token_id"]), "tokenizer.ggml.bos_token_id")
    _refuses_to_read(edited({"tokenizer.ggml.bos_token_id": 505}), "bos_token_id", 505, 500)
    _refuses_to_read(edited({"tokenizer.ggml.scores": [0.0, 1.0]}), 512, 2)


@pytest.mark.parametrize(
    "spec, name, value, part",
    [
        ("trainer_spec", "model_type", 1, "UNIGRAM"),
        ("trainer_spec", "pad_id", -1, "'pad': -1"),
        ("normalizer_spec", "add_dummy_prefix", True, "`add_dummy_prefix` is one of [False]"),
        ("normalizer_spec", "remove_extra_whitespaces", True, "`remove_extra_whitespaces` is one of [False]"),
        ("normalizer_spec", "precompiled_charsmap", b"rules", "rules"),
    ],
)
def test_vocabularies_that_the_format_does_not_keep(tmp_path, vocabulary, spec, name, value, part):
    model, path = _parsed(vocabulary), tmp_path / "model.gguf"
    setattr(getattr(model, spec), name, value)
    sizes = SIZES["2b"]
    refuses(lambda: gguf_file.write(path, sizes, _tensors(sizes), model.SerializeToString()), part)
    assert not path.exists()


# === Refused ===


def test_is_here(path, tmp_path):
    assert gguf_file.is_here(path)
    (tmp_path / "other").write_bytes(b"GGU")
    for other in (tmp_path / "other", tmp_path, tmp_path / "absent"):
        assert not gguf_file.is_here(other)


def test_without_the_library(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert gguf_file.is_here(path)
    refuses(lambda: gguf_file.checkpoint(path), "keras_gemma[convert]", error=ImportError)


def test_truncated(path, tmp_path):
    content = Path(path).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 4, 20, 30, 100, 1000, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:length])
        _refuses_to_read(str(cut), "truncated")


def test_the_other_byte_order(tmp_path):
    path = str(tmp_path / "big_endian.gguf")
    writer = gguf.GGUFWriter(path, "gemma", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _refuses_to_read(path, "byte order")


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "llama"])
def test_other_architectures(edited, architecture):
    _refuses_to_read(edited({"general.architecture": architecture}), architecture)


def test_other_settings(edited):
    assert gguf_file.checkpoint(edited({"gemma.rope.freq_base": 10_000.0})).tensors
    _refuses_to_read(edited({"gemma.rope.freq_base": 1e6}), "gemma.rope.freq_base", 10000, 1000000)
    _refuses_to_read(edited({"gemma.rope.scaling.type": "linear"}), "linear")
    _refuses_to_read(edited({"gemma.attention.value_length": 64}), "value_length", 32, 64)
    _refuses_to_read(edited({"split.count": 3}), 3)


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "gemma.embedding_length",
        "gemma.block_count",
        "gemma.feed_forward_length",
        "gemma.attention.head_count",
        "gemma.attention.head_count_kv",
        "gemma.attention.key_length",
        "gemma.attention.layer_norm_rms_epsilon",
    ],
)
def test_missing_settings(edited, key):
    _refuses_to_read(edited(without=[key]), key)


def test_missing_additional_and_misshapen_tensors(edited):
    some = np.ones((64, 64), "float32")
    _refuses_to_read(edited(without=[QUERY]), QUERY)
    _refuses_to_read(edited(without=[gguf_file.EMBEDDING]), gguf_file.EMBEDDING)
    _refuses_to_read(edited(tensors={"blk.1.attn_q.bias": (some,)}), "blk.1.attn_q.bias")
    _refuses_to_read(edited(tensors={QUERY: (some[1:],)}), QUERY, (63, 64), (64, 64))
    _refuses_to_read(edited({"gemma.block_count": 1}), "blk.1.")


def test_types_of_tensors(edited):
    some = np.ones((64, 64), "float32")
    _refuses_to_read(edited(tensors={QUERY: (some.astype("float64"),)}), "F64", QUERY)
    quantized = gguf.quants.quantize(some, Kind.Q5_0)
    _refuses_to_read(edited(tensors={QUERY: (quantized, None, Kind.Q5_0)}), "Q5_0", QUERY, "Q6_K")


def test_a_repeated_embedding(edited, path):
    embedding = gguf_file.checkpoint(path).tensors["embedding"].read()

    def copied(array):
        return gguf_file.checkpoint(edited(tensors={"output.weight": (array,)}))

    repeated = copied(embedding)
    assert len(repeated.tensors) == len(canonical.shapes(SIZES["2b"]))
    repeated.check_copies()
    refuses(copied(embedding[1:]).check_copies, "edited.gguf", "output.weight", (511, 64), (512, 64))
    embedding[-1, -1] += 1e-6
    refuses(copied(embedding).check_copies, "output.weight", "numbers of its own", (512, 64))


def test_what_is_not_written(tmp_path):
    path, sizes = tmp_path / "model.gguf", SIZES["2b"]

    def refuses_to_write(sizes, tensors, proto, dtype, *parts):
        refuses(lambda: gguf_file.write(path, sizes, tensors, proto, dtype), *parts)
        assert not path.exists()

    refuses_to_write(sizes, _tensors(sizes), None, "int8", "int8", "bfloat16", "q8_0")
    refuses_to_write(sizes, _tensors(sizes, "float64"), None, None, "float64", "token_embd.weight")
    narrow = sizes._replace(hidden_dim=80)
    refuses_to_write(narrow, _tensors(narrow), None, "q8_0", "multiple of 32", 80, "token_embd.weight")
    refuses_to_write(sizes, _tensors(sizes), b"no vocabulary", None, "SentencePiece")


@pytest.mark.parametrize("dtype, value", [("float16", 1e5), ("bfloat16", 3.4e38), ("q8_0", 1e7), ("float32", np.nan)])
def test_numbers_that_no_file_keeps(written, dtype, value):
    sizes = SIZES["2b"]
    tensors = _tensors(sizes)
    tensors["blocks.1.query"].read()[1, 2, 3] = value
    refuses(lambda: written(sizes, tensors, dtype=dtype), "memory", "query" if np.isnan(value) else QUERY)


def test_numbers_that_other_types_keep(written):
    sizes = SIZES["2b"]
    tensors = _tensors(sizes)
    tensors["blocks.1.query"].read()[1, 2, 3] = np.float32(ml_dtypes.finfo("bfloat16").max)
    written(sizes, tensors, dtype="bfloat16")
    # The scale of a block of such numbers is too small for its reciprocal.
    tensors["blocks.1.query"].read()[:] = 1e-39
    back = gguf_file.checkpoint(written(sizes, tensors, dtype="q8_0"))
    assert not back.tensors["blocks.1.query"].read().any()
