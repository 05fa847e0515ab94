"""The vocabulary of the small presets: that of `keras-gemma vocabulary` with few pieces for white space.

proto = train_vocabulary(document.text for document in corpus.train)
processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
"""

from collections.abc import Iterable

from keras_gemma import models


def train_vocabulary(texts: Iterable[str], size: int = 4096) -> bytes:
    """Trains a byte-pair vocabulary of `size` pieces and returns the serialised SentencePiece model.

    The same texts in the same order give the same bytes.

    Raises:
        ValueError: as `keras_gemma.models.train_vocabulary`.
    """
    return models.train_vocabulary(texts, size, newline_runs=2, space_runs=1, progress=False)
