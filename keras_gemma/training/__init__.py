"""What `fit` needs around it."""

from keras_gemma.training.objective import NextTokenLoss
from keras_gemma.training.objective import Perplexity
from keras_gemma.training.objective import TokenAccuracy

__all__ = ["NextTokenLoss", "Perplexity", "TokenAccuracy"]
