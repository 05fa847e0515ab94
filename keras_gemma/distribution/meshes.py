"""Devices in the order in which a mesh wants them: each pod by itself, and neighbours within it next to each other."""

import math

import keras
import numpy as np


def device_mesh(shape, axis_names, devices):
    """A mesh whose first axis counts pods.

    Args:
        shape: tuple of ints, pods first.
        axis_names: tuple of strings.
        devices: list of `jax.Device`s, `math.prod(shape)` of them.

    Returns:
        A `keras.distribution.DeviceMesh`.

    Raises:
        ValueError: for devices of several pods, unless these are `shape[0]` and have equally many. Devices of one pod
            are cut into as many parts.
    """
    return keras.distribution.DeviceMesh(shape, axis_names, devices=_arranged(shape, devices))


def _arranged(shape, devices):
    from jax.experimental import mesh_utils

    pods, within = shape[0], shape[1:]
    found = pods_of(devices)
    if found is None:
        # Of devices that know no pods, those of a process or a host follow each other already.
        return np.array(devices, dtype=object).reshape(shape)
    if len(found) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if len(found) != pods or any(count != math.prod(within) for count in found.values()):
        raise ValueError(
            f"A mesh of the shape {shape} takes {math.prod(within)} devices from each of {pods} pods. "
            f"Received: {', '.join(f'{count} in pod {pod}' for pod, count in sorted(found.items()))}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (1, *within), (pods, *(1 for _ in within)), devices, allow_split_physical_axes=True
    )


def pods_of(devices):
    """How many devices each pod has, or `None` where devices do not say in which pod they are."""
    if devices[0].platform != "tpu":
        return None
    counts = {}
    for device in devices:
        pod = getattr(device, "slice_index", 0)
        counts[pod] = counts.get(pod, 0) + 1
    return counts
