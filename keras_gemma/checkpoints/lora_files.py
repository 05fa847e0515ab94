"""LoRA adapters in a file of Keras, `NAME.lora.h5`.

keras-hub numbers the layers and says nothing more than the rank:

    lora/vars/rank                      lora/NUMBER/vars/lora_kernel_a      lora/NUMBER/vars/lora_kernel_b

Here each `lora/NUMBER` has the layer's name besides, and `lora` the targets and alpha, as attributes: keras-hub reads
such a file as its own where alpha is the rank, and a file of keras-hub is read here.
"""

import json
import os
import pathlib
from typing import Any
from typing import NamedTuple

import h5py
import numpy as np
from keras import ops

from keras_gemma.checkpoints.canonical import listed
from keras_gemma.checkpoints.h5_writing import h5_file
from keras_gemma.staging import staged

SUFFIX = ".lora.h5"
FACTORS = ("lora_kernel_a", "lora_kernel_b"), ("lora_embeddings_a", "lora_embeddings_b")


class Adapters(NamedTuple):
    """The content of a file.

    Attributes:
        rank: int.
        alpha: float.
        factors: dict of pairs of arrays, by path of the layer.
    """

    rank: int
    alpha: float
    factors: dict[str, tuple[Any, Any]]


def save_lora(backbone, filepath, layers):
    """Writes the adapters of a backbone; a file that exists is replaced when the new one is complete.

    Args:
        backbone: a `GemmaBackbone`.
        filepath: path that ends with `.lora.h5`.
        layers: dict, the layers that have adapters by path.

    Raises:
        ValueError: for another ending.
        OSError: for a disk without room.
    """
    if not str(filepath).endswith(SUFFIX):
        raise ValueError(f"The name of a file of adapters ends with `{SUFFIX}`. Received: `{filepath}`")
    numbers = {path: number for number, path in _numbered(backbone).items()}
    first = next(iter(layers.values()))
    with staged(filepath, replace=True) as unfinished, h5_file(unfinished) as file:
        group = file.create_group("lora")
        group["vars/rank"] = first.lora_rank
        group.attrs["alpha"] = float(first.lora_alpha)
        group.attrs["targets"] = json.dumps(sorted({layer.name for layer in layers.values()}))
        for path, layer in layers.items():
            of_layer = group.create_group(str(numbers[path]))
            of_layer.attrs["layer"] = path
            for name in next(names for names in FACTORS if hasattr(layer, names[0])):
                of_layer[f"vars/{name}"] = ops.convert_to_numpy(getattr(layer, name).value)


def read_lora(backbone, filepath, layers):
    """Reads a file and compares it with a backbone that shall have the adapters.

    Args:
        backbone: a `GemmaBackbone`, with or without adapters.
        filepath: path.
        layers: dict, all layers that can have adapters by path.

    Returns:
        `Adapters`, those of a whole name of layers each.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a damaged file, and for adapters of another model, naming what does not fit.
    """
    if not os.path.isfile(filepath):
        raise FileNotFoundError(f"There is no file of adapters `{filepath}`.")
    try:
        with h5py.File(filepath, "r") as file:
            rank, alpha, factors = _content(file, _numbered(backbone))
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"`{filepath}` is damaged or holds no adapters of Keras: {error}") from error
    if unknown := [path for path in factors if path not in layers]:
        raise ValueError(
            f"`{filepath}` holds adapters for {listed(unknown)}, for which this backbone has no layer. It has "
            f"{backbone.num_layers} blocks."
        )
    names = {layers[path].name for path in factors}
    if missing := [path for path, layer in layers.items() if layer.name in names and path not in factors]:
        raise ValueError(
            f"`{filepath}` holds no adapters for {listed(missing)}, which this backbone of {backbone.num_layers} "
            "blocks has. Are they of a smaller model?"
        )
    for path, pair in factors.items():
        _check_shapes(filepath, path, pair, layers[path], rank)
    return Adapters(rank, alpha, factors)


def _numbered(backbone):
    """Paths of all layers that have weights, by the number that keras-hub gives them."""
    layers = backbone._flatten_layers(include_self=False)
    return dict(enumerate(layer.path for layer in layers if layer.weights))


def _content(file, paths):
    group = file["lora"]
    rank = int(group["vars/rank"][()])
    factors = {}
    for number, of_layer in group.items():
        if number == "vars":
            continue
        path = of_layer.attrs.get("layer") or paths.get(int(number), f"the layer number {number}")
        names = next((names for names in FACTORS if names[0] in of_layer["vars"]), FACTORS[0])
        factors[path] = tuple(np.array(of_layer[f"vars/{name}"], "float32") for name in names)
    if not factors:
        raise ValueError("it holds none")
    return rank, float(group.attrs.get("alpha", rank)), factors


def _check_shapes(filepath, path, pair, layer, rank):
    shape = _shape_of_weight(layer)
    wanted = (*shape[:-1], rank), (rank, shape[-1])
    if tuple(array.shape for array in pair) != wanted:
        raise ValueError(
            f"`{pathlib.Path(filepath)}` keeps adapters for {path} in the shapes {pair[0].shape} and {pair[1].shape}; "
            f"this backbone needs {wanted[0]} and {wanted[1]}. Are they of another model?"
        )


def _shape_of_weight(layer):
    if hasattr(layer, "input_dim"):
        return layer.input_dim, layer.output_dim
    # Quantised weights may be packed.
    return tuple(getattr(layer, "original_kernel_shape", None) or layer.kernel.shape)
