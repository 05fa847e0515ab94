"""Prompts and responses → rows of token ids that are scored and learned from.

N responses, R rows of a microbatch, M microbatches, T columns, C tokens of a response.
"""

import numpy as np

from keras_gemma import kernels
from keras_gemma.generation.buckets import bucket

SMALLEST_ROW = 32
# Widths of an octave. Steps are long, and those of one run are about as wide.
WIDTHS = 8


def microbatches(prompts, responses, rows):
    """Responses behind their prompts as arrays for training, about `rows` at a time.

    Args:
        prompts: list of `N` lists of token ids.
        responses: list of `N` lists of token ids.
        rows: int; `R` is the next number that the devices sharing a batch divide.

    Returns:
        A dict of arrays: int32 `token_ids` and `padding_mask` `[M, R, T]`; of the tokens of responses, `[M, R, C]`,
        int32 `targets`, int32 `columns`, which predict them, and float32 `mask`, 1 where a token is; and `row_weights`
        `[M, R]`, which sum up to 1. Rows that fill the last microbatch up have no weight.
    """
    rows += -rows % kernels.shards_of_batch()
    count = -(-len(prompts) // rows) * rows
    # The last token predicts none.
    width = bucket(max(len(p) + len(r) for p, r in zip(prompts, responses)) - 1, SMALLEST_ROW, WIDTHS)
    longest = min(bucket(max(map(len, responses)), parts=WIDTHS), width)
    ids, padding = np.zeros((2, count, width), "int32")
    targets, columns = np.zeros((2, count, longest), "int32")
    mask, weights = np.zeros((count, longest), "float32"), np.zeros(count, "float32")
    # Rows without a token would attend to nothing.
    padding[:, 0] = 1
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        seen = (prompt + response)[:-1]
        ids[i, : len(seen)] = seen
        padding[i, : len(seen)] = 1
        targets[i, : len(response)] = response
        columns[i, : len(response)] = np.arange(len(prompt) - 1, len(seen))
        mask[i, : len(response)] = 1
    weights[: len(prompts)] = 1 / len(prompts)
    arrays = {
        "token_ids": ids,
        "padding_mask": padding,
        "targets": targets,
        "columns": columns,
        "mask": mask,
        "row_weights": weights,
    }
    return {name: array.reshape(-1, rows, *array.shape[1:]) for name, array in arrays.items()}


def in_rows(values, batch):
    """A value for each response, float32 `[M, R]`; 0 for the rows that fill the last microbatch up."""
    padded = np.zeros(batch["row_weights"].size, "float32")
    padded[: len(values)] = values
    return padded.reshape(batch["row_weights"].shape)


def of_responses(values, count):
    """The first `count` of values `[M, R]`, a NumPy array `[N]`: undoes `in_rows`."""
    return np.asarray(values).reshape(-1)[:count]
