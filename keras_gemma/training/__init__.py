"""What `fit` needs around it: its loss and metrics, exact resume, and stopping where training breaks."""

from keras_gemma.training.errors import CheckpointNotSavedError
from keras_gemma.training.errors import DamagedCheckpointError
from keras_gemma.training.errors import ForeignCheckpointError
from keras_gemma.training.errors import NonFiniteLossError
from keras_gemma.training.finite import StopOnNonFiniteLoss
from keras_gemma.training.objective import NextTokenLoss
from keras_gemma.training.objective import Perplexity
from keras_gemma.training.objective import TokenAccuracy
from keras_gemma.training.resume import ExactResume
from keras_gemma.training.resume import exact_resume_among

__all__ = [
    "CheckpointNotSavedError",
    "DamagedCheckpointError",
    "ExactResume",
    "ForeignCheckpointError",
    "NextTokenLoss",
    "NonFiniteLossError",
    "Perplexity",
    "StopOnNonFiniteLoss",
    "TokenAccuracy",
    "exact_resume_among",
]
