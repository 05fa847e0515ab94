"""A distribution of its own axis across pods."""

import math
import warnings

import keras

from keras_gemma import startup
from keras_gemma.distribution import layouts

REPLICA = "replica"
MESH_AXES = (REPLICA, layouts.DATA, layouts.MODEL)
MESH_AXES_WITH_CONTEXT = (REPLICA, layouts.DATA, layouts.CONTEXT, layouts.MODEL)


class PodParallel(keras.distribution.ModelParallel):
    """`keras.distribution.ModelParallel` on a mesh `(replica, data, model)` or `(replica, data, context, model)`.

    Batches are cut along `replica` and `data`, weights along `data` and `model` only. With a replica for every pod,
    nothing but the gradients' sum crosses pods. Heads that the model axis does not divide stay whole.

    Devices along `model` have the same rows: each computes with its part of the weights, and between attention and
    feed-forward it keeps hidden states of its part of the tokens only, if they divide the tokens of a row.

    Along `context` the tokens of a row are cut, for rows too long for one device: hidden states from the embeddings
    to the loss, and the queries of attention, whose keys and values every device gathers. Weights are cut along
    `data` and `context` together. Twice the devices along `context` must divide the length of the rows that are
    trained on; `predict` and `evaluate` leave others whole, and `generate` all.

    Args:
        device_mesh: a `keras.distribution.DeviceMesh` with the axes `replica`, `data` and `model`, and `context`
            before `model` if there is one.
        layout_map: optional `keras.distribution.LayoutMap` of that mesh. By default the table of `layouts`, to which
            rows for layers of one's own can be added: `layout_map["my_head/kernel"] = ("data", None)`.
        auto_shard_dataset: bool, as of `keras.distribution.ModelParallel`.

    Raises:
        ValueError: on another backend than JAX, and for a mesh with other axes. And when a variable is made: for a
            weight of two or more axes that no row matches, and an axis that the mesh does not divide.

    Example:

    >>> import keras
    >>> from keras_gemma.distribution import PodParallel
    >>> mesh = keras.distribution.DeviceMesh((1, 1, 1), ("replica", "data", "model"), devices=["cpu:0"])
    >>> PodParallel(mesh).get_data_layout((8, 128)).axes
    (('replica', 'data'), None)
    """

    def __init__(self, device_mesh, layout_map=None, auto_shard_dataset=True):
        startup.require_jax("PodParallel")
        if tuple(device_mesh.axis_names) not in (MESH_AXES, MESH_AXES_WITH_CONTEXT):
            raise ValueError(
                f"The axes of the mesh are {MESH_AXES} or {MESH_AXES_WITH_CONTEXT}. "
                f"Received: {tuple(device_mesh.axis_names)}"
            )
        if layout_map is None:
            layout_map = layouts.layout_map(device_mesh, data=axes_of_widths(device_mesh))
        # Keras asks for it while the base class is being made.
        self._replicas = math.prod(device_mesh.shape[:2])
        super().__init__(layout_map=layout_map, batch_dim_name=layouts.DATA, auto_shard_dataset=auto_shard_dataset)
        if device_mesh.devices.size == 1:
            # On a mesh of one device both kinds of sharding are the same place, which Keras warns of nevertheless.
            warnings.filterwarnings("ignore", message=r"\s*Detected a mix of local .* and distributed")

    @property
    def num_model_replicas(self):
        """Into how many parts a batch is cut."""
        return self._replicas

    @property
    def context_dim_name(self):
        """Name of the mesh axis along which the tokens of a row are cut, or `None`."""
        return layouts.CONTEXT if layouts.CONTEXT in self.device_mesh.axis_names else None

    def get_data_layout(self, data_shape):
        # Columns stay whole: a token id is small beside what the model makes of it, and a process that shares a row
        # with others would have to know which part of it is its own.
        rows = (REPLICA, self.batch_dim_name)
        return layouts.Layout((rows, *(None for _ in data_shape[1:])), self.device_mesh)

    def get_variable_layout(self, variable):
        layout = super().get_variable_layout(variable)
        given = getattr(variable, "_layout", None) is not None
        if given:
            return layout
        path, shape = variable.path, tuple(variable.shape)
        if self.get_tensor_layout(path) is None:
            if variable.trainable and len(shape) > 1:
                raise ValueError(
                    f"A weight of {len(shape)} axes needs a layout: add a row for it to the `layout_map`. "
                    f"Received: {path!r} with the shape {shape}, which none of {', '.join(layouts.LETTERS)} matches"
                )
            return layout
        letters = layouts.letters_of(self._layout_map, path) or "-" * len(shape)
        layout = self._with_whole_heads(layout, letters, shape)
        layout = self._without_slivers(layout, letters, shape)
        layouts.refuse_indivisible(layout, path, shape)
        return layout

    def _with_whole_heads(self, layout, letters, shape):
        axes = tuple(
            None if letter in layouts.HEADS and size % layouts.size_of(self.device_mesh, axis) else axis
            for axis, letter, size in zip(layout.axes, letters, shape, strict=True)
        )
        return layouts.Layout(axes, self.device_mesh)

    def _without_slivers(self, layout, letters, shape):
        """Cuts the vocabulary where parts of the embeddings' width would be narrower than a chip's vectors."""
        if letters != "VD" or layouts.size_of(self.device_mesh, layout.axes[0]) > 1:
            return layout
        parts = layouts.size_of(self.device_mesh, layout.axes[1])
        if shape[1] >= parts * layouts.LANES or shape[0] % parts:
            return layout
        return layouts.Layout((layout.axes[1], None), self.device_mesh)


def axes_of_widths(device_mesh):
    """The mesh axis, or axes, along which the widths of weights are cut: where devices have different tokens."""
    return (layouts.DATA, layouts.CONTEXT) if layouts.CONTEXT in device_mesh.axis_names else layouts.DATA
