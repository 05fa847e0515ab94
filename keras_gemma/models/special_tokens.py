"""Special tokens that a text may spell, and how they stay text.

SentencePiece turns a user-defined piece into its id wherever a text spells it: `<start_of_turn>` opens a turn, whoever
typed it. Cut behind its first character, the same text has other ids.
"""

import re

from keras_gemma.checkpoints.tokenizer_files import SPACE
from keras_gemma.checkpoints.tokenizer_files import USER_DEFINED
from keras_gemma.checkpoints.tokenizer_files import parsed

# Gemma's vocabulary has these tags whole because they are frequent. They steer nothing.
HTML_ELEMENTS = (
    "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote",
    "strong", "em", "b", "i", "u", "s", "sub", "sup", "code",
)  # fmt: skip
HTML_TAGS = {f"<{slash}{element}>" for element in HTML_ELEMENTS for slash in ("", "/")}


class SpecialTokens:
    """The special tokens that a text can spell in a vocabulary.

    They are its user-defined pieces, without white space, HTML tags and single characters.

    Args:
        proto: bytes of a SentencePiece model.
    """

    def __init__(self, proto):
        pieces = [piece.piece for piece in parsed(proto).pieces if piece.type == USER_DEFINED]
        names = (piece.replace(SPACE, " ") for piece in pieces)
        self.names = [name for name in names if len(name) > 1 and not name.isspace() and name not in HTML_TAGS]
        # The longest first, as SentencePiece matches them.
        patterns = map(re.escape, sorted(self.names, key=len, reverse=True))
        self._pattern = re.compile("|".join(patterns)) if self.names else None

    def first_in(self, text):
        """The first special token that a text spells, or `None`."""
        match = self._pattern and self._pattern.search(text)
        return match[0] if match else None

    def cut(self, text):
        """The text in parts, none of which has a special token whole: `["<", "eos>"]`."""
        parts, start = [], 0
        while self._pattern and (match := self._pattern.search(text, start)):
            parts.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [*parts, text[start:]]
