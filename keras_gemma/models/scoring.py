"""Texts that are there: what a model thinks of each, and where it puts them."""

import math
from dataclasses import dataclass

import numpy as np

from keras_gemma.models.causal_lm_preprocessor import examples_of

# What Gemma 1 was trained on.
LONGEST = 8192
POOLINGS = ("mean", "last", "max")


@dataclass
class TextScore:
    """What a model thinks of a text.

    Attributes:
        log_probs: float32 array `[n]`, the natural logarithm of the probability of each token after those before it.
        token_ids: int32 array `[n]` of these tokens.
        bytes: int, the length of the text in UTF-8.
    """

    log_probs: np.ndarray
    token_ids: np.ndarray
    bytes: int

    @property
    def log_prob(self):
        """The natural logarithm of the probability of the whole text."""
        return float(np.sum(self.log_probs, dtype="float64"))

    @property
    def tokens(self):
        return len(self.log_probs)

    @property
    def perplexity(self):
        """e to the mean negative log-probability of a token."""
        mean = -self.log_prob / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self):
        """The negative log-probability in bits, divided by the bytes: comparable from vocabulary to vocabulary."""
        return -self.log_prob / math.log(2) / self.bytes

    def __repr__(self):
        return (
            f"TextScore(log_prob={self.log_prob:.4f}, tokens={self.tokens}, perplexity={self.perplexity:.4f}, "
            f"bits_per_byte={self.bits_per_byte:.4f})"
        )


@dataclass
class _Row:
    ids: list
    scored: np.ndarray
    bytes: int


def score_texts(model, texts, batch_size, max_length, stride):
    """What `GemmaCausalLM.score_texts` returns."""
    _check_counts(batch_size, max_length, stride)
    preprocessor = _preprocessor_of(model, "score_texts", "score")
    examples, batched = examples_of(texts)
    rows = [_row(preprocessor, example, index) for index, example in enumerate(examples)]
    windows = [
        (index, *window) for index, row in enumerate(rows) for window in _windows(index, row, max_length, stride)
    ]
    log_probs = [np.zeros(len(row.ids), "float32") for row in rows]
    window_ids = [ids for _, ids, _ in windows]
    for (index, _, columns), of_window in zip(windows, _in_batches(model.engine.log_probs, window_ids, batch_size)):
        log_probs[index][columns] = of_window[len(of_window) - (columns.stop - columns.start) :]
    scores = [
        TextScore(of_row[row.scored], np.array(row.ids, "int32")[row.scored], row.bytes)
        for row, of_row in zip(rows, log_probs)
    ]
    return scores if batched else scores[0]


def _row(preprocessor, example, index):
    if isinstance(example, list):
        raise ValueError(
            "A text to score is a string, or {'prompts': ..., 'responses': ...} for a response to a prompt. "
            f"Received a dialogue at index {index}."
        )
    row = preprocessor.row(example)
    prompt_is_text = isinstance(example, str) or isinstance(example["prompts"], str)
    end = len(row.ids) - (prompt_is_text and preprocessor.add_end_token)
    ids, scored = row.ids[:end], np.array(row.learned[:end], bool)
    # Nothing says how likely the first token is.
    scored[:1] = False
    if not scored.any():
        raise ValueError(f"A text to score has at least one token after the first. Received none at index {index}.")
    text = example if isinstance(example, str) else example["responses"]
    return _Row(ids, scored, len(text.encode("utf-8")))


def _windows(index, row, max_length, stride):
    """Yields the ids of each window of a row, and the slice of the row that the end of the window scores."""
    length = len(row.ids)
    if length <= max_length:
        yield row.ids, slice(0, length)
        return
    if stride is None:
        raise ValueError(
            f"A text is scored whole up to `max_length={max_length}` tokens. Received one of {length} tokens at index "
            f"{index}: raise `max_length`, or pass `stride` to score it in windows that overlap."
        )
    yield row.ids[:max_length], slice(0, max_length)
    for begin in range(max_length, length, stride):
        end = min(begin + stride, length)
        # <bos> opens every window, as the model has always seen it.
        yield [row.ids[0], *row.ids[end - max_length + 1 : end]], slice(begin, end)


def embed(model, texts, pooling, batch_size, max_length, normalize):
    """What `GemmaCausalLM.embed` returns."""
    _check_counts(batch_size, max_length, None)
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` is one of {', '.join(map(repr, POOLINGS))}. Received: {pooling!r}")
    preprocessor = _preprocessor_of(model, "embed", "embed")
    examples, batched = examples_of(texts)
    rows = [preprocessor.prompt_ids(example) for example in examples]
    for index, ids in enumerate(rows):
        if not 0 < len(ids) <= max_length:
            raise ValueError(
                f"A text to embed has from 1 to `max_length={max_length}` tokens. Received {len(ids)} at index {index}."
            )
    states = np.stack(_in_batches(lambda rows: model.engine.pooled_states(rows, pooling), rows, batch_size))
    if normalize:
        states /= np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-12)
    return states if batched else states[0]


def _preprocessor_of(model, method, verb):
    if model.preprocessor is None:
        raise ValueError(f"`{method}` reads texts, and this model has no preprocessor to {verb} them with.")
    return model.preprocessor


def _check_counts(batch_size, max_length, stride):
    if batch_size < 1 or max_length < 2:
        raise ValueError(
            f"`batch_size` is at least 1 and `max_length` at least 2. Received: {batch_size} and {max_length}"
        )
    if stride is not None and not 1 <= stride < max_length:
        raise ValueError(f"`stride` is from 1 to below `max_length={max_length}`. Received: {stride}")


def _in_batches(function, rows, batch_size):
    """The results of a function of a list of rows, in the order of the rows; rows of like lengths go together."""
    results = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(rows), batch_size):
        batch = order[start : start + batch_size]
        for index, result in zip(batch, function([rows[index] for index in batch])):
            results[index] = result
    return results
