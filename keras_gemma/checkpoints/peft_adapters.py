"""LoRA adapters of PEFT (`adapter_config.json`, `adapter_model.safetensors`) in and out.

D width, N heads, H head dim, F feed-forward, r rank.

PEFT factors what is added to a matrix as `(out, r) · (r, in)`. Keras factors it along the last axis of its own kernel:
`(in, r) · (r, out)`, and with heads `(N, D, r) · (r, H)`, where all heads share the second factor. So a rank on one
side can be several on the other; what is added to the weights is the same.
"""

import json
import pathlib
import re

import numpy as np
import regex
from keras import ops

from keras_gemma.checkpoints.canonical import listed
from keras_gemma.checkpoints.hugging_face import BLOCK_TENSORS
from keras_gemma.checkpoints.keras_preset import BLOCK_LAYERS
from keras_gemma.checkpoints.keras_preset import block_path
from keras_gemma.checkpoints.keras_preset import layers_by_path
from keras_gemma.checkpoints.locating import read_json
from keras_gemma.checkpoints.tensor_files import StoredTensor
from keras_gemma.checkpoints.tensor_files import safetensors_tensors
from keras_gemma.checkpoints.tensor_files import tensors_of_files
from keras_gemma.checkpoints.tensor_files import write_safetensors
from keras_gemma.damaged import reading
from keras_gemma.settings import check_number
from keras_gemma.settings import shown
from keras_gemma.staging import staged

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
NAME = re.compile(r"base_model\.model\.((?:model\.)?layers\.(\d+)\.([\w.]+))\.lora_([AB])(?:\.default)?\.weight")
LONGEST_PATTERN, SECONDS_OF_MATCHING = 500, 1.0
COUNTED = re.compile(r"\{\s*\d|\{,")
LORA_ALPHA = 8  # of PEFT, where its file does not say
# Settings of training, and those that say no more than the tensors do.
NO_MATTER = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "lora_dropout",
    "eva_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
SERVED = {"peft_type", "lora_alpha", "alpha_pattern", "use_rslora"}
UNSET = (None, False, "none", "", [], {})
# The other ways of initialising change the model's own weights as well.
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


# === Keras → PEFT ===


def save_adapters(backbone, folder, base_model=None):
    """Writes the LoRA adapters of a backbone as PEFT keeps them.

    Args:
        backbone: a `GemmaBackbone` after `enable_lora`.
        folder: path that does not exist yet.
        base_model: optional string for `adapter_config.json`: what the adapters belong to.

    Raises:
        ValueError: for a backbone without adapters, or with one of its embedding, which PEFT keeps in another way.
        FileExistsError: for a folder that exists.
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"Adapters are written to a folder that does not exist. Received: `{folder}`")
    adapted = [(name, layer) for name, layer in _layers(backbone).items() if layer.lora_enabled]
    if not adapted:
        raise ValueError("Blocks of a backbone have adapters after `enable_lora`. Received: one without")
    if getattr(backbone.token_embedding, "lora_enabled", False):
        raise ValueError("Adapters of blocks are written. Received: one of the embedding as well")
    arrays, settings = {}, {}
    for (index, module), layer in adapted:
        inner, outer = _to_peft(_array(layer.lora_kernel_a), _array(layer.lora_kernel_b), module)
        name = f"base_model.model.model.layers.{index}.{module}"
        arrays |= {f"{name}.lora_A.weight": inner, f"{name}.lora_B.weight": outer}
        settings[module.rpartition(".")[2]] = len(inner), len(inner) * layer.lora_alpha / layer.lora_rank
    tensors = [
        StoredTensor("", name, array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()
    ]
    with staged(folder) as unfinished:
        unfinished.mkdir()
        write_safetensors(unfinished / WEIGHTS_FILE, tensors)
        (unfinished / CONFIG_FILE).write_text(json.dumps(_config(settings, base_model), indent=2))


def _config(settings, base_model):
    ranks = {module: rank for module, (rank, _) in settings.items()}
    alphas = {module: alpha for module, (_, alpha) in settings.items()}
    smallest = min(ranks, key=ranks.get)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": ranks[smallest],
        "lora_alpha": alphas[smallest],
        "lora_dropout": 0.0,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != ranks[smallest]},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != alphas[smallest]},
        "target_modules": list(settings),
        "bias": "none",
    }


def _to_peft(first, second, module):
    """PEFT's factors `(r, in)` and `(out, r)`; of heads that each have a part of the output, a rank of their own."""
    if module == "self_attn.o_proj":
        return np.ascontiguousarray(first.reshape(-1, first.shape[-1]).T), np.ascontiguousarray(second.T)
    if first.ndim == 2:
        return np.ascontiguousarray(first.T), np.ascontiguousarray(second.T)
    heads, width, rank = first.shape
    inner = first.transpose(0, 2, 1).reshape(heads * rank, width)
    return np.ascontiguousarray(inner), np.kron(np.eye(heads, dtype=second.dtype), second.T)


def _array(variable):
    return ops.convert_to_numpy(variable.value).astype("float32")


def _layers(backbone):
    """The layers that can have adapters, by `(index of the block, module of transformers)`."""
    by_path = dict(layers_by_path(backbone))
    return {
        (index, module): by_path[f"{block_path(index)}/{BLOCK_LAYERS[part]}"]
        for index in range(backbone.num_layers)
        for part, (module, _) in BLOCK_TENSORS.items()
        if not part.endswith("norm")
    }


# === PEFT → Keras ===


def load_adapters(backbone, folder):
    """Gives a backbone the LoRA adapters that PEFT keeps in a folder.

    All of them get one rank, as `enable_lora` gives it: the largest that is needed. Those that need less are filled up
    with zeros, which training leaves alone.

    Args:
        backbone: a `GemmaBackbone` without adapters.
        folder: path.

    Raises:
        ValueError: for adapters of another kind or model, naming what was found; the backbone is as it was then.
        FileNotFoundError: for a missing file.
    """
    folder = pathlib.Path(folder)
    layers = _layers(backbone)
    if any(layer.lora_enabled for layer in layers.values()):
        raise ValueError("Adapters are loaded into a backbone without. Received: one after `enable_lora`")
    config = _checked_config(folder / CONFIG_FILE)
    factors = _factors(folder / WEIGHTS_FILE, layers)
    with reading(folder / CONFIG_FILE, "file of PEFT's settings"):
        scales = {place: _scale(config, path, len(inner)) for place, (path, inner, _) in factors.items()}
    pairs = {
        place: _to_keras(inner, outer * scales[place], layers[place].kernel.shape, place[1])
        for place, (_, inner, outer) in factors.items()
    }
    rank = max(len(second) for _, second in pairs.values())
    backbone.enable_lora(rank, target_layer_names=sorted({layers[place].name for place in pairs}))
    for place, layer in layers.items():
        if layer.lora_enabled:
            first, second = pairs.get(place, (None, None))
            layer.lora_kernel_a.assign(_filled_up(first, layer.lora_kernel_a.shape))
            layer.lora_kernel_b.assign(_filled_up(second, layer.lora_kernel_b.shape))


def _checked_config(path):
    if not path.is_file():
        raise FileNotFoundError(f"Adapters of PEFT have the file `{path}`.")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"Adapters of the type LORA are loaded. Received: {config.get('peft_type')!r} in `{path}`")
    for name, value in config.items():
        if name == "init_lora_weights":
            served = value in INITIALISATIONS
        else:
            served = name in NO_MATTER or name in SERVED or value in UNSET
        if not served:
            raise ValueError(
                f"Adapters of two factors and nothing else are loaded. Received: {name}={value!r} in `{path}`"
            )
    return config


def _factors(path, layers):
    """By place, the path that PEFT has for it, and arrays `(r, in)` and `(out, r)`, all of them checked."""
    if not path.is_file():
        raise FileNotFoundError(f"Adapters of PEFT have the file `{path}`.")
    stored = tensors_of_files([path], safetensors_tensors)
    if not stored:
        raise ValueError(f"`{path}` holds no adapters.")
    found, paths = {}, {}
    for name, tensor in stored.items():
        match = NAME.fullmatch(name)
        place = (int(match.group(2)), match.group(3)) if match else None
        if place not in layers:
            raise ValueError(f"`{path}` holds `{name}`, for which this backbone has no layer.")
        paths[place] = match.group(1)
        found.setdefault(place, {})[match.group(4)] = tensor
    halves = [f"layers.{index}.{module}" for (index, module), pair in found.items() if len(pair) < 2]
    if halves:
        raise ValueError(f"`{path}` lacks one of the two factors of {listed(halves)}.")
    return {
        place: (paths[place], *_checked_pair(pair["A"], pair["B"], layers[place], place[1]))
        for place, pair in found.items()
    }


def _checked_pair(inner, outer, layer, module):
    incoming, outgoing = _matrix_shape(layer.kernel.shape, module)
    rank = inner.shape[0]
    for tensor, shape in ((inner, (rank, incoming)), (outer, (outgoing, rank))):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"`{tensor.file}` keeps `{tensor.name}` in shape {tuple(tensor.shape)}; this backbone needs {shape}."
            )
    return tuple(np.array(tensor.read(), "float32") for tensor in (inner, outer))


def _matrix_shape(kernel, module):
    if module == "self_attn.o_proj":
        return kernel[0] * kernel[1], kernel[2]
    return (kernel[1], kernel[0] * kernel[2]) if len(kernel) == 3 else tuple(kernel)


def _scale(config, path, rank):
    patterns = config.get("alpha_pattern") or {}
    # As PEFT does: of several patterns that match, the first.
    matching = (value for pattern, value in patterns.items() if _matches(pattern, path))
    alpha = next(matching, config.get("lora_alpha", LORA_ALPHA))
    check_number({"lora_alpha": alpha}, "lora_alpha", "a finite number", lambda value: True)
    return alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)


def _matches(pattern, path):
    """Whether a layer's path ends with what a regular expression of a file describes, in a time that is bounded."""
    # Counted repetitions inside each other grow without bound before anything is matched.
    if len(pattern) > LONGEST_PATTERN or COUNTED.search(pattern):
        raise ValueError(
            f"Patterns have up to {LONGEST_PATTERN} characters and no counted repetitions. Received: {shown(pattern)}"
        )
    try:
        return regex.match(rf"(.*\.)?({pattern})$", path, timeout=SECONDS_OF_MATCHING) is not None
    except (regex.error, TimeoutError, RecursionError) as error:
        raise ValueError(f"The pattern {shown(pattern)} cannot be matched: {error}") from error


def _to_keras(inner, outer, kernel, module):
    """Keras' factors of a kernel: of several heads, the second has a row for each head and rank, or for each output."""
    if module == "self_attn.o_proj":
        return inner.T.reshape(kernel[0], kernel[1], -1), outer.T
    if len(kernel) == 2:
        return inner.T, outer.T
    heads, width, head_dim = kernel
    rank = len(inner)
    if heads * rank >= head_dim > 1 and heads > 1:
        added = (outer @ inner).reshape(heads, head_dim, width)
        return added.transpose(0, 2, 1), np.eye(head_dim, dtype="float32")
    first = np.zeros((heads, width, heads, rank), "float32")
    for head in range(heads):
        first[head, :, head] = inner.T
    second = outer.reshape(heads, head_dim, rank).transpose(0, 2, 1).reshape(heads * rank, head_dim)
    return first.reshape(heads, width, heads * rank), second


def _filled_up(array, shape):
    filled = np.zeros(tuple(shape), "float32")
    if array is not None:
        filled[tuple(slice(size) for size in array.shape)] = array
    return filled
