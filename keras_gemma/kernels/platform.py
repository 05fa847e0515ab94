"""The questions about the platform that the kernels ask."""

import keras


def on_jax():
    return keras.backend.backend() == "jax"


def on_jax_cpu():
    """Whether XLA compiles for a CPU, where the order of a product's operands decides its speed."""
    if not on_jax():
        return False
    import jax

    return jax.default_backend() == "cpu"


def on_torch():
    return keras.backend.backend() == "torch"


def shards_of_batch():
    """Over how many devices `keras.distribution` spreads the rows of a batch."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.batch_dim_name is None:
        return 1
    mesh = distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]
