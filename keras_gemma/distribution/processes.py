"""Several processes that train one model, each with devices of its own: how they meet, and what each of them reads."""

import dataclasses

import keras
import numpy as np
from keras.src.utils import rng_utils

from keras_gemma import startup
from keras_gemma.distribution.layouts import size_of

SECONDS_TO_MEET = 300
# A process that is not heard of for so long is taken for dead, and the others stop.
SECONDS_TO_NOTICE = 30
# So long a process that has come to its end, or to an error, waits for the others to do so; then all stop.
SECONDS_TO_PART = 45


def initialize(
    coordinator_address=None,
    num_processes=None,
    process_id=None,
    initialization_timeout=SECONDS_TO_MEET,
    heartbeat_timeout_seconds=SECONDS_TO_NOTICE,
    shutdown_timeout_seconds=SECONDS_TO_PART,
):
    """Joins the other processes of a job; returns when all are there. Before anything else that touches a device.

    `jax.distributed.initialize` for training. A process that dies, or ends with an error, makes the others end with an
    error within a minute, whatever they are waiting for: JAX by itself takes two to five. And all processes have one
    random seed, so that they initialise and shuffle alike.

    Args:
        coordinator_address: string `"host:port"`, where process 0 can be reached.
        num_processes: int.
        process_id: int, from 0.
        initialization_timeout: int, seconds to wait until all are there.
        heartbeat_timeout_seconds: int, after which a process that is not heard of is dead.
        shutdown_timeout_seconds: int, by which processes may come to their ends one after the other.

        The first three are left out where JAX finds them in its surroundings: on TPU pods, GKE, Slurm and Open MPI.
        Where there is nothing to be found this process is the only one.

    Returns:
        `(process index, number of processes)`.

    Raises:
        ValueError: for some of the first three without the others, and on other backends than JAX.
        RuntimeError: where JAX has looked for its devices already, or the others do not come in time.
    """
    startup.require_jax("distribution.initialize")
    import jax

    where = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in where.items() if value is None]
    if 0 < len(missing) < len(where):
        raise ValueError(f"Give all of {', '.join(where)}, or none of them. Received: no {', '.join(missing)}")
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            shutdown_timeout_seconds=shutdown_timeout_seconds,
        )
    except ValueError as error:
        if not missing or "coordinator_address should be defined" not in str(error):
            raise
    _seed_alike()
    return jax.process_index(), jax.process_count()


def _seed_alike():
    from jax.experimental import multihost_utils

    if rng_utils.get_random_seed() is None:
        keras.utils.set_random_seed(int(multihost_utils.broadcast_one_to_all(np.uint32(np.random.randint(2**31)))))


def share_of_data():
    """Which share of the data this process reads, and how many shares there are.

    Processes whose devices hold the same rows of every batch, since nothing but the model axis lies between them, read
    the same share. To be asked after `keras.distribution.set_distribution`; without one each process reads its own.

    Returns:
        `(index, count)`: this process reads `examples[index::count]`.

    Raises:
        ValueError: where a process has no device in the mesh, or shares a part of its rows with another.

    Example:

    >>> from keras_gemma.distribution import share_of_data
    >>> share_of_data()
    (0, 1)
    """
    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    if jax.process_count() == 1:
        return 0, 1
    rows = rows_of_batches()
    if rows is None:
        return jax.process_index(), jax.process_count()
    return rows.shares[jax.process_index()], rows.share_count


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the rows of every batch lie on processes.

    Attributes:
        blocks: list of tuples. The rows are cut into equal blocks; for each process those that its devices hold.
        block_count: int, blocks in all.
    """

    blocks: list
    block_count: int

    @property
    def shares(self):
        """For each process the number of its share; processes with the same rows have one share."""
        in_order = sorted(set(self.blocks))
        return [in_order.index(blocks) for blocks in self.blocks]

    @property
    def share_count(self):
        return len(set(self.blocks))


def rows_of_batches():
    """The `Rows` of the current `keras.distribution`, `None` without one.

    Raises:
        ValueError: where a process has no device in the mesh, or shares a part of its rows with another.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    import jax

    count = size_of(distribution.device_mesh, distribution.get_data_layout((1,)).axes[0])
    layout = distribution.get_data_layout((count,)).backend_layout
    held = [set() for _ in range(jax.process_count())]
    for device, (block,) in layout.devices_indices_map((count,)).items():
        held[device.process_index].add(block.start or 0)
    blocks = [tuple(sorted(of_process)) for of_process in held]
    if not all(blocks):
        without = [str(process) for process, of_process in enumerate(blocks) if not of_process]
        raise ValueError(
            f"Every process has devices in the mesh. Received: a mesh without any of process {', '.join(without)}"
        )
    if sum(map(len, set(blocks))) != count:
        raise ValueError(
            "Two processes hold the same rows of a batch or none in common. Received: a mesh whose processes hold the "
            f"blocks {blocks} of {count}"
        )
    return Rows(blocks, count)
