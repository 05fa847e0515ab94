"""Prompts and responses → rows of token ids that are scored and learned from.

N responses, R rows of a microbatch, M microbatches, C tokens of a response. Rows lie in one of two ways: each on its
own in T columns, or, where that is fewer columns, n of them behind a prompt that stands once: G groups of P + n (C - 1)
columns, `R = G n`.
"""

import math

import numpy as np
from keras import ops

from keras_gemma import kernels
from keras_gemma.generation.buckets import bucket

SMALLEST_ROW = 32
SMALLEST_PROMPT = 16
# Widths of an octave. Steps are long, and those of one run are about as wide.
WIDTHS = 8


def microbatches(prompts, responses, rows, continuations=1):
    """Responses behind their prompts as arrays for training, about `rows` at a time.

    Args:
        prompts: list of `N` lists of token ids.
        responses: list of `N` lists of token ids.
        rows: int; `R` is the next number that the devices sharing a batch divide.
        continuations: int, how many responses beside each other have the same prompt; divides `N`. Those of a
            microbatch may share it (see `kernels.takes_continuations`).

    Returns:
        A dict of arrays. What a model reads: int32 `token_ids` and `padding_mask` `[M, R, T]` and `columns`
        `[M, R, C]`, which predict the tokens of responses; or `token_ids`, `padding_mask` and `positions`
        `[M, G, P + n (C - 1)]`. Of the tokens of responses, `[M, R, C]`, int32 `targets` and float32 `mask`, 1 where a
        token is; and `row_weights` `[M, R]`, which sum up to 1. Rows that fill the last microbatch up have no weight.
    """
    rows += -rows % kernels.shards_of_batch()
    count = -(-len(prompts) // rows) * rows
    # The last token predicts none.
    width = bucket(max(len(p) + len(r) for p, r in zip(prompts, responses)) - 1, SMALLEST_ROW, WIDTHS)
    longest = min(bucket(max(map(len, responses)), parts=WIDTHS), width)
    arrays = _of_responses(responses, count, longest)
    sharing = math.gcd(continuations, rows) if kernels.takes_continuations() else 1
    prompt_columns = bucket(max(map(len, prompts)), SMALLEST_PROMPT, WIDTHS)
    if sharing > 1 and prompt_columns + sharing * (longest - 1) < sharing * width:
        arrays |= _behind_one_prompt(prompts, responses, count, prompt_columns, longest - 1, sharing)
    else:
        arrays |= _each_on_its_own(prompts, responses, count, width, longest)
    return {name: array.reshape(count // rows, -1, *array.shape[1:]) for name, array in arrays.items()}


def _of_responses(responses, count, longest):
    targets, mask = np.zeros((count, longest), "int32"), np.zeros((count, longest), "float32")
    for i, response in enumerate(responses):
        targets[i, : len(response)] = response
        mask[i, : len(response)] = 1
    weights = np.zeros(count, "float32")
    weights[: len(responses)] = 1 / len(responses)
    return {"targets": targets, "mask": mask, "row_weights": weights}


def _each_on_its_own(prompts, responses, count, width, longest):
    ids, padding = np.zeros((2, count, width), "int32")
    columns = np.zeros((count, longest), "int32")
    # Rows without a token would attend to nothing.
    padding[:, 0] = 1
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        seen = (prompt + response)[:-1]
        ids[i, : len(seen)] = seen
        padding[i, : len(seen)] = 1
        columns[i, : len(response)] = np.arange(len(prompt) - 1, len(seen))
    return {"token_ids": ids, "padding_mask": padding, "columns": columns}


def _behind_one_prompt(prompts, responses, count, prompt_columns, columns, sharing):
    """Prompts end where continuations begin; these are as many columns each."""
    ids, padding, positions = np.zeros((3, count // sharing, prompt_columns + sharing * columns), "int32")
    padding[:, prompt_columns - 1] = 1
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        group, place = divmod(i, sharing)
        behind = prompt_columns + place * columns
        for first, seen, position in ((prompt_columns - len(prompt), prompt, 0), (behind, response[:-1], len(prompt))):
            ids[group, first : first + len(seen)] = seen
            padding[group, first : first + len(seen)] = 1
            positions[group, first : first + len(seen)] = np.arange(position, position + len(seen))
    return {"token_ids": ids, "padding_mask": padding, "positions": positions}


def predicting_states(backbone, microbatch, training):
    """Hidden states `[R, C, D]` of a backbone that predict the tokens of responses.

    Args:
        backbone: a `GemmaBackbone`.
        microbatch: a dict of tensors as `microbatches` gives them, without `M`.
        training: bool.
    """
    inputs = {name: microbatch[name] for name in ("token_ids", "padding_mask", "positions") if name in microbatch}
    if "columns" in microbatch:
        hidden = backbone(inputs, training=training)
        return ops.take_along_axis(hidden, microbatch["columns"][..., None], axis=1)
    rows, longest = microbatch["targets"].shape
    groups, columns = microbatch["token_ids"].shape
    continuations = rows // groups
    prompt_columns = columns - continuations * (longest - 1)
    with kernels.continued_prompts(prompt_columns, continuations) as continued:
        return continued.in_rows(backbone(inputs, training=training))[:, prompt_columns - 1 :]


def in_rows(values, batch):
    """A value for each response, float32 `[M, R]`; 0 for the rows that fill the last microbatch up."""
    padded = np.zeros(batch["row_weights"].size, "float32")
    padded[: len(values)] = values
    return padded.reshape(batch["row_weights"].shape)


def of_responses(values, count):
    """The first `count` of values `[M, R]`, a NumPy array `[N]`: undoes `in_rows`."""
    return np.asarray(values).reshape(-1)[:count]
