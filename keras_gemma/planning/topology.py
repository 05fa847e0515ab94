"""Devices of a TPU that nobody rents yet, and what its chips can do."""

import os
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """What a device has, as JAX counts devices.

    Attributes:
        memory: GiB that its compiler gives to programs.
        flops: bfloat16 FLOP/s.
        memory_bandwidth: bytes a second.
        link_bandwidth: bytes a second that it can send to the chips of its pod, over all its links.
        pod_bandwidth: bytes a second that it can send to other pods: a pod's network over its chips.
    """

    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    pod_bandwidth: float


# cloud.google.com/tpu/docs/v5e, v5p, v6e: memory as the compiler reports it, the rest from the tables there; links
# are stated both ways together, and half of that counts. Networks between pods: 6.4 Tb/s for 256 chips of v5e,
# 50 Gb/s a chip of v5p, 25.6 Tb/s for 256 chips of v6e.
CHIPS = {
    "v5e": Chip(15.75, 197e12, 819e9, 200e9, 6.4e12 / 8 / 256),
    "v5p": Chip(95.74, 459e12, 2765e9, 600e9, 50e9 / 8),
    "v6e": Chip(31.25, 918e12, 1638e9, 400e9, 25.6e12 / 8 / 256),
}

# What libtpu asks a machine on Google Cloud for; with these it asks nobody.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # The compiler needs no chip, so several processes may have it.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Four lines a program are not for those who asked for a plan.
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def chip_of(topology):
    """The `Chip` of a topology such as `"v5e:16x16"`, or `None`."""
    return CHIPS.get((topology or "").split(":")[0])


def tpu_devices(topology, pods=1):
    """Devices of a TPU that need not exist, for compiling only.

    Args:
        topology: string, what Google calls a pod or a part of one, as `"v5e:4x4"`.
        pods: int.

    Returns:
        A list of `jax.Device`s.

    Raises:
        ImportError: without libtpu.
        ValueError: for a topology that the compiler does not know.
    """
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ImportError(
            "Compiling for a TPU takes its compiler: pip install 'keras_gemma[plan]' (libtpu, 700 MB)"
        ) from None
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=pods)
    except Exception as error:
        raise ValueError(f"The TPU's compiler knows no such topology. Received: {topology!r} ({error})") from error
    return list(description.devices)
