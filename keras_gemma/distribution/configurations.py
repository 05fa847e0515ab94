"""Meshes by name, each a `keras.distribution` object in one line."""

import dataclasses
import math

from keras_gemma import startup
from keras_gemma.distribution import layouts
from keras_gemma.distribution import meshes
from keras_gemma.distribution.pods import MESH_AXES
from keras_gemma.distribution.pods import MESH_AXES_WITH_CONTEXT
from keras_gemma.distribution.pods import PodParallel
from keras_gemma.distribution.pods import axes_of_widths
from keras_gemma.mesh_table import ALL
from keras_gemma.mesh_table import MESHES
from keras_gemma.mesh_table import SERVING


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A mesh and what it is for. Called, it gives the distribution.

    Attributes:
        name: string.
        use: `"training"`, `"adapters"` (full training would not fit) or `"serving"`, whose weights are cut along the
            model axis only: nothing of them is sent around for a token.
        topology: string, what Google calls one pod, as `"v5e:16x16"`; `None` for devices of any kind.
        replica: int, pods.
        data: int, or `None` for all devices that there are.
        model: int, or `None` for all devices that there are.
    """

    name: str
    use: str
    topology: str | None
    replica: int
    data: int | None
    model: int | None

    def __call__(self, devices=None, auto_shard_dataset=True, context=1, model=None):
        """Makes the distribution.

        Args:
            devices: optional list of devices: `jax.Device`s, or names as of `keras.distribution.list_devices`. All
                that JAX sees by default.
            auto_shard_dataset: bool. `False` where each process reads a share of the data of its own.
            context: int. Over how many devices the tokens of a row are cut, of those along the data axis, which
                becomes as much shorter. See `PodParallel`.
            model: optional int, length of the model axis in place of the configuration's; the data axis takes the
                other devices of a pod.

        Returns:
            A `PodParallel`.

        Raises:
            ValueError: on another backend than JAX, for no devices or another number of them, devices in another number
                of pods, a context that does not divide the data axis, or a model axis that does not divide a pod.
        """
        startup.require_jax(self.name)
        devices = _jax_devices(devices)
        if math.prod(self.shape(len(devices))) != len(devices):
            raise ValueError(self._wrong_number(len(devices)))
        axes = MESH_AXES if context == 1 else MESH_AXES_WITH_CONTEXT
        mesh = meshes.device_mesh(self.shape(len(devices), context, model), axes, devices)
        table = layouts.layout_map(mesh, data=None if self.use == SERVING else axes_of_widths(mesh))
        return PodParallel(mesh, table, auto_shard_dataset)

    def shape(self, device_count, context=1, model=None):
        """Sizes of the axes of the mesh.

        Args:
            device_count: int, how many devices there are: what a size of `None` stands for.
            context, model: as of a call.

        Returns:
            A tuple of ints: `(replica, data, model)`, or `(replica, data, context, model)` with a context above 1.

        Raises:
            ValueError: for a model axis that does not divide the devices of a pod, and a context that does not divide
                the data axis.
        """
        replica, data, own_model = (
            device_count if size is ALL else size for size in (self.replica, self.data, self.model)
        )
        pod = data * own_model
        model = own_model if model is None else model
        if model < 1 or pod % model:
            raise ValueError(
                f"The model axis divides the devices of a pod, of which {self.name!r} has {pod}. "
                f"Received: model={model}"
            )
        data = pod // model
        if context == 1:
            return replica, data, model
        if context < 1 or data % context:
            raise ValueError(
                f"The context divides the data axis, which {self.name!r} gives {data} devices. "
                f"Received: context={context}"
            )
        return replica, data // context, context, model

    @property
    def device_count(self):
        """How many devices it wants, or `None` where it takes all."""
        return None if ALL in (self.data, self.model) else math.prod((self.replica, self.data, self.model))

    def _wrong_number(self, found):
        fitting = [name for name, one in CONFIGURATIONS.items() if one.device_count in (found, None)]
        return (
            f"The configuration {self.name!r} is a mesh of {self.device_count} devices: {self.replica} × {self.data} × "
            f"{self.model} of replica, data and model. Received: {found} devices, which suit {', '.join(fitting)}"
        )


def configuration(name):
    """The `Configuration` of a name; a `ValueError` that lists them for one that is unknown."""
    if name not in CONFIGURATIONS:
        raise ValueError(f"Configurations are {', '.join(CONFIGURATIONS)}. Received: {name!r}")
    return CONFIGURATIONS[name]


def _jax_devices(devices):
    import jax

    if devices is None:
        return jax.devices()
    if len(devices) == 0:
        raise ValueError("A mesh has at least one device. Received: devices=[]")
    named = {f"{device.platform}:{device.id}": device for device in jax.devices()}
    unknown = [device for device in devices if isinstance(device, str) and device not in named]
    if unknown:
        raise ValueError(f"Devices are among {', '.join(named)}. Received: {', '.join(unknown)}")
    return [named[device] if isinstance(device, str) else device for device in devices]


CONFIGURATIONS = {name: Configuration(name, *settings) for name, settings in MESHES.items()}
