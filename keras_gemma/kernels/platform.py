"""The questions about the platform that the kernels ask."""

import math

import keras


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
    axis = distribution.get_data_layout((1,)).axes[0]
    names = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(mesh.shape[list(mesh.axis_names).index(name)] for name in names if name is not None)


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
