"""What users hand to `fit(pack=True)`, as packed batches."""

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
        shuffle: bool, for lists and arrays only. Draws a new order of the packed rows each epoch.

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
    if not batches.is_grain_dataset(x):
        raise ValueError(
            "`pack=True` packs examples, not batches: pass a list or an array of strings, {'prompts': [...], "
            "'responses': [...]}, a list of dialogues, or a Grain MapDataset or IterDataset of single examples. "
            f"Received: {type(x).__name__}"
        )
    if sample_weight is not None:
        raise ValueError("`sample_weight` weighs listed examples. Received it beside a Grain data set.")
    return loader.training_batches(x, preprocessor, batch_size)


def _packed_in_memory(x, sample_weight, batch_size, preprocessor, shuffle):
    x, sample_weight = batches.indexable(x), batches.indexable(sample_weight)
    count = batches.count_examples(x)
    if count == 0:
        raise ValueError("At least one example is needed. Received none.")
    if sample_weight is not None and batches.count_examples(sample_weight) != count:
        raise ValueError(
            "`x` and `sample_weight` need as many examples each. "
            f"Received: {[count, batches.count_examples(sample_weight)]}"
        )
    examples = preprocessor.unpadded(x, sample_weight)
    row_length = preprocessor.sequence_length
    rows = _rows_of(examples, row_length, shuffle)
    return batches.ExampleBatches(
        rows, None, None, batch_size, lambda rows, y, weights: packed_batch(rows, row_length), shuffle
    )


def _rows_of(examples, row_length, shuffle):
    # Neighbours in the list are apart in the rows. The same rows in each process: a run may go on in another one.
    order = np.random.default_rng(0).permutation(len(examples)) if shuffle else np.arange(len(examples))
    rows = [order[row].tolist() for row in best_fit([len(examples[i]["token_ids"]) for i in order], row_length)]
    if not rows:
        raise ValueError("Every example is a single token, which leaves nothing to predict.")
    # Best fit puts the longest examples into the first rows.
    return [[examples[i] for i in row] for row in sorted(rows, key=min)]
