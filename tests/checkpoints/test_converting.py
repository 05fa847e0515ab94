"""Models in one format and in another: the same to the bit, refused whole or written whole."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import h5py
import keras_hub
import ml_dtypes
import numpy as np
import pytest
from canonical_tensors import refuses
from canonical_tensors import zeros

from keras_gemma import cli
from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import convert
from keras_gemma.checkpoints import inspect
from keras_gemma.checkpoints.converting import opened
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from tests.numerics.precision import rounding

# What each format is called on a disk.
NAMES = {"keras": "keras", "keras_weights": "model.weights.h5", "hugging_face": "hf", "flax": "flax", "gguf": "m.gguf"}
ONE_SHAPE = pytest.mark.parametrize("shape", ["2b"], indirect=True)
QUERY = "layers/gemma_decoder_block_2/attention/query_dense/vars/0"


@pytest.fixture
def source(tmp_path, shape, make_preprocessor, request):
    """A preset with random weights in bfloat16 or float32."""
    dtype = getattr(request, "param", "float32")
    sizes = {**shape, "vocabulary_size": 512, "num_layers": 3}
    model = GemmaCausalLM(GemmaBackbone(**sizes, dtype=dtype), make_preprocessor())
    random = np.random.default_rng(0)
    for variable in model.backbone.variables:
        variable.assign(random.normal(0.0, 0.3, variable.shape))
    model.save_to_preset(tmp_path / "source")
    return tmp_path / "source"


def arrays(path):
    return {name: np.array(tensor.read()) for name, tensor in opened(path).tensors.items()}


def assert_same(received, expected):
    assert received.keys() == expected.keys()
    for name, array in expected.items():
        assert received[name].dtype == array.dtype, name
        assert received[name].tobytes() == array.tobytes(), name


def without_names(content):
    """Keras counts the names of models up."""
    return {**content, "config": {**content["config"], "name": None}}


def convert_quietly(source, target, **options):
    return convert(source, target, progress=False, **options)


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize("format", ["keras_weights", "hugging_face", "flax"])
def test_there_and_back_to_the_bit(source, tmp_path, format):
    there, back = tmp_path / NAMES[format], tmp_path / "back"
    convert_quietly(source, there, format=format)
    assert_same(arrays(there), arrays(source))
    tokenizer = source / "assets/tokenizer/vocabulary.spm"
    convert_quietly(there, back, format="keras", tokenizer=tokenizer if format == "keras_weights" else None)
    assert_same(arrays(back), arrays(source))
    assert (back / "assets/tokenizer/vocabulary.spm").read_bytes() == tokenizer.read_bytes()
    for name in ("config.json", "tokenizer.json"):
        settings = [json.loads((folder / name).read_text()) for folder in (back, source)]
        assert without_names(settings[0]) == without_names(settings[1])


@pytest.mark.parametrize("source", ["float32", "bfloat16"], indirect=True)
def test_gguf_there_and_back(source, tmp_path):
    convert_quietly(source, tmp_path / NAMES["gguf"])
    convert_quietly(tmp_path / NAMES["gguf"], tmp_path / "back", format="keras")
    assert arrays(tmp_path / "back").keys() == arrays(source).keys()
    for name, array in arrays(source).items():
        # Norms are kept with the one that is added to them.
        received, rounding = arrays(tmp_path / "back")[name], 1e-7 if "norm" in name and array.dtype == "float32" else 0
        assert received.dtype == array.dtype
        np.testing.assert_allclose(received.astype("float32"), array.astype("float32"), rtol=0, atol=rounding)
    tokenizers = [GemmaCausalLM.from_preset(folder).preprocessor.tokenizer for folder in (source, tmp_path / "back")]
    assert list(tokenizers[0]("as it is, 12\n é")) == list(tokenizers[1]("as it is, 12\n é"))


@ONE_SHAPE
def test_keras_hub_and_this_package_load_what_was_written(source, tmp_path, logits):
    expected = logits(GemmaCausalLM.from_preset(source))
    convert_quietly(source, tmp_path / "hf", format="hugging_face")
    convert_quietly(tmp_path / "hf", tmp_path / "back", format="keras", max_shard_size=8e-5)
    assert len(list((tmp_path / "back").glob("model_*.weights.h5"))) > 1
    for path in (tmp_path / "hf", tmp_path / "back"):
        np.testing.assert_array_equal(logits(GemmaCausalLM.from_preset(path)), expected)
    of_keras_hub = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path / "back"))
    np.testing.assert_allclose(logits(of_keras_hub), expected, atol=rounding(expected, 256))
    backbone = GemmaBackbone.from_preset(source)
    convert_quietly(source, tmp_path / "model.weights.h5")
    for variable in backbone.variables:
        variable.assign(np.zeros(variable.shape))
    backbone.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(logits(GemmaCausalLM(backbone)), expected)


def test_transformers_loads_what_was_written(source, tmp_path, logits):
    import torch
    import transformers

    convert_quietly(source, tmp_path / "hf", format="hugging_face", max_shard_size=8e-5)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 1
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = reference(torch.arange(1, 13).reshape(2, 6)).logits.numpy()
    np.testing.assert_allclose(logits(GemmaCausalLM.from_preset(source)), expected, atol=1e-4)


@ONE_SHAPE
def test_a_vocabulary_of_hugging_face_alone(source, tmp_path):
    convert_quietly(source, tmp_path / "hf", format="hugging_face")
    expected = GemmaCausalLM.from_preset(tmp_path / "hf").preprocessor.tokenizer
    (tmp_path / "hf" / "tokenizer.model").unlink()
    received = GemmaCausalLM.from_preset(tmp_path / "hf").preprocessor.tokenizer
    text = "as it is, 1234 \n\t é"
    assert list(received(text)) == list(expected(text))
    convert_quietly(tmp_path / "hf", tmp_path / "back", format="keras")
    assert list(GemmaCausalLM.from_preset(tmp_path / "back").preprocessor.tokenizer(text)) == list(expected(text))


@ONE_SHAPE
def test_weights_of_a_whole_task(source, tmp_path):
    model = GemmaCausalLM.from_preset(source)
    model.save_weights(tmp_path / "task.weights.h5")
    assert_same(arrays(tmp_path / "task.weights.h5"), arrays(source))


@ONE_SHAPE
def test_other_dtypes(source, tmp_path):
    convert_quietly(source, tmp_path / "half", format="keras", dtype="bfloat16")
    expected = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays(source).items()}
    assert_same(arrays(tmp_path / "half"), expected)
    assert GemmaBackbone.from_preset(tmp_path / "half", dtype="bfloat16").dtype_policy.name == "bfloat16"


# === Refusals: nothing is there afterwards ===


def refuse(source, target, *parts, error=ValueError, **options):
    there = next(parent for parent in target.parents if parent.exists())
    before = sorted(there.rglob("*"))
    refuses(lambda: convert_quietly(source, target, **options), *parts, error=error)
    assert sorted(there.rglob("*")) == before


@ONE_SHAPE
def test_wrong_arguments_are_refused_before_anything_is_read(source, tmp_path):
    free = tmp_path / "free"
    refuse(source, free, "hugging_face", "gguf", format="onnx")
    refuse(source, free, "hugging_face", "`format=` (`--to`)", str(free))
    for name in ("gguf", "flax", "keras_weights"):
        refuse(source, free, "max_shard_size", name, "hugging_face", format=name, max_shard_size=5)
    refuse(source, free, "tokenizer", "keras_weights", format="keras_weights", tokenizer=source / "config.json")
    for size in ("5GB", 0, True, float("nan")):
        refuse(source, free, "max_shard_size", repr(size), format="keras", max_shard_size=size)
    refuse(source, free, "max_shard_size", "layers/reversible_embedding", format="keras", max_shard_size=4e-5)
    refuse(source, free, "max_shard_size", "model.embed_tokens", format="hugging_face", max_shard_size=4e-5)
    refuse(source, free, "bfloat16", "int8", format="keras", dtype="int8")
    refuse(source, source, str(source), error=FileExistsError, format="keras")
    refuse(tmp_path / "nothing", free, "nothing", format="keras")


@ONE_SHAPE
def test_without_room_nothing_is_begun(source, tmp_path, monkeypatch):
    room = 0.75 * sum(array.nbytes for array in arrays(source).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=room))
    refuse(source, tmp_path / "new" / "hf", "GiB", str(tmp_path), error=OSError, format="hugging_face")
    convert_quietly(source, tmp_path / "new" / "half", format="hugging_face", dtype="bfloat16")


@ONE_SHAPE
def test_folders_made_for_a_refused_target_are_gone(source, tmp_path):
    with h5py.File(source / "model.weights.h5", "a") as file:
        file[QUERY][1, 2, 3] = np.nan
    (tmp_path / "there").mkdir()
    refuse(source, tmp_path / "there" / "new" / "newer" / "hf", QUERY, format="hugging_face")
    assert not os.listdir(tmp_path / "there")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@ONE_SHAPE
def test_a_bar_shows_how_far_a_conversion_is(source, tmp_path, monkeypatch):
    expected = sum(array.nbytes for array in arrays(source).values()) / 1024
    for screen, name, progress in ((Terminal(), "a", True), (Terminal(), "b", False), (io.StringIO(), "c", True)):
        monkeypatch.setattr(sys, "stderr", screen)
        convert(source, tmp_path / name, format="hugging_face", progress=progress)
        if name == "a":
            assert "100%" in screen.getvalue() and f"{expected:.0f}k/{expected:.0f}k" in screen.getvalue()
        else:
            assert not screen.getvalue()


@ONE_SHAPE
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_by_name(source, tmp_path, number):
    with h5py.File(source / "model.weights.h5", "a") as file:
        file[QUERY][1, 2, 3] = number
    refuse(source, tmp_path / "hf", QUERY, "finite", format="hugging_face")
    found = inspect(source)
    assert any("blocks.2.query" in doubt for doubt in found.doubts) and len(found.doubts) == 1


@ONE_SHAPE
def test_what_does_not_fit_into_a_dtype_is_refused_by_name(source, tmp_path):
    with h5py.File(source / "model.weights.h5", "a") as file:
        file[QUERY][1, 2, 3] = 1e6
    refuse(source, tmp_path / "hf", QUERY, "float16", format="hugging_face", dtype="float16")


@ONE_SHAPE
def test_missing_additional_and_misshapen_tensors(source, tmp_path):
    with h5py.File(source / "model.weights.h5", "a") as file:
        file["layers/stray/vars/0"] = [1.0]
    refuse(source, tmp_path / "hf", "layers/stray/vars/0", format="hugging_face")
    with h5py.File(source / "model.weights.h5", "a") as file:
        del file["layers/stray"]
        query = file[QUERY][()]
        del file[QUERY]
    refuse(source, tmp_path / "hf", QUERY, format="hugging_face")
    with h5py.File(source / "model.weights.h5", "a") as file:
        file[QUERY] = query[:1]
    refuse(source, tmp_path / "hf", QUERY, "(1, 32, 8)", "(4, 32, 8)", format="hugging_face")


@ONE_SHAPE
def test_an_output_projection_of_its_own_is_refused(source, tmp_path):
    from safetensors.numpy import load_file
    from safetensors.numpy import save_file

    convert_quietly(source, tmp_path / "hf", format="hugging_face")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, path)
    convert_quietly(tmp_path / "hf", tmp_path / "tied", format="keras")
    GemmaBackbone.from_preset(tmp_path / "hf")
    assert not inspect(tmp_path / "hf").doubts
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding + 1}, path)
    refuse(tmp_path / "hf", tmp_path / "untied", "lm_head.weight", "model.embed_tokens.weight", format="keras")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        GemmaBackbone.from_preset(tmp_path / "hf")
    assert [doubt for doubt in inspect(tmp_path / "hf").doubts if "lm_head.weight" in doubt]
    embedding[5, 3] = np.nan
    save_file({**tensors, "lm_head.weight": embedding}, path)
    refuse(tmp_path / "hf", tmp_path / "untied", "model.embed_tokens.weight", "not finite", format="keras")


@ONE_SHAPE
def test_an_output_projection_of_its_own_in_gguf_is_refused(source, tmp_path):
    gguf = pytest.importorskip("gguf")
    embedding = arrays(source)["embedding"]
    edited_gguf(gguf, source, tmp_path, {"output.weight": embedding})
    convert_quietly(tmp_path / "edited.gguf", tmp_path / "tied", format="keras")
    edited_gguf(gguf, source, tmp_path, {"output.weight": embedding + 1})
    refuse(tmp_path / "edited.gguf", tmp_path / "untied", "output.weight", format="keras")


def edited_gguf(gguf, source, folder, changes):
    """A file with additional tensors, or with others in the place of its own."""
    if not (folder / "whole.gguf").exists():
        convert_quietly(source, folder / "whole.gguf")
    reader, writer = gguf.GGUFReader(folder / "whole.gguf"), gguf.GGUFWriter(folder / "edited.gguf", "gemma")
    for name, field in reader.fields.items():
        if name.startswith("gemma."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, array in {**{tensor.name: tensor.data for tensor in reader.tensors}, **changes}.items():
        writer.add_tensor(name, np.array(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@ONE_SHAPE
def test_a_gguf_file_of_several_dtypes_loses_none_of_them(source, tmp_path):
    gguf = pytest.importorskip("gguf")
    embedding = arrays(source)["embedding"].astype("float16")
    edited_gguf(gguf, source, tmp_path, {"token_embd.weight": embedding})
    assert arrays(tmp_path / "edited.gguf")["embedding"].dtype == "float16"
    convert_quietly(tmp_path / "edited.gguf", tmp_path / "back", format="keras")
    expected = {**arrays(tmp_path / "edited.gguf"), "embedding": embedding.astype("float32")}
    assert_same(arrays(tmp_path / "back"), expected)


def change_config(folder, *without, **changes):
    content = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in {**content["config"], **changes}.items() if name not in without}
    (folder / "config.json").write_text(json.dumps({**content, "config": config}))


@ONE_SHAPE
@pytest.mark.parametrize(
    "name, value",
    [
        ("use_post_ffw_norm", True),
        ("use_sliding_window_attention", True),
        ("attention_logit_soft_cap", 50.0),
        ("query_head_dim_normalize", False),
    ],
)
def test_gemma_2_is_refused(source, tmp_path, name, value):
    change_config(source, **{name: value})
    refuse(source, tmp_path / "hf", "Gemma 1 has", name, str(value), format="hugging_face")
    with pytest.raises(ValueError, match=name):
        inspect(source)


@ONE_SHAPE
def test_a_configuration_that_lacks_a_size(source, tmp_path):
    change_config(source, "hidden_dim")
    refuse(source, tmp_path / "hf", "config.json", "hidden_dim", format="hugging_face")


@ONE_SHAPE
def test_integers_are_refused(source, tmp_path):
    with h5py.File(source / "model.weights.h5", "a") as file:
        query = file[QUERY][()]
        del file[QUERY]
        file[QUERY] = query.astype("int32")
    refuse(source, tmp_path / "hf", QUERY, "int32", "floating", format="hugging_face")


@ONE_SHAPE
@pytest.mark.parametrize("format", ["keras_weights", "flax"])
def test_an_epsilon_for_which_the_format_has_no_place(source, tmp_path, format):
    change_config(source, layer_norm_epsilon=1e-5)
    refuse(source, tmp_path / NAMES[format], "layer_norm_epsilon", "1e-05", "1e-06", format=format)


@ONE_SHAPE
def test_a_damaged_block_of_a_weights_file_is_told_from_the_others(source, tmp_path):
    whole, last = tmp_path / "model.weights.h5", "layers/gemma_decoder_block_2/ffw_linear/vars/0"
    first = "layers/gemma_decoder_block/attention/query_dense/vars/0"
    convert_quietly(source, whole)
    with h5py.File(whole, "a") as file:
        query = file[first][()]
        del file[first]
        file[first] = query[:1]
    refuse(whole, tmp_path / "hf", first, "(1, 32, 8)", "(4, 32, 8)", format="hugging_face")
    with h5py.File(whole, "a") as file:
        del file[first], file[last]
        file[first] = query
    refuse(whole, tmp_path / "hf", "lacks", last, format="hugging_face")
    with h5py.File(whole, "a") as file:
        del file["layers/gemma_decoder_block"], file["layers/gemma_decoder_block_1"]
        del file["layers/gemma_decoder_block_2"]
    refuse(whole, tmp_path / "hf", "lacks", first, "(N, D, H)", format="hugging_face")


@ONE_SHAPE
def test_vocabularies_that_do_not_serve(source, tmp_path):
    weights = tmp_path / "model.weights.h5"
    convert_quietly(source, weights)
    wrong, empty = tmp_path / "wrong.model", tmp_path / "empty.model"
    wrong.write_text('{"version": "1.0"}')
    empty.touch()
    for format in ("keras", "hugging_face", "flax"):
        for path in (wrong, empty):
            refuse(weights, tmp_path / NAMES[format], "SentencePiece", format=format, tokenizer=path)
    with h5py.File(weights, "a") as file:
        embedding = file["layers/reversible_embedding/vars/0"][()]
        del file["layers/reversible_embedding"]
        file["layers/reversible_embedding/vars/0"] = embedding[:499]
    vocabulary = source / "assets/tokenizer/vocabulary.spm"
    refuse(weights, tmp_path / "flax", "500 pieces", "499 rows", format="flax", tokenizer=vocabulary)


@ONE_SHAPE
@pytest.mark.parametrize("format", ["keras", "keras_weights", "hugging_face", "gguf"])
def test_rows_of_padding_are_left_out(source, tmp_path, monkeypatch, format):
    # In miniature: as many pieces as the vocabulary of this test has, and as many rows as the model.
    monkeypatch.setattr(canonical, "ROWS", 500)
    monkeypatch.setattr(canonical, "ROWS_WITH_PADDING", 512)
    vocabulary = source / "assets/tokenizer/vocabulary.spm"
    padded, bare = source, tmp_path / "model.weights.h5"
    with monkeypatch.context() as patched:
        patched.setattr(canonical, "ROWS", 400)
        if format != "keras":
            padded = tmp_path / ("padded" + NAMES[format])
            convert_quietly(source, padded, format=format)
    convert_quietly(padded, tmp_path / "out", format="hugging_face", tokenizer=vocabulary)
    whole = arrays(padded)
    assert whole["embedding"].shape[0] == 512
    assert_same(arrays(tmp_path / "out"), {**whole, "embedding": whole["embedding"][:500]})
    assert opened(tmp_path / "out").sizes.vocabulary_size == 500
    if format == "keras_weights":
        # Without a tokenizer nobody knows that they are padding.
        convert_quietly(padded, bare)
        assert_same(arrays(bare), whole)


@ONE_SHAPE
def test_quantised_weights_are_refused(source, tmp_path):
    model = GemmaCausalLM.from_preset(source)
    model.quantize("int8")
    model.save_to_preset(tmp_path / "int8")
    refuse(tmp_path / "int8", tmp_path / "hf", "quantised", format="hugging_face")


KILLED = """
import os, sys, signal
from keras_gemma import startup
startup.leave_out_tensorflow()
from keras_gemma.checkpoints import convert, hugging_face
whole = hugging_face.write_safetensors
def write(path, tensors):
    whole(path, tensors[:3])
    os.kill(os.getpid(), signal.SIGKILL)
hugging_face.write_safetensors = write
convert(*sys.argv[1:], format="hugging_face")
"""


@ONE_SHAPE
def test_a_killed_conversion_leaves_no_target(source, tmp_path):
    target = tmp_path / "hf"
    done = subprocess.run([sys.executable, "-c", KILLED, source, target], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not target.exists()
    assert len(list(tmp_path.glob(".unfinished-*-hf"))) == 1
    of_another_target = tmp_path / ".unfinished-1-other"
    of_another_target.mkdir()
    convert_quietly(source, target, format="hugging_face")
    assert_same(arrays(target), arrays(source))
    assert set(os.listdir(tmp_path)) == {"source", "hf", of_another_target.name}


# === At the command line ===


@ONE_SHAPE
def test_the_command(source, tmp_path, capsys):
    target = tmp_path / "hf"
    assert cli.main(["convert", str(source), str(target), "--to", "hugging_face"]) == 0
    assert "from keras, 29 tensors" in capsys.readouterr().out
    assert cli.main(["convert", str(source), str(target), "--to", "hugging_face"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["inspect", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "format hugging_face" in printed and "500 pieces, 512 rows" in printed and "doubts: none" in printed
    assert cli.main(["inspect", str(target), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sizes"]["num_layers"] == 3 and found["dtypes"] == {"float32": 29}
    assert found["tensors"]["blocks.2.query"] == {"shape": [4, 32, 8], "dtype": "float32"}
    assert found["bytes_on_disk"] == (target / "model.safetensors").stat().st_size
    parameters = found["embedding_parameters"] + found["other_parameters"]
    assert found["memory"]["load"] == {"float32": 4 * parameters, "bfloat16": 2 * parameters}
    assert "on disk" in printed and "train LoRA adapters" in printed
    assert cli.main(["inspect", str(target), "--no-numbers"]) == 0
    assert "4 × 32 × 8" in capsys.readouterr().out
    (target / "tokenizer.model").unlink()
    (target / "tokenizer.json").unlink()
    assert cli.main(["convert", str(target), str(tmp_path / "m.gguf"), "--dtype", "q8_0"]) == 0
    assert "no tokenizer: llama.cpp" in capsys.readouterr().out
    assert inspect(tmp_path / "m.gguf").dtypes == {"float32": 7, "Q8_0": 22}
    assert found["embedding_parameters"] + found["other_parameters"] == GemmaBackbone.from_preset(source).count_params()


@ONE_SHAPE
def test_numbers_that_look_wrong(source, capsys):
    with h5py.File(source / "model.weights.h5", "a") as file:
        file[QUERY][...] = 0.0
    assert cli.main(["inspect", str(source)]) == 1
    assert "blocks.2.query" in capsys.readouterr().err


@pytest.mark.parametrize(
    "preset, name, embedding, others",
    [
        ("gemma_2b_en", "Gemma 2B", 524_288_000, 1_981_884_416),
        ("gemma_7b_en", "Gemma 7B", 786_432_000, 7_751_248_896),
    ],
)
def test_parameters_as_the_report_counts_them(tmp_path, preset, name, embedding, others):
    settings = json.loads((pathlib.Path(GemmaBackbone.presets[preset]["folder"]) / "config.json").read_text())["config"]
    sizes = canonical.Sizes(**{field: settings[field] for field in canonical.Sizes._fields if field in settings})
    zeros(tmp_path / "files", sizes)
    found = inspect(tmp_path / "files", numbers=False)
    # Table 2 has 524,550,144 and 786,825,216 for embeddings: it counts 256,128 rows, of which 256,000 are published.
    assert (found.name, found.embedding_parameters, found.other_parameters) == (name, embedding, others)
    assert f"{name}, format hugging_face" in str(found) and f"others {others:,}" in str(found)
