"""Examples → packed rows: several examples in one row, none of which sees or trains another.

An example is what the preprocessor's `unpadded` makes of it: `token_ids`, `targets` and `weights`, each `[n]`.

examples in memory ── best fit, the longest first ──┐
stream of examples ── best fit within a window ─────┴→ rows → batches

B rows, T columns of a row.
"""

import bisect
import collections

import numpy as np

from keras_gemma.data.extras import required

EXAMPLE_FIELDS = ("token_ids", "targets", "weights")
DEFAULT_WINDOW = 64


def best_fit(lengths, row_length):
    """Sorts examples into rows: the longest first, each into the row that it fills best (best-fit decreasing).

    Args:
        lengths: int array `[n]`, tokens of each example. Empty examples go nowhere.
        row_length: int, `T`. Tokens that a row holds.

    Returns:
        A list of rows, each a list of indices into `lengths`. Among examples of equal length the earlier goes first.

    Raises:
        ValueError: for an example that is longer than a row.

    Example:

    >>> best_fit([3, 6, 0, 2, 4], row_length=8)
    [[1, 3], [4, 0]]
    """
    lengths = np.asarray(lengths)
    refuse_longer_than(row_length, lengths)
    rows = []
    rows_with_room = collections.defaultdict(list)
    rooms = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if length == 0:
            break
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room, row = row_length, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[place]
        rows[row].append(index)
        left = room - length
        if not rows_with_room[left]:
            bisect.insort(rooms, left)
        rows_with_room[left].append(row)
    return rows


def packed_batch(rows, row_length):
    """Lays rows of examples out as one batch.

    Args:
        rows: `B` lists of examples.
        row_length: int, `T`.

    Returns:
        `(x, y, sample_weight)`: `x` with int32 `token_ids`, `padding_mask`, `segment_ids` (from 1 in each row, 0 is
        padding) and `positions` (from 0 in each segment), each `[B, T]`; int32 `y` `[B, T]`; float32 weights `[B, T]`.
    """
    shape = len(rows), row_length
    fields = {name: np.zeros(shape, "int32") for name in ("token_ids", "targets", "segment_ids", "positions")}
    fields["weights"] = np.zeros(shape, "float32")
    for i, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            place = i, slice(start, start + len(example["token_ids"]))
            for name in EXAMPLE_FIELDS:
                fields[name][place] = example[name]
            fields["segment_ids"][place] = segment
            fields["positions"][place] = np.arange(len(example["token_ids"]))
            start = place[1].stop
    return _as_batch(fields)


def packed_stream(examples, row_length, batch_size, window=DEFAULT_WINDOW, seed=0, drop_remainder=False):
    """Packs a Grain stream of examples into batches.

    `window` rows are filled side by side, each example going into the row that it fills best. When one fits nowhere,
    they are handed out in a random order.

    Args:
        examples: a `grain.IterDataset` of examples.
        row_length: int, `T`.
        batch_size: int, `B`. Packed rows of a batch.
        window: int. The larger, the fuller the rows; they take `36 · T · window` bytes.
        seed: int, of the order of the rows in a window.
        drop_remainder: bool. Leaves a last, smaller batch out.

    Returns:
        A `grain.IterDataset` of batches as `packed_batch` gives them. The state of its iterator resumes exactly.
    """
    pack = required("grain").experimental.BestFitPackIterDataset
    rows = pack(
        examples.filter(lambda example: len(example["token_ids"]) > 0),
        length_struct=dict.fromkeys(EXAMPLE_FIELDS, row_length),
        num_packing_bins=window,
        seed=seed,
        # Grain would number the segments of every field.
        meta_features=EXAMPLE_FIELDS[1:],
    )
    return rows.batch(batch_size, drop_remainder=drop_remainder).map(_of_grain)


def padded_stream(examples, row_length, batch_size, drop_remainder=False):
    """As `packed_stream` with a row for each example."""
    return examples.batch(batch_size, drop_remainder=drop_remainder, batch_fn=lambda batch: batch).map(
        lambda batch: packed_batch([[example] for example in batch], row_length)
    )


def _of_grain(fields):
    segment_ids, positions = fields["token_ids_segment_ids"], fields["token_ids_positions"]
    return _as_batch({**fields, "segment_ids": segment_ids, "positions": positions})


def _as_batch(fields):
    x = {
        "token_ids": fields["token_ids"],
        "padding_mask": (fields["segment_ids"] > 0).astype("int32"),
        "segment_ids": fields["segment_ids"],
        "positions": fields["positions"],
    }
    return x, fields["targets"], fields["weights"]


def refuse_longer_than(row_length, lengths):
    """Raises a `ValueError` where one of `lengths` (int array `[n]`, tokens) does not fit into a row."""
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(
            f"An example must fit into a row of {row_length} tokens. Received one of {lengths.max()}: "
            "tokenise with a `sequence_length` no longer than the row."
        )
