"""Texts that are longer than a row → several rows, and an account of what was cut.

    <bos> a b c d e f g <eos>, rows of 4:   <bos> a b c → a b c d     <bos> d e f → (d) e f g     <bos> g → (g) <eos>

A document ends with one `<eos>`. Every row of it opens with `<bos>`, as every sequence does that Gemma reads when it
writes or is scored. (TRL and MaxText leave it out of further rows.) Behind it a further row repeats the last token of
the row before, and learns neither: each token of the document is learned once, with one of the document before it.
"""

import sys
import warnings
from dataclasses import dataclass

CHOICES = ("split", "truncate", "refuse")


def check_choice(long_texts):
    """Raises a `ValueError` for what is no choice of `long_texts`."""
    if long_texts not in CHOICES:
        raise ValueError(f"`long_texts` is one of {', '.join(map(repr, CHOICES))}. Received: {long_texts!r}")


def windows(count, row_length, opened):
    """Where the rows of a document lie.

    Args:
        count: int, tokens of the document, its `<bos>` and `<eos>` included.
        row_length: int, `T`. A row has one token more, of which it predicts all but the first.
        opened: bool, whether further rows open with a `<bos>` of their own.

    Returns:
        A list of pairs of ints: the first token of a row and the one behind its last.

    Example:

    >>> from keras_gemma.data.long_texts import windows
    >>> windows(9, row_length=4, opened=False), windows(9, row_length=4, opened=True)
    ([(0, 5), (4, 9)], [(0, 5), (4, 8), (7, 9)])
    """
    found = [(0, min(count, row_length + 1))]
    while found[-1][1] < count:
        start = found[-1][1] - 1
        found.append((start, min(count, start + row_length + (not opened))))
    return found


@dataclass
class Cuts:
    """What was cut to fit into rows.

    Attributes:
        examples: int, how many were looked at.
        split: int, texts that were cut into several rows.
        rows: int, the rows that these became.
        truncated: int, examples whose end was dropped.
        dropped_tokens: int, tokens of these ends.
        without_response: int, those among them whose prompts fill the row, so that they train nothing.
        longest: int, tokens of the longest example that was cut.
    """

    examples: int = 0
    split: int = 0
    rows: int = 0
    truncated: int = 0
    dropped_tokens: int = 0
    without_response: int = 0
    longest: int = 0
    _was_told: bool = False

    def add_split(self, count, rows):
        """Notes a text of `count` tokens that became `rows` rows."""
        self.split += 1
        self.rows += rows
        self.longest = max(self.longest, count)

    def add_truncated(self, count, kept, learns=True):
        """Notes an example of `count` tokens of which `kept` were kept, and whether it learns any of these."""
        self.truncated += 1
        self.without_response += not learns
        self.dropped_tokens += count - kept
        self.longest = max(self.longest, count)

    def tell(self, row_length, so_far=False):
        """Warns of what was cut, once, if anything was."""
        if self._was_told or not (self.split or self.truncated):
            return
        self._was_told = True
        count = f"{self.examples:,} examples{' so far' if so_far else ''}"
        told = [f"Longer than a row of {row_length:,} tokens (the longest has {self.longest:,}), of {count}:"]
        if self.split:
            told.append(f"{self.split:,} texts, which are cut into {self.rows:,} rows; nothing of them is left out.")
        if self.truncated:
            told.append(f"{self.truncated:,} whose last {self.dropped_tokens:,} tokens are dropped.")
        if self.without_response:
            told.append(f"Of these, {self.without_response:,} leave no room for a response and train nothing.")
        if self.truncated:
            told.append(
                "Texts are cut into several rows by `long_texts='split'` of `fit` and `training_batches`; for prompts "
                "with responses and for dialogues raise `sequence_length`, or leave them out with "
                "`data.tuning_examples`."
            )
        warn([*told, "This is said once."] if so_far else told)


def warn(sentences):
    """A warning at the line of the user's that called us, however many layers lie between."""
    warnings.warn(" ".join(sentences), stacklevel=_levels_to_user())


_OF_LIBRARIES = ("keras_gemma", "keras", "keras_hub", "grain", "tensorflow", "contextlib")


def _levels_to_user():
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _OF_LIBRARIES:
        frame, level = frame.f_back, level + 1
    # Counted from `warn`.
    return level
