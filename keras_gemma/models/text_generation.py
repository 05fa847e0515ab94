"""Between what users pass to `generate` and `stream`, and the token ids that `keras_gemma.generation` knows."""

import numbers

import keras
import numpy as np

from keras_gemma import data
from keras_gemma.data import text_checks
from keras_gemma.models.causal_lm_preprocessor import check_room
from keras_gemma.models.causal_lm_preprocessor import examples_of
from keras_gemma.models.stop_strings import StopStrings

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has up to four bytes, so the last three may still wait for another.
MOST_BYTES_WAITING = 3


def is_token_batch(inputs):
    return isinstance(inputs, dict) and "token_ids" in inputs


def is_data_set(inputs):
    """Whether `inputs` yields one batch after another."""
    return data.yields_batches(inputs)


def batches_of(data_set):
    """The batches of a data set as NumPy arrays or Python values."""
    as_numpy = getattr(data_set, "as_numpy_iterator", None)
    if as_numpy is not None:
        return as_numpy()
    if isinstance(data_set, keras.utils.PyDataset):
        return (data_set[i] for i in range(data_set.num_batches))
    return iter(data_set)


def vocabulary_size_of(preprocessor):
    """How many ids stand for a token, or `None` where nothing says so."""
    return None if preprocessor is None else preprocessor.tokenizer.vocabulary_size()


def prompts_of_text(preprocessor, inputs, allow_special_tokens=None):
    """The ids of every prompt, and whether `inputs` was a batch. `None` leaves special tokens to the preprocessor."""
    if preprocessor is None:
        raise ValueError(
            "A model without a preprocessor generates from {'token_ids': ..., 'padding_mask': ...}. "
            f"Received: {text_checks.shown(inputs)}"
        )
    examples, batched = examples_of(inputs)
    asked = {} if allow_special_tokens is None else {"allow_special_tokens": allow_special_tokens}
    if not batched:
        return [preprocessor.prompt_ids(examples[0], **asked)], False
    return text_checks.each(lambda example: preprocessor.prompt_ids(example, **asked), examples), True


def prompts_of_tokens(inputs, vocabulary_size):
    """The ids of every row of `{"token_ids", "padding_mask"}`, and the width `T` of the rows.

    Raises:
        ValueError: for anything but two equal shapes `[B, T]`, ids outside the vocabulary, and rows that are not padded
            on the right.
    """
    if set(inputs) != {"token_ids", "padding_mask"}:
        raise ValueError(
            f"Token ids come as 'token_ids' and 'padding_mask'. Received: {', '.join(map(repr, sorted(inputs)))}"
        )
    token_ids = _to_numpy(inputs["token_ids"])
    mask = _to_numpy(inputs["padding_mask"]).astype(bool)
    if token_ids.ndim != 2 or token_ids.shape != mask.shape:
        raise ValueError(
            "'token_ids' and 'padding_mask' are both of shape [batch, length]. "
            f"Received: {token_ids.shape} and {mask.shape}"
        )
    data.refuse_ids_outside(token_ids, vocabulary_size, "token_ids")
    lengths = mask.sum(axis=1)
    if not np.array_equal(mask, np.arange(mask.shape[1])[None, :] < lengths[:, None]):
        raise ValueError("Prompts must be padded on the right. Received a `padding_mask` with a gap.")
    return [row[:length].tolist() for row, length in zip(token_ids, lengths)], mask.shape[1]


def token_rows(rows, width):
    """`{"token_ids", "padding_mask"}` of rows of ids, as NumPy arrays `[B, T]` of at least `width`."""
    width = max(width, *map(len, rows))
    mask = np.arange(width)[None, :] < np.array([len(row) for row in rows])[:, None]
    token_ids = np.zeros(mask.shape, "int32")
    token_ids[mask] = np.concatenate(rows)
    return {"token_ids": token_ids, "padding_mask": mask}


def is_batch(inputs):
    """Whether an element of a data set is a batch of prompts, and no single one."""
    return is_token_batch(inputs) or examples_of(inputs)[1]


def joined(outputs):
    """The outputs of several batches, or of single prompts, as those of one batch.

    Args:
        outputs: list of pairs of what `generate` returned, and whether it was for a batch.
    """
    if not outputs:
        raise ValueError("A data set needs at least one batch. Received an empty one.")
    if not isinstance(outputs[0][0], dict):
        return [text for output, batched in outputs for text in (output if batched else [output])]
    batches = [output for output, _ in outputs]
    rows = [row[mask] for batch in batches for row, mask in zip(batch["token_ids"], batch["padding_mask"])]
    together = token_rows(rows, max(batch["token_ids"].shape[1] for batch in batches))
    if "log_probs" in batches[0]:
        width = together["token_ids"].shape[1]
        widened = [np.pad(b["log_probs"], ((0, 0), (0, width - b["log_probs"].shape[1]))) for b in batches]
        together["log_probs"] = np.concatenate(widened)
    return together


def new_token_limits(prompts, max_length, max_new_tokens):
    """How many tokens each prompt may gain under both limits, either of which may be `None`.

    Raises:
        ValueError: for limits that leave nothing to generate.
    """
    for name, value in {"max_length": max_length, "max_new_tokens": max_new_tokens}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise ValueError(f"`{name}` must be a whole number of tokens. Received: {value!r}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1. Received: {max_new_tokens}")
    limits = []
    for prompt in prompts:
        if max_length is not None:
            check_room(len(prompt), max_length)
        room = float("inf") if max_length is None else max_length - len(prompt)
        limits.append(int(min(room, room if max_new_tokens is None else max_new_tokens)))
    return limits


def stop_token_list(preprocessor, stop_token_ids):
    """The stop tokens as a list of ints: `"auto"` is the tokenizer's, `None` none at all."""
    if stop_token_ids is None:
        return []
    if not isinstance(stop_token_ids, str):
        return [int(token_id) for token_id in stop_token_ids]
    if stop_token_ids != "auto":
        raise ValueError(f"`stop_token_ids` is 'auto', None or token ids. Received: {stop_token_ids!r}")
    if preprocessor is None:
        raise ValueError(
            "`stop_token_ids='auto'` takes them from the preprocessor, and this model has none. "
            "Pass token ids, or None to generate up to the length."
        )
    return list(preprocessor.tokenizer.stop_token_ids)


class GrowingText:
    """Gives out a text piece by piece as it grows, none of which ends inside a character or goes into a stop string.

    Args:
        stop: optional `StopStrings`.
    """

    def __init__(self, stop=None):
        self.stop = stop or StopStrings()
        self.shown = 0

    def grow(self, text, complete=False):
        """The next piece, which may be empty.

        Args:
            text: string, all of the text so far.
            complete: bool. Nothing more will come.
        """
        end = len(self.stop.cut(text)) if complete else min(_complete(text), self.stop.safe_length(text))
        piece = text[self.shown : end]
        self.shown = max(end, self.shown)
        return piece


def text_pieces(batches_of_ids, decode):
    """Yields text as soon as its characters are complete.

    Args:
        batches_of_ids: iterator over all new ids so far, longer each time.
        decode: callable from ids to text.
    """
    growing, text = GrowingText(), ""
    for ids in batches_of_ids:
        text = decode(ids)
        if piece := growing.grow(text):
            yield piece
    if piece := growing.grow(text, complete=True):
        yield piece


def _complete(text):
    """Where the last character ends whose bytes have all come. A missing byte shows as a replacement character."""
    tail = text[-MOST_BYTES_WAITING:]
    return len(text) - (len(tail) - len(tail.rstrip(REPLACEMENT)))


def _to_numpy(x):
    return np.asarray(keras.ops.convert_to_numpy(x))
