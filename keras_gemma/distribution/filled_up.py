"""Batches filled up with rows that count for nothing, so that the devices of a mesh can share them, and cut apart so
that each process has the rows of its own devices.

    the same batches on every process → filled up → own rows ┐
    each process' own share           → filled up ───────────┴→ Keras, which puts them together
"""

import contextlib
import warnings
import zlib

import keras
import numpy as np
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters import is_grain_dataset
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from keras_gemma.distribution.processes import rows_of_batches


def filled_up(batches, shuffle=False, class_weight=None, steps=None):
    """Batches whose number of rows the devices of the current `keras.distribution` divide.

    The rows that fill a batch up are padding throughout and have no weight.

    With several processes the batches are the same on all of them and each process keeps the rows of its own devices;
    unless they are Grain data sets, or the distribution has `auto_shard_dataset=False`: then each process hands over
    its own share of every batch, as many rows as the others, and trains on all of that.

    Args:
        batches: what `preprocessed` or `packed` returned.
        shuffle, class_weight: as of `keras.Model.fit`, which would have passed them on.
        steps: optional int, how many batches are drawn: a share of a process' own that ends in between stops it with
            an error, and so the others. Without it, processes that read their own share of unknown length wait for
            each other before each batch, and one that has come to its end goes on with no rows.

    Returns:
        What `keras.Model.fit` takes as `x`; `batches` themselves where every number of rows can be divided.

    Raises:
        ValueError: where a process has no device in the mesh, or shares a part of its rows with another. And when
            batches are drawn: where those that are the same on all processes differ, and where shares have different
            rows on processes that have to have the same, differ in their sizes, or end between `steps`.
    """
    rows = rows_of_batches()
    if rows is None or rows.block_count == len(rows.blocks) == 1:
        return batches
    source = _adapter(batches, shuffle, class_weight)
    if len(rows.blocks) == 1:
        return FilledUp(source, rows.block_count)
    if is_own_share(batches):
        return OwnShares(source, rows, steps if source.num_batches is None else source.num_batches)
    return OwnRows(source, rows)


def is_own_share(batches):
    """Whether batches are the share of this process, and not the same on all processes.

    Args:
        batches: what `preprocessed` or `packed` returned.

    Returns:
        A bool: `True` for Grain data sets, for batches that say so, and where the distribution has
        `auto_shard_dataset=False` or there is none.
    """
    distribution = keras.distribution.distribution()
    cut_here = distribution is not None and distribution.auto_shard_dataset
    return not cut_here or is_grain_dataset(batches) or getattr(batches, "of_own_share", False)


def own_rows(batches, predictions):
    """Predictions `[rows, …]` for what `filled_up` returned, without those for the rows that it added.

    On several processes all rows of batches that are the same on all, and of a process' own share its own.

    Args:
        batches: what `filled_up` returned, drawn to their end.
        predictions: tree of arrays `[rows, …]`, with the rows that were added.

    Returns:
        A tree of arrays `[rows, …]`; `predictions` themselves where nothing was filled up.
    """
    if not isinstance(batches, FilledUp):
        return predictions
    starts = np.cumsum([0] + [total for _, total in batches.rows[:-1]])
    own = np.concatenate([start + own for start, (own, _) in zip(starts, batches.rows)])
    return keras.tree.map_structure(lambda x: x[own[own < len(x)]], predictions)


def _adapter(batches, shuffle, class_weight):
    with _cut_by_nobody_else():
        return get_data_adapter(batches, shuffle=shuffle, class_weight=class_weight)


@contextlib.contextmanager
def _cut_by_nobody_else():
    # Keras cuts `tf.data` alone, and only batches that the number of processes divides; anything else it refuses.
    distribution = keras.distribution.distribution()
    before = distribution.auto_shard_dataset
    distribution.auto_shard_dataset = False
    try:
        yield
    finally:
        distribution.auto_shard_dataset = before


class FilledUp(DataAdapter):
    """What Keras draws batches from, in one process.

    Args:
        source: the `DataAdapter` of the batches as they are.
        multiple: int, what divides the rows of every batch afterwards.

    Attributes:
        source: as given.
        rows: list of pairs: of each batch of the present pass the numbers of the rows that were there before, and how
            many rows it has on all processes together.
    """

    def __init__(self, source, multiple):
        self.source = source
        self._multiple = multiple
        self.rows = []

    def get_jax_iterator(self):
        self.rows = rows = []
        for batch in self.source.get_jax_iterator():
            own = count_rows(batch)
            total = own + -own % self._multiple
            rows.append((np.arange(own), total))
            yield _with_rows_of_zeros(_with_weights(batch), total - own)

    @property
    def num_batches(self):
        return self.source.num_batches

    @property
    def batch_size(self):
        size = self.source.batch_size
        return size and size + -size % self._multiple

    @property
    def has_partial_batch(self):
        return self.source.has_partial_batch

    @property
    def partial_batch_size(self):
        size = self.source.partial_batch_size
        return size and size + -size % self._multiple

    def on_epoch_begin(self):
        self.source.on_epoch_begin()

    def on_epoch_end(self):
        self.source.on_epoch_end()


class OwnRows(FilledUp):
    """The rows of this process' devices, of batches that are the same on all processes."""

    def __init__(self, source, rows):
        super().__init__(source, rows.block_count)

    def get_jax_iterator(self):
        for number, batch in enumerate(super().get_jax_iterator()):
            if number == 0:
                self._refuse_different(batch)
            yield _own_parts(batch, self.rows[-1][1])

    def _refuse_different(self, batch):
        if not _all_equal(_gathered(_digest(batch), self.num_batches or 0)):
            raise ValueError(
                "With `auto_shard_dataset=True` every process hands over the same batches, of which it trains its own "
                "rows. Received: different ones. Let the processes shuffle alike (by "
                "`keras_gemma.distribution.initialize` or `keras.utils.set_random_seed`); where each of them reads a "
                "share of its own, make the distribution with `auto_shard_dataset=False`"
            )


class OwnShares(FilledUp):
    """Batches of which each process has its own share, all made as large as the first one.

    Args:
        source: the `DataAdapter` of this process' share.
        rows: the `Rows` of the distribution.
        steps: int, a pass is as long as a multiple of it; `None` where nobody knows, and all wait for the longest.
    """

    def __init__(self, source, rows, steps):
        import jax

        self._places = rows.blocks[jax.process_index()]
        self._block_count = rows.block_count
        self._shares = rows.shares
        self._steps = steps
        super().__init__(source, len(self._places))

    def get_jax_iterator(self):
        self.rows = rows = []
        for batch, own, largest in self._with_largest():
            total = largest + -largest % self._multiple
            if not rows:
                self._refuse_other_shares(batch)
            of_all = total // self._multiple * self._block_count
            rows.append((self._in_all_rows(np.arange(own), total), of_all))
            yield _own_parts(_with_rows_of_zeros(_with_weights(batch), total - own), of_all)
        # A run that goes on in the middle of a pass has what is left of it.
        steps = self.num_batches or self._steps
        if steps is not None and len(rows) % steps:
            # The others may have a batch, and would wait for this process in a step that it never begins.
            raise ValueError(
                f"A share lasts as long as its steps. Received: {len(rows)} batches for every {steps} steps"
            )

    def _with_largest(self):
        """Batches, how many rows they have, and how many the largest on any process has."""
        if self._steps is None:
            yield from _in_step(self.source.get_jax_iterator())
            return
        largest = None
        for batch in self.source.get_jax_iterator():
            own = count_rows(batch)
            if largest is None:
                largest = own
                self._refuse_uneven(own)
            if own > largest:
                raise ValueError(
                    "Where each process reads its own share, no batch is larger than the first. "
                    f"Received: {own} rows after {largest}"
                )
            yield batch, own, largest

    def _in_all_rows(self, numbers, total):
        """The numbers that rows have in the batch of all processes."""
        size = total // self._multiple
        return np.array(self._places)[numbers // size] * size + numbers % size

    def _refuse_uneven(self, own):
        sizes = _gathered(own, self.num_batches or 0)
        if not _all_equal(sizes):
            raise ValueError(
                "Every process reads as many rows as the others. Received, as (rows of a batch, batches): "
                f"{', '.join(str(tuple(map(int, size))) for size in sizes)}"
            )

    def _refuse_other_shares(self, batch):
        digests = _gathered(_digest(batch))[:, 0]
        first_of_share = digests[[self._shares.index(share) for share in self._shares]]
        if (digests != first_of_share).any():
            raise ValueError(
                "Processes whose devices hold the same rows read the same share of the data: make it with "
                "`keras_gemma.distribution.share_of_data()`, and the mixture after `set_distribution`. "
                f"Received: different ones on processes of the shares {self._shares}"
            )
        if _all_equal(digests) and max(self._shares) > 0:
            warnings.warn(
                "Every process reads the same batch and trains on all of it. Let each take its own share: "
                "`index, count = keras_gemma.distribution.share_of_data()`, `examples[index::count]`.",
                stacklevel=2,
            )


def _in_step(batches):
    """Batches as long as any process has one, how many rows they have, and how many the largest on any process has.

    A process that has come to its end goes on with no rows.
    """
    batches, empty = iter(batches), None
    while True:
        batch = next(batches, None)
        sizes = _gathered(0 if batch is None else count_rows(batch))
        if not sizes.any():
            return
        # Keras has made sure of a first batch.
        if empty is None:
            empty = keras.tree.map_structure(lambda x: None if x is None else np.asarray(x)[:0], batch)
        batch = empty if batch is None else batch
        yield batch, count_rows(batch), int(sizes.max())


def count_rows(batch):
    """How many rows a batch has."""
    return len(next(leaf for leaf in keras.tree.flatten(batch) if leaf is not None))


def _own_parts(batch, row_count):
    return keras.tree.map_structure(lambda array: _own_part(array, row_count), batch)


def _own_part(array, row_count):
    """What the devices of this process hold of an array, or of one whose rows it has already.

    Args:
        array: array `[rows, …]` or `None`.
        row_count: int, rows on all processes together. Where `array` has fewer, no more are cut away, but columns may
            be.
    """
    if array is None:
        return None
    shape = (row_count, *array.shape[1:])
    layout = keras.distribution.distribution().get_data_layout(shape).backend_layout
    held = layout.addressable_devices_indices_map(shape).values()
    for axis in range(len(shape)):
        pieces = sorted({piece[axis].indices(shape[axis])[:2] for piece in held})
        if pieces != [(0, shape[axis])] and (axis > 0 or len(array) == row_count):
            array = np.take(array, np.concatenate([np.arange(*piece) for piece in pieces]), axis)
    return array


def _digest(batch):
    digest = 0
    for leaf in keras.tree.flatten(batch):
        digest = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), digest) if leaf is not None else digest
    return digest


def _gathered(*numbers):
    """The numbers of every process: uint32 `[processes, numbers]`."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(numbers, "uint32"))


def _all_equal(gathered):
    return bool((gathered == gathered[0]).all())


def _with_weights(batch):
    """The batch with ones where it has targets and no weights: added rows, which have zeros, must be told from them."""
    x, y, weights = keras.utils.unpack_x_y_sample_weight(batch)
    if y is not None and weights is None:
        weights = np.ones(np.shape(y)[:2], "float32")
    return keras.utils.pack_x_y_sample_weight(x, y, weights)


def _with_rows_of_zeros(batch, count):
    if not count:
        return batch

    def extended(array):
        return None if array is None else np.pad(array, [(0, count), *[(0, 0)] * (np.ndim(array) - 1)])

    return keras.tree.map_structure(extended, batch)
