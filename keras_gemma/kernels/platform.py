"""The questions about the platform that the kernels ask."""

import contextlib
import contextvars
import math

import keras

# What a CPU keeps for the backward pass in place of computing it once more: small models have memory to spare.
KEPT_BYTES_ON_CPU = 12 * 2**20

_ANY_BATCH = contextvars.ContextVar("any_batch", default=False)


def on_jax():
    return keras.backend.backend() == "jax"


def on_torch():
    return keras.backend.backend() == "torch"


def shards_of_batch():
    """Over how many devices `keras.distribution` spreads the rows of a batch."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    names = names_of(distribution.get_data_layout((1,)).axes[0])
    return math.prod(mesh.shape[list(mesh.axis_names).index(name)] for name in names)


def names_of(axis):
    """The axes of a mesh that cut an axis of a tensor, as a tuple: empty for `None`."""
    names = axis if isinstance(axis, tuple) else (axis,)
    return tuple(name for name in names if name is not None)


def axis_of_columns():
    """Name of the mesh axis along which `keras.distribution` cuts the columns of a row, or `None`."""
    return getattr(keras.distribution.distribution(), "context_dim_name", None)


def devices_of_columns():
    """How many devices the mesh has along the axis of columns: 1 where it has no such axis."""
    axis = axis_of_columns()
    if axis is None:
        return 1
    mesh = keras.distribution.distribution().device_mesh
    return mesh.shape[list(mesh.axis_names).index(axis)]


def shards_of_columns(length):
    """Over how many devices the columns of rows of a length are spread: 1 where the devices do not divide them.

    Each device has two parts of equal length, as attention needs them.
    """
    devices = devices_of_columns()
    return 1 if length is None or length % (2 * devices) else devices


def axis_of_model():
    """Name of the one mesh axis along which devices have the same tokens and parts of weights, or `None`."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    mesh = distribution.device_mesh
    of_tokens = (*names_of(distribution.get_data_layout((1,)).axes[0]), axis_of_columns())
    others = [name for name, size in zip(mesh.axis_names, mesh.shape) if size > 1 and name not in of_tokens]
    return others[0] if len(others) == 1 else None


def has_all_tokens():
    """Whether the tokens of a batch are all on one device, or on each."""
    return shards_of_batch() * devices_of_columns() == 1


def jax_platform():
    """`"cpu"`, `"gpu"` or `"tpu"`: what XLA compiles for.

    The devices of the active `keras.distribution` decide. They may be those of a TPU that is not there, when a
    program is compiled ahead of time.
    """
    import jax

    distribution = keras.distribution.distribution()
    if distribution is None:
        return jax.default_backend()
    return distribution.device_mesh.backend_mesh.devices.flat[0].platform


def on_jax_cpu():
    """Whether XLA compiles for a CPU, where the order of a product's operands decides its speed."""
    return on_jax() and jax_platform() == "cpu"


@contextlib.contextmanager
def for_any_batch():
    """Within, what is traced does all that any batch of its shape can ask for, and its loops have known lengths."""
    before = _ANY_BATCH.set(True)
    try:
        yield
    finally:
        _ANY_BATCH.reset(before)


def is_for_any_batch():
    """Whether `for_any_batch` is in force."""
    return _ANY_BATCH.get()
