"""Prompts and responses → rows of token ids that are scored and learned from.

N responses, R rows of a microbatch, M microbatches, T columns.
"""

import numpy as np

from keras_gemma import kernels
from keras_gemma.generation.buckets import bucket

SMALLEST_ROW = 32


def microbatches(prompts, responses, rows):
    """Responses behind their prompts as arrays for training, about `rows` at a time.

    Args:
        prompts: list of `N` lists of token ids.
        responses: list of `N` lists of token ids.
        rows: int; `R` is the next number that the devices sharing a batch divide.

    Returns:
        A dict of arrays `[M, R, T]`: int32 `token_ids` and `padding_mask`, int32 `targets`, the next tokens, and
        float32 `mask`, 1 where the target is a token of the response; and `row_weights` `[M, R]`, which sum up to 1.
        Rows that fill the last microbatch up have no weight.
    """
    rows += -rows % kernels.shards_of_batch()
    length = bucket(max(len(p) + len(r) for p, r in zip(prompts, responses)), SMALLEST_ROW)
    count = -(-len(prompts) // rows) * rows
    ids, mask, weights = np.zeros((count, length + 1), "int32"), np.zeros((count, length + 1)), np.zeros(count)
    padding = np.zeros((count, length + 1), "int32")
    # Rows without a token would attend to nothing.
    padding[:, 0] = 1
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        end = len(prompt) + len(response)
        ids[i, :end] = prompt + response
        padding[i, :end] = 1
        mask[i, len(prompt) : end] = 1
    weights[: len(prompts)] = 1 / len(prompts)
    arrays = {
        "token_ids": ids[:, :-1],
        "padding_mask": padding[:, :-1],
        "targets": ids[:, 1:],
        "mask": mask[:, 1:].astype("float32"),
        "row_weights": weights.astype("float32"),
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
