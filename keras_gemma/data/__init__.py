"""Examples → preprocessed batches, for everything `fit` is given."""

from keras_gemma.data.batches import preprocessed
from keras_gemma.data.batches import split_off_validation
from keras_gemma.data.batches import yields_batches
from keras_gemma.data.resumable import Place
from keras_gemma.data.resumable import resumable

__all__ = ["Place", "preprocessed", "resumable", "split_off_validation", "yields_batches"]
