"""Batches whose place is known, so that another process can go on with the one after the last that was trained.

What Keras draws runs ahead of what is trained; every state here is that of a trained batch.

    restore(state, place) → begin_epoch(place) → Keras draws → trained(place) → state(place)
"""

import dataclasses
import sys
import zlib

import keras
import numpy as np

from keras_gemma.data import batches as batches_module
from keras_gemma.data.batches import ExampleBatches
from keras_gemma.data.batches import GrainBatches
from keras_gemma.data.batches import Orders
from keras_gemma.data.batches import PreprocessedDataset


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run stands: `batch` batches of `epoch` are trained, `step` in the whole run."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


def resumable(batches, shuffle=False, endless=False):
    """Gives batches a place that can be saved and found again.

    Args:
        batches: what `preprocessed` returned.
        shuffle: bool, for a `keras.utils.PyDataset` of the user's. Draws a new order of its batches each pass.
        endless: bool. Whether passes follow each other without regard to epochs, as `steps_per_epoch` wants it;
            otherwise every epoch is one pass.

    Returns:
        What `keras.Model.fit` takes as `x`, with `begin_epoch`, `trained`, `state`, `restore` and `fingerprint`.

    Raises:
        ValueError: for what cannot be started in its middle: generators, `tf.data`, torch and Grain `DataLoader`s,
            data sets with several workers, and those that change between epochs and do not tell how.
    """
    if isinstance(batches, (ExampleBatches, GrainBatches)):
        return IndexedBatches(batches, shuffle, endless)
    if isinstance(batches, PreprocessedDataset):
        _refuse_unpredictable(batches.dataset)
        return IndexedBatches(batches, shuffle, endless)
    if batches_module.is_grain_dataset(batches):
        from keras_gemma.data.resumable_grain import IteratedBatches

        grain = sys.modules["grain"]
        return IteratedBatches(batches.to_iter_dataset() if isinstance(batches, grain.MapDataset) else batches, endless)
    raise ValueError(
        "An exact resume needs data that can start in its middle: lists or arrays of examples, a "
        "`keras.utils.PyDataset`, a `grain.MapDataset` or a `grain.IterDataset`. Generators, `tf.data` and the "
        f"`DataLoader`s of torch and Grain cannot. Received: {type(batches).__name__}"
    )


def _refuse_unpredictable(dataset):
    name = type(dataset).__name__
    if dataset.num_batches is None:
        raise ValueError(f"An exact resume needs a `PyDataset` of known length. Received: {name} without one")
    if dataset.workers > 1 or dataset.use_multiprocessing:
        raise ValueError(
            "An exact resume needs a `PyDataset` with `workers=1` and `use_multiprocessing=False`: others draw ahead "
            f"in an order of their own. Received: {name} with workers={dataset.workers}, "
            f"use_multiprocessing={dataset.use_multiprocessing}"
        )
    hooks = [hook for hook in ("on_epoch_begin", "on_epoch_end") if _overrides(dataset, hook)]
    if hooks and not _has_state(dataset):
        raise ValueError(
            f"An exact resume needs to know what a `PyDataset` changes between epochs: {name} has "
            f"{' and '.join(hooks)}, so it needs `get_state()`, which returns what json can write, and "
            "`set_state(state)` as well."
        )


def _overrides(dataset, hook):
    return getattr(type(dataset), hook) is not getattr(keras.utils.PyDataset, hook)


def _has_state(dataset):
    return hasattr(dataset, "get_state") and hasattr(dataset, "set_state")


class IndexedBatches(keras.utils.PyDataset):
    """Batches that can be had by their number, in passes of known length."""

    def __init__(self, source, shuffle, endless):
        super().__init__()
        self._source = source
        self._endless = endless
        self.of_own_share = isinstance(source, GrainBatches)
        self._by_example = isinstance(source, ExampleBatches)
        self._orders = source.orders if self._by_example else Orders(len(source), shuffle)
        self._dataset = getattr(source, "dataset", None)
        self._first = None
        self._restored = None

    @property
    def num_batches(self):
        """Of a pass that began before a crash, those that are left: an execution of several steps ends with them."""
        return None if self._endless else len(self._source) - (self._first or 0) % len(self._source)

    def __getitem__(self, index):
        return self._batch((self._first or 0) + index)

    def _batch(self, number):
        pass_number, index = divmod(number, len(self._source))
        if self._by_example:
            return self._source.batch(pass_number, index)
        return self._source[int(self._orders[pass_number][index])]

    def _number(self, place):
        return place.step if self._endless else place.epoch * len(self._source) + place.batch

    def on_epoch_begin(self):
        if self._dataset is None:
            return
        # Before the first epoch Keras draws a batch to build the model, which counts for nothing.
        restored, self._restored = (None, self._restored) if self._first is None else (self._restored, None)
        if restored is not None:
            self._dataset.set_state(restored["state"])
        if restored is None or not restored["within_an_epoch"]:
            self._source.on_epoch_begin()

    def on_epoch_end(self):
        if self._dataset is not None:
            self._source.on_epoch_end()

    def begin_epoch(self, place):
        """Makes the batch at `place` the next one. An endless stream is drawn from one iterator for all epochs."""
        if self._first is None or not self._endless:
            self._first = self._number(place)

    def trained(self, place):
        """Nothing has to be kept: any batch can be had again."""

    def batches_of_epoch(self, steps):
        """How many batches an epoch's first `steps` steps hold; the last execution of several may be short."""
        return steps if self._endless else min(steps, len(self._source))

    def state(self, place):
        state = {"seed": self._orders.seed, "last_batch": self._last_digest(place)}
        if self._dataset is not None and _has_state(self._dataset):
            state["dataset"] = self._dataset.get_state()
        return state

    def _last_digest(self, place):
        # Between two epochs a data set of the user's may already have turned to the next one.
        has_turned = not place.batch and self._dataset is not None and _has_state(self._dataset)
        return None if has_turned else digest(self._batch(self._number(place) - 1))

    def restore(self, state, place):
        self._orders.seed = state["seed"]
        if "dataset" in state:
            self._dataset.set_state(state["dataset"])
            self._restored = {"state": state["dataset"], "within_an_epoch": place.batch > 0}
        if self._last_digest(place) != state["last_batch"]:
            raise ValueError(OTHER_BATCH.format(place=place))

    def fingerprint(self):
        about = {"batches in a pass": len(self._source), "shuffled": self._orders.seed is not None}
        if self._by_example:
            about |= {"examples": self._source.example_count, "batch size": self._source.batch_size}
        return {"kind": type(self._source).__name__, **about}


OTHER_BATCH = (
    "the data gives another batch than the one that was trained last, {place.batch} batches into epoch {place.epoch}"
)


def digest(batch):
    """A number that two batches share only if every value of theirs is equal."""
    value = 0
    for leaf in keras.tree.flatten(batch):
        if leaf is not None:
            array = np.ascontiguousarray(leaf)
            about = f"{array.dtype} {array.shape}".encode()
            value = zlib.crc32(array.tobytes(), zlib.crc32(about, value))
    return value
