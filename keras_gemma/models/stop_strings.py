"""Strings that end a text: where they stand, and how much of a growing text may still become one."""


class StopStrings:
    """Strings that end a text and are no part of it.

    Args:
        stop: a string, a list of strings, or `None`.

    Raises:
        ValueError: for anything else, and for an empty string.

    Example:

    >>> from keras_gemma.models.stop_strings import StopStrings
    >>> stop = StopStrings(["\\n\\n", "END"])
    >>> stop.cut("one END two")
    'one '
    >>> stop.safe_length("one EN")
    4
    """

    def __init__(self, stop=None):
        strings = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(strings, (list, tuple, set)) or not all(isinstance(s, str) and s for s in strings):
            raise ValueError(f"`stop` is a string or a list of strings, none of them empty. Received: {stop!r}")
        self.strings = list(strings)

    def __bool__(self):
        return bool(self.strings)

    def find(self, text):
        """Where the first of the strings begins in a text, or -1."""
        return min((at for at in map(text.find, self.strings) if at >= 0), default=-1)

    def cut(self, text):
        """The text before the first of the strings."""
        at = self.find(text)
        return text if at < 0 else text[:at]

    def safe_length(self, text):
        """How much of a growing text is certain to come before any of the strings."""
        at = self.find(text)
        return at if at >= 0 else len(text) - max((_overlap(text, s) for s in self.strings), default=0)

    def without_tokens(self, token_id_of):
        """These strings but for those that are one special token each, and the ids of those tokens.

        Args:
            token_id_of: dict of special tokens to their ids.
        """
        ids = [token_id_of[string] for string in self.strings if string in token_id_of]
        return StopStrings([string for string in self.strings if string not in token_id_of]), ids


def _overlap(text, string):
    """Length of the longest end of `text` that `string` begins with."""
    return next((n for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n])), 0)


class StopWatch:
    """Watches rows grow and says which of them have come to a stop string.

    Args:
        stop: `StopStrings`.
        decode_rows: callable from lists of ids to their texts.
        count: int, how many rows there are.
    """

    def __init__(self, stop, decode_rows, count):
        self.stop = stop
        self.decode_rows = decode_rows
        self.seen = [0] * count
        self.growing = set(range(count)) if stop else set()

    def ends(self, rows):
        """The number of ids that rows keep that have just come to a stop string, by row.

        Args:
            rows: list of lists of ids, each as it was or longer than the last time.
        """
        grown = [row for row in sorted(self.growing) if len(rows[row]) > self.seen[row]]
        texts = self.decode_rows([rows[row] for row in grown])
        ends = {row: self._first_end(row, rows[row]) for row, text in zip(grown, texts) if self.stop.find(text) >= 0}
        self.growing -= set(ends)
        for row in grown:
            self.seen[row] = len(rows[row])
        return ends

    def _first_end(self, row, ids):
        lengths = range(self.seen[row] + 1, len(ids) + 1)
        texts = self.decode_rows([ids[:length] for length in lengths])
        return next((n for n, text in zip(lengths, texts) if self.stop.find(text) >= 0), len(ids))
