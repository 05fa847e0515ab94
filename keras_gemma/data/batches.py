"""What users hand to `fit`, as batches that have been through a preprocessing function.

Python or NumPy examples ─────┐
Grain, PyDataset, tf.data ────┼→ preprocess → (x, y, sample_weight)
generator, torch DataLoader ──┘
"""

import collections.abc
import math
import sys

import keras
import numpy as np

from keras_gemma.data import text_checks

DEFAULT_BATCH_SIZE = 32
# Grain's repeated data sets have a length of this order, or a part of it once they are batched.
ENDLESS = 2**40


def preprocessed(x, y, sample_weight, batch_size, preprocess, shuffle=False):
    """Applies `preprocess(x, y, sample_weight)` to every batch of `x`.

    Args:
        x: examples as a list, an array or a column of a table, or a dict or a table of these; or batches as a
            `keras.utils.PyDataset`, a `tf.data.Dataset`, a Grain data set, a torch `DataLoader`, or an iterator.
            Batches `(x, y)` or `(x, y, sample_weight)` whose `x` has `token_ids` are preprocessed already and pass as
            they are.
        y, sample_weight: as `x`, for examples only.
        batch_size: int, for examples only. 32 if `None`.
        preprocess: callable from one batch to `(x, y, sample_weight)`.
        shuffle: bool, for examples only. Draws a new order each epoch.

    Returns:
        Batches in a form that `keras.Model.fit` takes.

    Raises:
        ValueError: for a lone example, lengths that differ, texts that no tokenizer reads (with the number of the
            example), and labels or a batch size beside batches.
    """
    if not yields_batches(x):
        return ExampleBatches(x, y, sample_weight, batch_size or DEFAULT_BATCH_SIZE, preprocess, shuffle)
    _refuse_beside_batches(x, y=y, sample_weight=sample_weight, batch_size=batch_size)
    if isinstance(x, keras.utils.PyDataset):
        return PreprocessedDataset(x, preprocess)
    if _is_tf_dataset(x):
        tf = sys.modules["tensorflow"]
        batches = x.map(
            lambda *parts: _preprocess_batch(preprocess, parts if len(parts) > 1 else parts[0]),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        return batches.prefetch(tf.data.AUTOTUNE)
    if is_grain_dataset(x):
        return _preprocessed_grain(x, preprocess)
    if _is_torch_loader(x):
        return _preprocessed_torch(x, preprocess)
    return (_preprocess_batch(preprocess, batch) for batch in x)


def yields_batches(x):
    """Whether `x` is made of batches rather than of examples."""
    return (
        isinstance(x, (keras.utils.PyDataset, collections.abc.Iterator))
        or _is_tf_dataset(x)
        or is_grain_dataset(x)
        or _is_grain_loader(x)
        or _is_torch_loader(x)
    )


def _is_tf_dataset(x):
    tf = sys.modules.get("tensorflow")
    return tf is not None and hasattr(tf, "data") and isinstance(x, tf.data.Dataset)


def is_grain_dataset(x):
    """Whether `x` is a Grain `MapDataset` or `IterDataset`."""
    # One can only exist where Grain has been imported.
    grain = sys.modules.get("grain")
    return grain is not None and isinstance(x, (grain.MapDataset, grain.IterDataset))


def _is_grain_loader(x):
    grain = sys.modules.get("grain")
    return grain is not None and isinstance(x, grain.DataLoader)


def _is_torch_loader(x):
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "utils") and isinstance(x, torch.utils.data.DataLoader)


def _preprocessed_grain(x, preprocess):
    grain = sys.modules["grain"]
    if isinstance(x, grain.MapDataset) and len(x) < ENDLESS:
        return GrainBatches(x, preprocess)
    return x.map(lambda batch: _preprocess_batch(preprocess, batch))


def _preprocessed_torch(loader, preprocess):
    from torch.utils import data as torch_data

    class Preprocessed(torch_data.IterableDataset):
        def __iter__(self):
            return (_preprocess_batch(preprocess, _parts_as_tuple(batch)) for batch in loader)

    class PreprocessedOfKnownLength(Preprocessed):
        def __len__(self):
            return len(loader)

    # Another loader and not a generator: it starts anew each epoch.
    known_length = hasattr(loader.dataset, "__len__")
    return torch_data.DataLoader(PreprocessedOfKnownLength() if known_length else Preprocessed(), batch_size=None)


def _parts_as_tuple(batch):
    # A torch loader collates (x, y, weight) examples into a list of its parts.
    if isinstance(batch, list) and any(hasattr(part, "shape") for part in batch):
        return tuple(batch)
    return batch


def _preprocess_batch(preprocess, batch):
    if _is_finished(batch):
        return batch
    # A list is a batch of examples; only a tuple carries labels or weights.
    parts = keras.utils.unpack_x_y_sample_weight(batch) if isinstance(batch, tuple) else (batch,)
    return preprocess(*parts)


def _is_finished(batch):
    # Batches that `training_batches` has made, or a user's own: no text has this field.
    return isinstance(batch, tuple) and len(batch) > 1 and isinstance(batch[0], dict) and "token_ids" in batch[0]


def split_off_validation(x, y, sample_weight, share):
    """Cuts the last `share` of the examples off, as Keras does, before any shuffling.

    Returns:
        `(x, y, sample_weight)` to train on and the same to validate on.

    Raises:
        ValueError: if one of the two would be empty, or `x` is not a collection of examples.
    """
    if yields_batches(x):
        raise ValueError(
            "`validation_split` cuts lists and arrays of examples; pass `validation_data` beside a data set. "
            f"Received: {type(x).__name__}"
        )
    x, y, sample_weight = (indexable(part) for part in (x, y, sample_weight))
    count = count_examples(x)
    cut = math.floor(count * (1 - share))
    if not 0 < cut < count:
        raise ValueError(
            f"`validation_split` must leave examples on both sides. Received: {share} of {count} examples."
        )
    parts = (x, y, sample_weight)
    first, last = range(cut), range(cut, count)
    return tuple(take(part, first) for part in parts), tuple(take(part, last) for part in parts)


class ExampleBatches(keras.utils.PyDataset):
    """Batches of examples that lie in memory, preprocessed when they are asked for."""

    def __init__(self, x, y, sample_weight, batch_size, preprocess, shuffle):
        super().__init__()
        x, y, sample_weight = (indexable(part) for part in (x, y, sample_weight))
        counts = {count_examples(part) for part in (x, y, sample_weight) if part is not None}
        if len(counts) != 1:
            raise ValueError(f"`x`, `y` and `sample_weight` need as many examples each. Received: {sorted(counts)}")
        self._parts = (x, y, sample_weight)
        if counts == {0}:
            raise ValueError("At least one example is needed. Received none.")
        text_checks.refuse_bad_texts(x)
        self.example_count = counts.pop()
        self.batch_size = batch_size
        self._preprocess = preprocess
        self.orders = Orders(self.example_count, shuffle)
        self._pass = -1
        self._pass_is_over = True

    def __len__(self):
        return math.ceil(self.example_count / self.batch_size)

    def __getitem__(self, index):
        # Not at the end of Keras' epoch: with `steps_per_epoch` that falls into the middle of a pass.
        if index == 0 and self._pass_is_over:
            self._pass += 1
        self._pass_is_over = index == len(self) - 1
        return self.batch(self._pass, index)

    def batch(self, pass_number, index):
        """The batch at `index` of a pass, whatever was asked for before."""
        rows = self.orders[pass_number][index * self.batch_size : (index + 1) * self.batch_size]
        try:
            return self._preprocess(*(take(part, rows) for part in self._parts))
        except text_checks.ExampleError as error:
            # Its number in the batch says little.
            raise text_checks.ExampleError(int(rows[error.number]), error.problem) from error


class Orders:
    """The order of `count` things in each pass over them: `orders[pass_number]`.

    It follows from one number, `seed`, so that a pass can be drawn again without those before it.
    """

    def __init__(self, count, shuffle, seed=None):
        self._count = count
        # The global generator is the one that `keras.utils.set_random_seed` seeds.
        self.seed = np.random.randint(2**31) if shuffle and seed is None else seed
        self._drawn = None, np.arange(count)

    def __getitem__(self, pass_number):
        drawn, order = self._drawn
        if self.seed is not None and drawn != (self.seed, pass_number):
            order = np.random.default_rng((self.seed, pass_number)).permutation(self._count)
            self._drawn = (self.seed, pass_number), order
        return order


class PreprocessedDataset(keras.utils.PyDataset):
    """A user's `PyDataset` whose batches go through a preprocessing function."""

    def __init__(self, dataset, preprocess):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self.dataset = dataset
        self._preprocess = preprocess

    @property
    def num_batches(self):
        return self.dataset.num_batches

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return _preprocess_batch(self._preprocess, self.dataset[index])

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


class GrainBatches(keras.utils.PyDataset):
    """A finite Grain `MapDataset` of batches. Knowing the length, Keras starts each epoch from its beginning."""

    of_own_share = True

    def __init__(self, dataset, preprocess):
        super().__init__()
        self._dataset = dataset
        self._preprocess = preprocess

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        return _preprocess_batch(self._preprocess, self._dataset[index])


def indexable(part):
    """`x`, `y` or `sample_weight` with its tables as dicts of columns, each of which is indexed by place."""
    if text_checks.is_fields(part):
        # A field that is None is as good as missing, and tf.data carries no None.
        columns = text_checks.fields(part).items()
        return {name: indexable(values) for name, values in columns if values is not None}
    return text_checks.column(part)


def count_examples(part):
    """Number of examples in a list, an array or a column, or in fields of them: a dict or a table."""
    if text_checks.is_fields(part):
        columns = text_checks.fields(part).items()
        counts = {name: _count_listed(value) for name, value in columns if value is not None}
        if len(set(counts.values())) != 1:
            raise ValueError(f"Every field needs as many examples. Received: {counts}")
        return next(iter(counts.values()))
    if isinstance(part, tuple):
        raise ValueError("A tuple could be examples or parts of them; pass a list of examples, or a dict of fields.")
    return _count_listed(part)


def _count_listed(part):
    if text_checks.is_fields(part):
        return count_examples(part)
    if not text_checks.is_list(part):
        raise ValueError(
            "A list or array of examples is expected; wrap a single example in a list. "
            f"Received: {text_checks.shown(part)}"
        )
    if isinstance(part, collections.abc.Sequence) and len(part) and text_checks.is_message(part[0]):
        raise ValueError("A list of dialogues is expected. Received a single dialogue: wrap it in a list.")
    return len(part)


def take(part, rows):
    """The examples at `rows`, in the structure of `part`, which is `indexable`."""
    if part is None:
        return None
    if isinstance(part, dict):
        return {name: take(value, rows) for name, value in part.items() if value is not None}
    if isinstance(part, collections.abc.Sequence):
        return [part[int(row)] for row in rows]
    return np.asarray(part)[np.asarray(rows)]


def _refuse_beside_batches(x, **beside):
    given = [name for name, value in beside.items() if value is not None]
    if given:
        raise ValueError(
            f"A {type(x).__name__} yields whole batches: leave out {', '.join(f'`{name}`' for name in given)}."
        )
