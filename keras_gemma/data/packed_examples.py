"""Listed examples as batches of rows: packed, as `fit(pack=True)` takes them, or a row for each.

A text that is longer than a row has several rows in both.
"""

import collections.abc

import numpy as np

from keras_gemma.data import batches
from keras_gemma.data import loader
from keras_gemma.data.long_texts import Cuts
from keras_gemma.data.long_texts import check_choice
from keras_gemma.data.packing import best_fit
from keras_gemma.data.packing import packed_batch

TOKENS_OF_A_TURN = 32


def packed(x, y, sample_weight, batch_size, preprocessor, shuffle=False, long_texts="split"):
    """Packs examples into rows of the preprocessor's `sequence_length`.

    Args:
        x: examples as a list, an array, or a dict of these; or a Grain `MapDataset` or `IterDataset` of single
            examples (see `training_batches`).
        y: must be `None`.
        sample_weight: optional weight of each example, for lists and arrays only.
        batch_size: int, packed rows of a batch. 32 if `None`.
        preprocessor: a `GemmaCausalLMPreprocessor`.
        shuffle: bool, for lists and arrays only. Draws a new order of the packed rows each epoch.
        long_texts: string, as of `GemmaCausalLM.fit`.

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
        return _packed_in_memory(x, sample_weight, batch_size, preprocessor, shuffle, long_texts)
    if not batches.is_grain_dataset(x):
        raise ValueError(
            "`pack=True` packs examples, not batches: pass a list or an array of strings, {'prompts': [...], "
            "'responses': [...]}, a list of dialogues, or a Grain MapDataset or IterDataset of single examples. "
            f"Received: {type(x).__name__}"
        )
    if sample_weight is not None:
        raise ValueError("`sample_weight` weighs listed examples. Received it beside a Grain data set.")
    return loader.training_batches(x, preprocessor, batch_size, long_texts=long_texts)


def _packed_in_memory(x, sample_weight, batch_size, preprocessor, shuffle, long_texts):
    x, sample_weight = batches.indexable(x), batches.indexable(sample_weight)
    count = batches.count_examples(x)
    if count == 0:
        raise ValueError("At least one example is needed. Received none.")
    if sample_weight is not None and batches.count_examples(sample_weight) != count:
        raise ValueError(
            "`x` and `sample_weight` need as many examples each. "
            f"Received: {[count, batches.count_examples(sample_weight)]}"
        )
    examples = preprocessor.unpadded(x, sample_weight, long_texts=long_texts)
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


def padded(x, y, sample_weight, batch_size, preprocessor, preprocess, shuffle=False, long_texts="split"):
    """Listed examples as batches with a row for each, or several for a text that is longer than a row.

    Args:
        x, y, sample_weight: examples, as of `preprocessed`.
        batch_size: int, rows of a batch. 32 if `None`.
        preprocessor: a `GemmaCausalLMPreprocessor`.
        preprocess: callable from one batch of examples to `(x, y, sample_weight)`, for examples that all fit.
        shuffle: bool. Draws a new order of the rows each epoch.
        long_texts: string, as of `GemmaCausalLM.fit`.

    Returns:
        `batches.ExampleBatches`. Where a text has several rows, all are tokenised at once, to know how many.

    Raises:
        ValueError: as `preprocessed`, for an unknown `long_texts`, and for what it refuses.
    """
    check_choice(long_texts)
    batch_size = batch_size or batches.DEFAULT_BATCH_SIZE
    x, y, sample_weight = (batches.indexable(part) for part in (x, y, sample_weight))
    as_they_are = batches.ExampleBatches(x, y, sample_weight, batch_size, preprocess, shuffle)
    if y is not None or not _may_be_longer(x, preprocessor.sequence_length):
        return as_they_are
    cuts = Cuts()
    rows = preprocessor.rows(x, long_texts=long_texts, cuts=cuts)
    if not cuts.split and not cuts.truncated:
        return as_they_are
    cuts.tell(preprocessor.sequence_length)
    weights = None if sample_weight is None else preprocessor.weights_of_rows(rows, sample_weight)
    # As arrays: lists of numbers take ten times the memory.
    compact = [type(row)(np.array(row.ids, "int32"), np.array(row.learned)) for _, row in rows]
    return batches.ExampleBatches(
        compact, None, weights, batch_size, lambda rows, y, weights: preprocessor.batch_of_rows(rows, weights), shuffle
    )


def _may_be_longer(x, row_length):
    """Whether an example may have more tokens than a row. None has more than bytes, `<bos>` and `<eos>` included."""
    columns, marks = (list(x.values()), 2 * TOKENS_OF_A_TURN) if isinstance(x, dict) else ([x], 0)
    return any(sum(map(_most_tokens, example)) + marks > row_length - 1 for example in zip(*columns))


def _most_tokens(value):
    if isinstance(value, (str, bytes)):
        return len(value if isinstance(value, bytes) or value.isascii() else value.encode("utf-8", "replace"))
    if isinstance(value, collections.abc.Mapping):
        # The marks of a message's turn are fewer.
        return sum(map(_most_tokens, value.values())) + TOKENS_OF_A_TURN
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return sum(map(_most_tokens, value))
    return 0
