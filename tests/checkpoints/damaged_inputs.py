"""Loads damaged files of every format, and counts what came of it.

    python damaged_inputs.py all FOLDER SEED COUNT VOCABULARY

A process of its own: a library that crashes ends this one, and what it was given lies in FOLDER.
"""

import collections
import contextlib
import functools
import io
import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import tensorstore
import torch
from checkpoints.damaging import Good
from checkpoints.damaging import damaged
from checkpoints.damaging import damaged_h5
from checkpoints.damaging import files_of

from keras_gemma import checkpoints
from keras_gemma import data
from keras_gemma.checkpoints import converting
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor
from keras_gemma.models import GemmaTokenizer

SECONDS = 20
SIZES = {
    "vocabulary_size": 512, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1,
    "hidden_dim": 8, "intermediate_dim": 16, "head_dim": 4,
}  # fmt: skip


def goods(folder, vocabulary):
    """A good file or folder of each format, by name."""
    folder = Path(folder)
    model = GemmaCausalLM(GemmaBackbone(**SIZES), GemmaCausalLMPreprocessor(GemmaTokenizer(vocabulary), 16))
    model.save_to_preset(folder / "keras")
    model.save_to_preset(folder / "sharded", max_shard_size=1.7e-5)
    preset = folder / "keras"
    for name, format in (("hf", "hugging_face"), ("m.gguf", None), ("flax", "flax"), ("m.weights.h5", None)):
        checkpoints.convert(preset, folder / name, format, progress=False)
    checkpoints.convert(preset, folder / "hf_shards", "hugging_face", max_shard_size=1.7e-5, progress=False)
    (folder / "hf_json").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(folder / "hf" / name, folder / "hf_json" / name)
    _database(folder / "flax", folder / "ocdbt")
    _torch_files(folder)
    adapted = GemmaBackbone(**SIZES)
    adapted.enable_lora(2)
    checkpoints.save_adapters(adapted, folder / "peft")
    shutil.copy(preset / "assets/tokenizer/vocabulary.spm", folder / "vocabulary.spm")
    rows = [{"text": f"text {index}", "answer": "yes" * index} for index in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=8)
    data.write_array_record(rows, folder / "rows.array_record")
    loads = {
        "keras": _task, "sharded": _task, "hf": _task, "hf_json": _task, "peft": _adapters,
        "hf_shards": _tensors, "m.gguf": _tensors, "flax": _tensors, "ocdbt": _tensors, "m.weights.h5": _tensors,
        "bin": _tensors, "m.ckpt": _tensors, "vocabulary.spm": _vocabulary,
        "rows.jsonl": functools.partial(_rows, data.from_jsonl),
        "rows.parquet": functools.partial(_rows, data.from_parquet),
        "rows.array_record": functools.partial(_rows, data.from_array_record),
    }  # fmt: skip
    return {name: Good(folder / name, load) for name, load in loads.items()}


def _database(source, folder):
    """The Flax checkpoint as Orbax writes it now: one database of all tensors."""
    for name, tensor in converting.opened(source).stored.items():
        array = tensor.read()
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}}
        dtype = tensorstore.dtype(array.dtype)
        tensorstore.open(spec, create=True, dtype=dtype, shape=array.shape).result().write(array).result()


def _torch_files(folder):
    tensors = converting.opened(folder / "hf").stored
    state = {name: torch.from_numpy(np.array(tensor.read())) for name, tensor in tensors.items()}
    (folder / "bin").mkdir()
    shutil.copy(folder / "hf" / "config.json", folder / "bin")
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    own = {"embedder.weight": state["model.embed_tokens.weight"], "model.norm.weight": state["model.norm.weight"]}
    for name, tensor in state.items():
        if "layers" in name and not any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            own[name] = tensor
    for layer in ("model.layers.0.", "model.layers.1."):
        projections = [state[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"]
        own[f"{layer}self_attn.qkv_proj.weight"] = torch.cat(projections)
    own["freqs_cis"] = torch.polar(torch.ones(8, 2), torch.ones(8, 2))
    torch.save({"model_state_dict": own}, folder / "m.ckpt")


def _tensors(path):
    checkpoints.inspect(path)


def _task(path):
    _tensors(path)
    task = GemmaCausalLM.from_preset(path)
    task.preprocessor(["a text"])


def _adapters(path):
    checkpoints.load_adapters(GemmaBackbone(**SIZES), path)


def _vocabulary(path):
    GemmaTokenizer(str(path)).encode("A text")


def _rows(read, path):
    rows = read(str(path))
    for index in range(len(rows)):
        rows[index]


# === Damage ===


def inputs(good, seed, count):
    """Damages the copy of a good one; yields the damaged file and what was done. `count` for each of its files."""
    for name, file in files_of(good.path).items():
        content = file.read_bytes()
        for way, changed in damaged(content, file.name if name == "." else name, seed, count):
            file.write_bytes(changed)
            yield file, way
        if file.suffix == ".h5":
            file.write_bytes(content)
            for way in damaged_h5(file, seed, count // 2):
                yield file, way
        file.write_bytes(content)


def outcome(good, file):
    """`"loads"`, `"refused"`, or what is wrong."""
    try:
        with _in_time(), contextlib.redirect_stderr(io.StringIO()):
            good.load(good.path)
    except (ValueError, FileNotFoundError) as error:
        # What does not fit together is told by one of the files, or by the folder.
        return "refused" if str(good.path) in str(error) else f"no file named: {error!r}"[:400]
    except Exception as error:
        return f"foreign: {error!r}"[:400]
    return "loads"


@contextlib.contextmanager
def _in_time():
    def late(*_):
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def results(good, seed, count):
    """How often which outcome, and examples of what is wrong."""
    counts, wrong = collections.Counter(), []
    for file, way in inputs(good, seed, count):
        came_of_it = outcome(good, file)
        counts[came_of_it if came_of_it in ("loads", "refused") else "wrong"] += 1
        if counts["wrong"] > len(wrong):
            wrong.append(f"{file.name} {way}: {came_of_it}")
    return counts, wrong


if __name__ == "__main__":
    names, folder, seed, count = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    everything = goods(folder, Path(sys.argv[5]).read_bytes())
    for name in everything if names == "all" else names.split(","):
        counts, wrong = results(everything[name], seed, count)
        print(json.dumps({"format": name, **counts}), flush=True)
        for line in dict.fromkeys(wrong):
            print("   ", line, flush=True)
