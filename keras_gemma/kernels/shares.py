"""Causal attention of rows whose columns are cut over devices.

Each device gathers the keys and values of whole rows, which grouped heads make small, and computes its share of the
queries. Late queries see more than early ones, so the columns are taken as twice as many chunks as devices, and device
`i` of `n` computes chunks `i` and `2n - 1 - i`: all have equal work (Grattafiori et al., arXiv 2407.21783, section
3.3.2). In the network a device has two neighbouring chunks; here queries go where they are computed, and what they
attended to comes back.
"""

from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax


class Share(NamedTuple):
    """The queries that a device computes, in parts of equal length.

    Attributes:
        starts: tuple for each device of tuples for each of its parts: the column at which the part begins.
        device: int scalar. Which device.
    """

    starts: tuple
    device: Any

    @property
    def parts(self):
        return len(self.starts[0])

    @property
    def own_starts(self):
        """Int tensor `[parts]`."""
        return jnp.asarray(self.starts, "int32")[self.device]

    def own(self, x, width):
        """The columns `[B, parts, width]` of `x` `[B, T]` at which the queries stand."""
        starts = self.own_starts
        parts = [lax.dynamic_slice_in_dim(x, starts[part], width, 1) for part in range(self.parts)]
        return jnp.stack(parts, axis=1)


# The one device that has all queries.
WHOLE = Share(((0,),), 0)


def on_own_columns(attend, axis, devices, query, key, value, segment_ids):
    """`attend` of what a device has of each row, within a `jax.shard_map`.

    Args:
        attend: callable of queries, of keys, values and segment ids of whole rows, and of a `Share`.
        axis: string. The mesh axis that cuts columns.
        devices: int. Along that axis, `n`.
        query: float tensor `[B, T / n, N, H]`.
        key: float tensor `[B, T / n, K, H]`.
        value: float tensor `[B, T / n, K, H]`.
        segment_ids: int tensor `[B, T / n]`.

    Returns:
        A tensor `[B, T / n, N, H]`.
    """
    key, value, segment_ids = (lax.all_gather(x, axis, axis=1, tiled=True) for x in (key, value, segment_ids))
    routes = _routes(devices)
    width = query.shape[1] // 2
    # Where chunk `2d`, or `2d + 1`, of device `d` goes.
    arrived = [
        lax.ppermute(query[:, place * width : (place + 1) * width], axis, route) for place, route in enumerate(routes)
    ]
    share = Share(_starts(routes, width), lax.axis_index(axis))
    attended = attend(jnp.concatenate(arrived, axis=1), key, value, segment_ids, share)
    back = [[(target, source) for source, target in route] for route in routes]
    returned = [
        lax.ppermute(attended[:, place * width : (place + 1) * width], axis, route) for place, route in enumerate(back)
    ]
    return jnp.concatenate(returned, axis=1)


def _routes(devices):
    """Pairs of source and target: of the first chunk of every device, and of the second."""
    return [[(source, _owner(2 * source + place, devices)) for source in range(devices)] for place in (0, 1)]


def _owner(chunk, devices):
    return min(chunk, 2 * devices - 1 - chunk)


def _starts(routes, width):
    sources = [{target: source for source, target in route} for route in routes]
    return tuple(
        tuple((2 * source_of[device] + place) * width for place, source_of in enumerate(sources))
        for device in range(len(routes[0]))
    )
