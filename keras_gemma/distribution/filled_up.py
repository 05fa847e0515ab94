"""Batches filled up with rows that count for nothing, so that the devices of a mesh can share them."""

import keras
import numpy as np
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from keras_gemma.distribution.layouts import size_of


def filled_up(batches, shuffle=False, class_weight=None):
    """Batches whose number of rows the devices of the current `keras.distribution` divide.

    The rows that fill a batch up are padding throughout and have no weight.

    Args:
        batches: what `preprocessed` or `packed` returned.
        shuffle, class_weight: as of `keras.Model.fit`, which would have passed them on.

    Returns:
        What `keras.Model.fit` takes as `x`; `batches` themselves where every number of rows can be divided.
    """
    multiple = _rows_multiple()
    if multiple == 1:
        return batches
    return FilledUp(get_data_adapter(batches, shuffle=shuffle, class_weight=class_weight), multiple)


def own_rows(batches, predictions):
    """Predictions `[rows, …]` for what `filled_up` returned, without those for the rows that it added."""
    if not isinstance(batches, FilledUp):
        return predictions
    own = np.concatenate([np.arange(total) < own for own, total in batches.rows])
    return keras.tree.map_structure(lambda x: x[own[: len(x)]], predictions)


def _rows_multiple():
    """What divides the rows of every batch that this process draws."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    shards = size_of(distribution.device_mesh, distribution.get_data_layout((1,)).axes[0])
    # Each process draws its own share of the rows; where it has no device of its own, those that share one draw alike.
    return max(1, shards // distribution.num_processes)


class FilledUp(DataAdapter):
    """What Keras draws batches from.

    Args:
        source: the `DataAdapter` of the batches as they are.
        multiple: int.

    Attributes:
        rows: list of pairs, how many rows each batch of the present pass had and has.
    """

    def __init__(self, source, multiple):
        self._source = source
        self._multiple = multiple
        self.rows = []

    def get_jax_iterator(self):
        self.rows = rows = []
        for batch in self._source.get_jax_iterator():
            batch = _with_weights(batch)
            own = len(next(leaf for leaf in keras.tree.flatten(batch) if leaf is not None))
            missing = -own % self._multiple
            rows.append((own, own + missing))
            yield _with_rows_of_zeros(batch, missing) if missing else batch

    @property
    def num_batches(self):
        return self._source.num_batches

    @property
    def batch_size(self):
        size = self._source.batch_size
        return size and size + -size % self._multiple

    @property
    def has_partial_batch(self):
        return self._source.has_partial_batch

    @property
    def partial_batch_size(self):
        size = self._source.partial_batch_size
        return size and size + -size % self._multiple

    def on_epoch_begin(self):
        self._source.on_epoch_begin()

    def on_epoch_end(self):
        self._source.on_epoch_end()


def _with_weights(batch):
    """The batch with ones where it has targets and no weights: added rows, which have zeros, must be told from them."""
    x, y, weights = keras.utils.unpack_x_y_sample_weight(batch)
    if y is not None and weights is None:
        weights = np.ones(np.shape(y)[:2], "float32")
    return keras.utils.pack_x_y_sample_weight(x, y, weights)


def _with_rows_of_zeros(batch, count):
    def extended(array):
        return None if array is None else np.pad(array, [(0, count), *[(0, 0)] * (np.ndim(array) - 1)])

    return keras.tree.map_structure(extended, batch)
