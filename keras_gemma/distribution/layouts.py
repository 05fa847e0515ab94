"""Where the weights lie on a mesh: one row a kind of variable, each axis a letter, each letter an axis of the mesh.

V vocabulary, D width, N query heads, K key-value heads, H head dim, F feed-forward, R rank of an adapter, 1 a reward.

What an optimizer keeps in the shape of a weight lies where the weight lies: Keras hands its layout on. Norm scales,
the scales of 8-bit weights and counters are on every device.
"""

import math
import re
from types import SimpleNamespace

import keras

MODEL, DATA, CONTEXT = "model", "data", "context"

CUT_ALONG = {"V": MODEL, "N": MODEL, "K": MODEL, "F": MODEL, "D": DATA, "H": None, "R": None, "1": None}
# Heads that the model axis does not divide, such as the one key-value head of 2B, stay whole.
HEADS = "NK"
# Numbers that a TPU's vector unit takes side by side. Parts of a width that are narrower are filled up to it.
LANES = 128

LETTERS = {
    ".*token_embedding/embeddings": "VD",
    ".*decoder_block.*/attention/query/kernel": "NDH",
    ".*decoder_block.*/attention/(key|value)/kernel": "KDH",
    ".*decoder_block.*/attention/attention_output/kernel": "NHD",
    ".*decoder_block.*/(ffw_gating|ffw_gating_2)/kernel": "DF",
    ".*decoder_block.*/ffw_linear/kernel": "FD",
    ".*reward_head/kernel": "D1",
    ".*token_embedding/lora_embeddings_a": "VR",
    ".*token_embedding/lora_embeddings_b": "RD",
    ".*decoder_block.*/attention/query/lora_kernel_a": "NDR",
    ".*decoder_block.*/attention/(key|value)/lora_kernel_a": "KDR",
    ".*decoder_block.*/attention/(query|key|value)/lora_kernel_b": "RH",
    ".*decoder_block.*/attention/attention_output/lora_kernel_a": "NHR",
    ".*decoder_block.*/(ffw_gating|ffw_gating_2)/lora_kernel_a": "DR",
    ".*decoder_block.*/(ffw_gating|ffw_gating_2)/lora_kernel_b": "RF",
    ".*decoder_block.*/ffw_linear/lora_kernel_a": "FR",
    ".*decoder_block.*/(attention/attention_output|ffw_linear)/lora_kernel_b": "RD",
}


def layout_map(device_mesh, model=MODEL, data=DATA, heads=None):
    """The table for one mesh.

    Args:
        device_mesh: a `keras.distribution.DeviceMesh`.
        model: string. Name of the mesh's model axis.
        data: string or tuple of strings or `None`. Name of the mesh's axis, or axes, along which widths are cut;
            `None` leaves them whole.
        heads: optional dict, how many heads `"N"` and `"K"` are. Those that the model axis does not divide stay whole.

    Returns:
        A `keras.distribution.LayoutMap`.

    Raises:
        ValueError: for anything but a mesh, or a mesh without one of the axes.
    """
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(f"`device_mesh` must be a `keras.distribution.DeviceMesh`. Received: {device_mesh!r}")
    for axis in (*names_of(model), *names_of(data)):
        if axis not in device_mesh.axis_names:
            raise ValueError(f"The mesh has the axes {device_mesh.axis_names}. Received: {axis!r}")
    names = {MODEL: model, DATA: data, None: None}
    whole = [letter for letter, count in (heads or {}).items() if count % size_of(device_mesh, model)]
    layouts = keras.distribution.LayoutMap(device_mesh)
    for path, letters in LETTERS.items():
        axes = tuple(None if letter in whole else names[CUT_ALONG[letter]] for letter in letters)
        layouts[path] = Layout(axes, device_mesh)
    return layouts


class Layout(keras.distribution.TensorLayout):
    """A layout that may cut an axis of a tensor along several axes of a mesh, which Keras' own cannot express.

    Args:
        axes: tuple with, for each axis of the tensor, the name of an axis of the mesh, a tuple of names, or `None`.
        device_mesh: a `keras.distribution.DeviceMesh`.
    """

    def __init__(self, axes, device_mesh):
        super().__init__((None,) * len(axes), device_mesh)
        self._joint_axes = tuple(axes)

    @property
    def axes(self):
        return self._joint_axes


def letters_of(layouts, path):
    """The letters of the row that a layout map took the layout of `path` from, `None` where it is no row of ours."""
    layout = layouts[path]
    return next((letters for pattern, letters in LETTERS.items() if layouts.get(pattern) is layout), None)


def refuse_indivisible(layout, path, shape):
    """Raises a `ValueError` for a layout that does not cut a variable into equal parts."""
    for index, axis in enumerate(layout.axes):
        size = size_of(layout.device_mesh, axis)
        if shape[index] % size:
            raise ValueError(
                f"A mesh axis divides what it cuts. Axis {index} of {path!r} with the shape {tuple(shape)} has "
                f"{shape[index]} entries. Received: {size} devices along the mesh axis {axis!r}"
            )


def size_of(mesh, axis):
    """Devices along an axis of the mesh, along all of several, or 1 for `None`."""
    return math.prod(mesh.shape[list(mesh.axis_names).index(name)] for name in names_of(axis))


def names_of(axis):
    """The axes of a mesh that cut an axis of a tensor, as a tuple: empty for `None`."""
    names = axis if isinstance(axis, tuple) else (axis,)
    return tuple(name for name in names if name is not None)


def check_weights(shapes):
    """Raises a `ValueError` where the current distribution cannot place weights, before any is made.

    Args:
        shapes: dict of shapes by path.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    for path, shape in shapes.items():
        weight = SimpleNamespace(path=path, shape=shape, trainable=True)
        refuse_indivisible(distribution.get_variable_layout(weight), path, shape)


def shapes_of_weights(**sizes):
    """The shapes of all matrices of a backbone by path, those of one block standing for all.

    Args:
        **sizes: int by letter.
    """
    paths = (
        "token_embedding/embeddings",
        "decoder_block_0/attention/query/kernel",
        "decoder_block_0/attention/key/kernel",
        "decoder_block_0/attention/attention_output/kernel",
        "decoder_block_0/ffw_gating/kernel",
        "decoder_block_0/ffw_linear/kernel",
    )
    return {path: tuple(sizes[letter] for letter in _letters_of_path(path)) for path in paths}


def _letters_of_path(path):
    return next(letters for pattern, letters in LETTERS.items() if re.fullmatch(pattern, path))
