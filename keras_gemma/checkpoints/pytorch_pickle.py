"""Gemma in PyTorch's own files, which are pickles of which nothing but tensors is loaded. They are read, not written.

V vocabulary, D width, N query heads, K key-value heads, H head dim, F feed-forward. Two kinds:

The `.ckpt` of google/gemma_pytorch, under `model_state_dict`; kernels have their outputs first:

    embedder.weight                                                V, D
    model.layers.0.input_layernorm.weight                          D
    model.layers.0.self_attn.qkv_proj.weight                       (N + 2·K)·H, D
    model.layers.0.self_attn.o_proj.weight                         D, N·H
    model.layers.0.post_attention_layernorm.weight                 D
    model.layers.0.mlp.gate_proj.weight, .up_proj.weight           F, D
    model.layers.0.mlp.down_proj.weight                            D, F
    model.norm.weight                                              D

A `weight` of int8 has a `weight_scaler` beside it, one number a row.

The `pytorch_model.bin` of Hugging Face, whole or in shards, with the tensors that its safetensors have.
"""

import functools
import pathlib
import pickle

import ml_dtypes
import numpy as np

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import hugging_face
from keras_gemma.checkpoints.hugging_face import BLOCK_TENSORS
from keras_gemma.checkpoints.hugging_face import HuggingFacePreset
from keras_gemma.checkpoints.locating import read_json
from keras_gemma.checkpoints.tensor_files import StoredTensor
from keras_gemma.checkpoints.tensor_files import tensors_of_files
from keras_gemma.checkpoints.tokenizer_folder import tokenizer_model
from keras_gemma.damaged import NO_DAMAGE
from keras_gemma.damaged import DamagedFileError
from keras_gemma.damaged import reading

FORMAT = "pytorch"
SUFFIX = ".ckpt"
STATE = "model_state_dict"
CONFIG_FILE = "config.json"
SINGLE_FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"
# A buffer of RoPE's rotations, (length, H/2).
ROTATIONS = "freqs_cis"
SCALER = "_scaler"
HEAD_DIM = 256
LAYER = "model.layers.{index}."
FLOATING = {
    "torch.float64": np.float64,
    "torch.float32": np.float32,
    "torch.float16": np.float16,
    "torch.bfloat16": ml_dtypes.bfloat16,
}
DTYPES = {**FLOATING, "torch.int8": np.int8, "torch.complex64": np.complex64}


def is_here(path):
    """Whether a `.ckpt`, or a folder with one or with a `pytorch_model.bin`, by the names of files.

    A folder that has safetensors, too, is not: what is the same in both should not come from a pickle.
    """
    if any((pathlib.Path(path) / name).exists() for name in (hugging_face.SINGLE_FILE, hugging_face.INDEX_FILE)):
        return False
    return _is_hugging_face(path) or bool(_ckpts(path))


def checkpoint(path):
    """The model in a `.ckpt`, or in a folder.

    Args:
        path: of a `.ckpt`, or of a folder with one, or with `config.json` and `pytorch_model.bin`.

    Returns:
        A `Checkpoint`.

    Raises:
        ImportError: without PyTorch.
        ValueError: for damaged files, for pickles of other things than tensors, and for another architecture than
            Gemma 1.
    """
    if _is_hugging_face(path):
        preset = HuggingFacePreset(str(path), read_json(pathlib.Path(path) / CONFIG_FILE))
        return preset.checkpoint(FORMAT, SINGLE_FILE, INDEX_FILE, _tensors)
    return _of_ckpt(_only_ckpt(path))


def _is_hugging_face(path):
    path = pathlib.Path(path)
    return (path / CONFIG_FILE).is_file() and any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def _ckpts(path):
    path = pathlib.Path(path)
    found = path.glob(f"*{SUFFIX}") if path.is_dir() else [path]
    return sorted(file for file in found if file.suffix == SUFFIX and file.is_file())


def _only_ckpt(path):
    files = _ckpts(path)
    if len(files) != 1:
        names = canonical.listed([file.name for file in files]) if files else "none"
        raise ValueError(
            f"A checkpoint of gemma_pytorch is one `{SUFFIX}`. Received: `{path}`, in which there is {names}"
        )
    return files[0]


# === google/gemma_pytorch ===


def _of_ckpt(path):
    stored = tensors_of_files([path], functools.partial(_tensors, key=STATE))
    rotations = [stored.pop(name) for name in list(stored) if name.rpartition(".")[2] == ROTATIONS]
    head_dim = 2 * rotations[0].shape[-1] if rotations else HEAD_DIM
    stored = {tensor.name: tensor for tensor in _dequantized(stored)}
    sizes = _sizes(stored, path, head_dim)
    return canonical.Checkpoint(
        path=str(path),
        format=FORMAT,
        sizes=sizes,
        table=table_of(sizes),
        stored=stored,
        where=str(path),
        proto=functools.partial(tokenizer_model, path.parent),
    )


def _sizes(stored, path, head_dim):
    usual = functools.partial(canonical.usual_shape, stored, str(path))
    rows, width = usual("embedder.weight", "VD")
    projected, _ = usual(LAYER + "self_attn.qkv_proj.weight", "RD")
    _, attended = usual(LAYER + "self_attn.o_proj.weight", "DC")
    feed_forward, _ = usual(LAYER + "mlp.gate_proj.weight", "FD")
    if attended % head_dim or (projected - attended) % (2 * head_dim) or projected <= attended:
        raise ValueError(
            f"Rows of `qkv_proj` are (N + 2·K)·H and columns of `o_proj` are N·H, with H = {head_dim}. "
            f"Received: {projected} and {attended} in `{path}`"
        )
    sizes = canonical.Sizes(
        vocabulary_size=rows,
        num_layers=canonical.number_of_blocks(stored, r"model\.layers\.(\d+)\."),
        num_query_heads=attended // head_dim,
        num_key_value_heads=(projected - attended) // (2 * head_dim),
        hidden_dim=width,
        intermediate_dim=2 * feed_forward,
        head_dim=head_dim,
    )
    return canonical.checked(sizes, path)


def table_of(sizes):
    """What a model of these `Sizes` has in a `.ckpt`, as `FileTensor`s."""
    wanted = canonical.shapes(sizes)
    alone = {part: row for part, row in BLOCK_TENSORS.items() if part not in ("query", "key", "value")}
    return [
        canonical.as_it_is("embedder.weight", "embedding", wanted["embedding"]),
        *(_projections(index, wanted) for index in range(sizes.num_layers)),
        *canonical.of_blocks(sizes, LAYER + "{name}.weight", alone),
        canonical.as_it_is("model.norm.weight", "final_norm", wanted["final_norm"]),
    ]


def _projections(index, wanted):
    """The rows of queries, keys and values below one another."""
    parts = [f"blocks.{index}.{part}" for part in ("query", "key", "value")]
    entries = [canonical.heads_first("", part, wanted[part]) for part in parts]
    ends = np.cumsum([entry.shape[0] for entry in entries])
    return canonical.FileTensor(
        LAYER.format(index=index) + "self_attn.qkv_proj.weight",
        (int(ends[-1]), entries[0].shape[1]),
        tuple(parts),
        lambda array: tuple(entry.split(rows)[0] for entry, rows in zip(entries, np.split(array, ends[:-1]))),
        lambda *arrays: np.concatenate([entry.join(array) for entry, array in zip(entries, arrays)]),
    )


def _dequantized(stored):
    scalers = {name + SCALER: name for name, tensor in stored.items() if tensor.dtype == np.int8}
    for name, tensor in stored.items():
        if tensor.dtype == np.int8:
            yield _scaled(tensor, stored.get(name + SCALER))
        elif name not in scalers:
            yield tensor


def _scaled(weight, scaler):
    """Gemma's int8 matrix as one of float32."""
    if scaler is None:
        raise ValueError(f"`{weight.file}` lacks `{weight.name}{SCALER}`, the scale of each row of an int8 matrix.")
    if len(weight.shape) != 2 or scaler.shape != weight.shape[:1]:
        raise ValueError(
            f"A scaler has one number for each row. Received: {scaler.shape} in `{scaler.name}` for {weight.shape} in "
            f"`{weight.name}` of `{weight.file}`"
        )
    canonical.check_floating(scaler)

    def read():
        scaled = weight.read().astype(np.float32)
        scaled *= scaler.read().astype(np.float32)[:, None]
        return scaled

    return StoredTensor(weight.file, weight.name, weight.shape, np.dtype(np.float32), read, "int8")


# === Tensors of a pickle ===


def _tensors(path, key=None):
    """The tensors of a file of `torch.save`; each is read from a mapping of its own."""
    state = _load(path, key)
    return [_stored_tensor(path, key, name, tensor) for name, tensor in state.items()]


def _stored_tensor(path, key, name, tensor):
    if str(getattr(tensor, "layout", None)) != "torch.strided" or str(tensor.dtype) not in DTYPES:
        what = getattr(tensor, "dtype", type(tensor).__name__)
        raise ValueError(
            f"Weights must be dense tensors of a dtype among {', '.join(FLOATING)}. "
            f"Received: {what} for `{name}` in `{path}`"
        )
    dtype = np.dtype(DTYPES[str(tensor.dtype)])
    return StoredTensor(str(path), name, tuple(tensor.shape), dtype, functools.partial(_read, path, key, name))


def _read(path, key, name):
    torch = _torch()
    with reading(path, place=name):
        tensor = _load(path, key)[name].detach()
        if tensor.dtype == torch.bfloat16:
            # NumPy has none of its own: the same bytes under another name.
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _load(path, key):
    torch = _torch()
    try:
        content = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        # Without PyTorch's own message around it, which advises to load anything.
        cause = error.__context__ or error
        reason = str(cause).partition(". Please")[0]
        raise ValueError(f"Only tensors are loaded from pickles. `{path}` holds something else: {reason}") from cause
    except NO_DAMAGE:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DamagedFileError(path, reason, "file of `torch.save` since version 1.6") from error
    return _state(path, content, key)


def _state(path, content, key):
    if key is not None and isinstance(content, dict):
        if key not in content:
            found = canonical.listed(list(content))
            raise ValueError(f"A checkpoint of gemma_pytorch has its tensors under `{key}`. `{path}` has {found}.")
        content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"Tensors must be in a dict, by name. `{path}` holds a {type(content).__name__}.")
    if others := [name for name in content if not isinstance(name, str)]:
        raise ValueError(f"Tensors must be in a dict, by name. `{path}` holds one under {others[0]!r}.")
    return content


def _torch():
    try:
        import torch
    except ImportError as error:
        raise ImportError("PyTorch's checkpoints are read with it: `pip install 'keras_gemma[torch]'`.") from error
    return torch
