"""What users hand to `fit(pack=True)`, as packed batches."""

import math

import keras
import numpy as np

from keras_gemma.data import batches
from keras_gemma.data import loader
from keras_gemma.data.packing import best_fit
from keras_gemma.data.packing import packed_batch


def packed(x, y, sample_weight, batch_size, preprocessor, shuffle=False):
    """Packs examples into rows of the preprocessor's `sequence_length`.

    Args:
        x: examples as a list, an array, or a dict of these; or a Grain `MapDataset` or `IterDataset` of single
            examples (see `training_batches`).
        y: must be `None`.
        sample_weight: optional weight of each example, for lists and arrays only.
        batch_size: int, packed rows of a batch. 32 if `None`.
        preprocessor: a `GemmaCausalLMPreprocessor`.
        shuffle: bool, for lists and arrays only. Packs the examples in a new order each epoch.

    Returns:
        Batches in a form that `keras.Model.fit` takes.

    Raises:
        ValueError: without a preprocessor, for labels, and for what yields batches.
    """
    if preprocessor is None:
        raise ValueError(
            "`pack=True` packs what a preprocessor has tokenised. Received a model with preprocessor=None."
        )
    if y is not None:
        raise ValueError("Labels are the next tokens of `x`, so `y` must be None. Received labels.")
    batch_size = batch_size or batches.DEFAULT_BATCH_SIZE
    if not batches.yields_batches(x):
        return _packed_in_memory(x, sample_weight, batch_size, preprocessor, shuffle)
    if not loader.is_grain_dataset(x):
        raise ValueError(
            "`pack=True` packs examples, not batches: pass a list or an array of strings, {'prompts': [...], "
            "'responses': [...]}, a list of dialogues, or a Grain MapDataset or IterDataset of single examples. "
            f"Received: {type(x).__name__}"
        )
    if sample_weight is not None:
        raise ValueError("`sample_weight` weighs listed examples. Received it beside a Grain data set.")
    return loader.training_batches(x, preprocessor, batch_size)


def _packed_in_memory(x, sample_weight, batch_size, preprocessor, shuffle):
    count = batches.count_examples(x)
    if count == 0:
        raise ValueError("At least one example is needed. Received none.")
    if sample_weight is not None and batches.count_examples(sample_weight) != count:
        raise ValueError(
            "`x` and `sample_weight` need as many examples each. "
            f"Received: {[count, batches.count_examples(sample_weight)]}"
        )
    # What `take` gives has lost fields that are None, as batches have.
    examples = preprocessor.unpadded(batches.take(x, range(count)), sample_weight)
    return PackedExamples(examples, preprocessor.sequence_length, batch_size, shuffle)


class PackedExamples(keras.utils.PyDataset):
    """Packed batches of examples that lie in memory."""

    def __init__(self, examples, row_length, batch_size, shuffle):
        super().__init__()
        self._examples = [example for example in examples if len(example["token_ids"])]
        if not self._examples:
            raise ValueError("Every example is a single token, which leaves nothing to predict.")
        self._row_length = row_length
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._rows = self._packed_rows()
        self._pass_is_over = False

    def __len__(self):
        # Best fit depends on the lengths alone, so that every order makes as many rows.
        return math.ceil(len(self._rows) / self._batch_size)

    def __getitem__(self, index):
        # Not at the end of Keras' epoch: with `steps_per_epoch` that falls into the middle of a pass.
        if index == 0 and self._pass_is_over and self._shuffle:
            self._rows = self._packed_rows()
        self._pass_is_over = index == len(self) - 1
        rows = self._rows[index * self._batch_size : (index + 1) * self._batch_size]
        return packed_batch([[self._examples[i] for i in row] for row in rows], self._row_length)

    def _packed_rows(self):
        # The global generator is the one that `keras.utils.set_random_seed` seeds.
        count = len(self._examples)
        order = np.random.permutation(count) if self._shuffle else np.arange(count)
        lengths = np.array([len(self._examples[i]["token_ids"]) for i in order])
        rows = [order[row].tolist() for row in best_fit(lengths, self._row_length)]
        # Best fit puts long examples into the first rows and short ones into the last.
        if self._shuffle:
            np.random.shuffle(rows)
        else:
            rows.sort(key=min)
        return rows
