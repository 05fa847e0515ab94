"""Examples → token ids → packed rows → batches: what `fit` reads during a long training.

                     ┌ on the fly ────────────────────────────┐
mixture of examples ─┤                                        ├→ token ids → rows → batches
                     └ tokenize_ahead → file → from_tokens ───┘
"""

import sys

import numpy as np

from keras_gemma.data import packing
from keras_gemma.data import record_formats
from keras_gemma.data import sources
from keras_gemma.data import text_checks
from keras_gemma.data.extras import required
from keras_gemma.data.long_texts import Cuts
from keras_gemma.data.long_texts import check_choice
from keras_gemma.data.sources import array_record_files
from keras_gemma.data.sources import records_of
from keras_gemma.data.sources import write_records

READABLE_FIELDS = ({"text"}, {"prompts", "responses"}, {"messages"})


def training_batches(
    examples,
    preprocessor,
    batch_size,
    *,
    pack=True,
    sequence_length=None,
    window=packing.DEFAULT_WINDOW,
    seed=0,
    drop_remainder=False,
    read_options=None,
    long_texts="split",
):
    """Batches to train on from single examples, for `fit`.

    Reading and tokenising run in threads. The iterator's `get_state()` is a small dict of plain numbers, from which
    `set_state()` goes on with exactly the batches that would have followed. Hosts pack different examples into
    different numbers of rows: with several of them, give `fit` its `steps_per_epoch`.

    Args:
        examples: a Grain `MapDataset` or `IterDataset` of single examples: strings; dicts with `text`, with `prompts`
            and `responses`, or with `messages` (further fields are left aside); dialogues; or tokens of `from_tokens`.
        preprocessor: a `GemmaCausalLMPreprocessor`.
        batch_size: int, `B`. Rows of a batch.
        pack: bool. `False` gives every example a row of its own.
        sequence_length: optional int, `T`, in place of the preprocessor's.
        window: int. Rows that are filled side by side: the more, the fuller they get.
        seed: int, of the order of packed rows within a window.
        drop_remainder: bool. Leaves a last, smaller batch out.
        read_options: optional `grain.ReadOptions`, the threads that read and tokenise a `MapDataset`. 16 threads that
            are at most 64 examples ahead by default.
        long_texts: string, what becomes of a text that is longer than a row. `"split"` makes several rows of it, each
            with a `<bos>`, which learn all of its tokens once (see `keras_gemma.data.long_texts`); `"truncate"` drops
            what goes beyond the first; `"refuse"` raises, for prompts with responses and dialogues as well, whose end
            is dropped otherwise. The first time that something is cut, a warning says so.

    Returns:
        A `grain.IterDataset` of `(x, y, sample_weight)` as `packing.packed_batch` gives them.

    Raises:
        ValueError: for an unknown `long_texts`; and when it is read, for batches in place of examples, fields that are
            no example, texts that are none, and what `long_texts` refuses, with file and row of an example of a file.
        ImportError: without the extra `train`.
    """
    grain = required("grain")
    length = sequence_length or preprocessor.sequence_length
    check_choice(long_texts)
    cuts = Cuts()
    tokens = examples.map(lambda example: tokens_of(example, preprocessor, length, long_texts, cuts))
    if isinstance(tokens, grain.MapDataset):
        # Grain's own 500 examples ahead cost it a millisecond an example, counting which are ready.
        tokens = tokens.to_iter_dataset(read_options or grain.ReadOptions(num_threads=16, prefetch_buffer_size=64))
    tokens = grain.experimental.FlatMapIterDataset(tokens, Flattened())
    if pack:
        return packing.packed_stream(tokens, length, batch_size, window, seed, drop_remainder)
    return packing.padded_stream(tokens, length, batch_size, drop_remainder)


class Flattened:
    """Lists of rows as rows, for Grain."""

    def flat_map(self, rows):
        return rows


def tokens_of(example, preprocessor, sequence_length, long_texts, cuts):
    """`token_ids`, `targets` and `weights` of the rows of one example, each `[n]`; see `training_batches`."""
    if isinstance(example, dict) and set(example) == set(packing.EXAMPLE_FIELDS):
        return _rows_of_tokens(example, preprocessor, sequence_length, long_texts, cuts)
    try:
        rows = preprocessor.unpadded([_readable(text_checks.plain(example))], None, sequence_length, long_texts, cuts)
        cuts.tell(sequence_length, so_far=True)
        return rows
    except ValueError as error:
        origin = sources.origin_of(example)
        problem = error.problem if isinstance(error, text_checks.ExampleError) else str(error)
        raise ValueError(f"{origin}: {problem}" if origin else problem) from error


def _rows_of_tokens(example, preprocessor, sequence_length, long_texts, cuts):
    """What `tokenize_ahead` wrote, as rows: a text is there whole."""
    count = len(example["token_ids"])
    cuts.examples += 1
    if count <= sequence_length:
        return [example]
    # Of everything else a part is not learned.
    if long_texts == "refuse" or not (example["weights"] == 1).all():
        packing.refuse_longer_than(sequence_length, np.array([count]))
    if long_texts == "truncate":
        cuts.add_truncated(count + 1, sequence_length + 1)
        rows = [{name: values[:sequence_length] for name, values in example.items()}]
    else:
        rows = preprocessor.unpadded_parts(example, sequence_length)
        cuts.add_split(count + 1, len(rows))
    cuts.tell(sequence_length, so_far=True)
    return rows


def _readable(example):
    if _is_batch(example):
        raise ValueError(
            "Single examples are expected, not batches: leave `.batch(...)` out, `batch_size` then counts rows. "
            f"Received: {text_checks.shown(example)}"
        )
    if not isinstance(example, dict):
        return example
    example = record_formats.tuning_fields(example)
    # Tables have a null where a row goes without a field of others.
    present = {name for name, value in example.items() if not text_checks.is_missing(value)}
    for names in (present, set(example)):
        readable = [fields for fields in READABLE_FIELDS if fields <= names]
        if readable:
            break
    if len(readable) != 1:
        raise ValueError(
            "An example has either 'text', or 'prompts' and 'responses', or 'messages'; the `fields` of a source "
            f"rename others. Received: {', '.join(map(repr, example))}"
        )
    picked = {name: example[name] for name in readable[0]}
    return picked.get("text", picked)


def _is_batch(example):
    if isinstance(example, dict):
        return any(_is_batch(example[name]) for name in ("text", "prompts", "responses") if name in example)
    return isinstance(example, list) and not (example and text_checks.is_message(example[0]))


def tokenize_ahead(examples, preprocessor, path, sequence_length=None, long_texts="split"):
    """Writes the token ids of a source to an ArrayRecord file, so that training need not tokenise.

    A record is one example of `n + 1` tokens: its ids as little-endian int32, then `n` weights as little-endian
    float32. The file appears under its name when it is complete.

    Args:
        examples: a finite `grain.MapDataset` as of `training_batches`.
        preprocessor: a `GemmaCausalLMPreprocessor`.
        path: path of the file to write.
        sequence_length: optional int in place of the preprocessor's.
        long_texts: string, as of `training_batches`. `"split"` writes a text whole, and `training_batches` makes rows
            of it; `"truncate"` writes what fits into a row.

    Raises:
        ValueError: for a data set without end, and as `training_batches`.
    """
    check_choice(long_texts)
    if len(examples) >= sys.maxsize:
        raise ValueError("`tokenize_ahead` writes finite data sets. Received one that repeats without end.")
    length = sequence_length or preprocessor.sequence_length
    cuts = Cuts()

    def written(example):
        is_whole_text = long_texts == "split" and isinstance(_readable(text_checks.plain(example)), (str, bytes))
        return tokens_of(example, preprocessor, sys.maxsize if is_whole_text else length, long_texts, cuts)

    write_records(path, (_as_record(row) for rows in examples.map(written) for row in rows))


def from_tokens(paths):
    """What `tokenize_ahead` wrote, as a source.

    Args:
        paths: path or glob, or a list of these.

    Returns:
        A `grain.MapDataset` of dicts of `token_ids`, `targets` and `weights`, for `mixture` and `training_batches`.

    Raises:
        FileNotFoundError: for a path that matches no file.
        ValueError: for a file that is empty or no ArrayRecord, naming it.
    """
    return records_of(array_record_files(paths), _of_record)


def _as_record(example):
    ids = np.concatenate([example["token_ids"], example["targets"][-1:]])
    return ids.astype("<i4").tobytes() + example["weights"].astype("<f4").tobytes()


def _of_record(record):
    words, rest = divmod(len(record), 4)
    count = (words + 1) // 2
    if rest or (words and words % 2 == 0):
        raise ValueError(f"not an example of `tokenize_ahead`: {len(record)} bytes")
    ids = np.frombuffer(record, "<i4", count).astype("int32")
    weights = np.frombuffer(record, "<f4", offset=4 * count).astype("float32")
    return {"token_ids": ids[:-1], "targets": ids[1:], "weights": weights}
