"""What `fit` needs around it: loss, step, optimizers, schedules, and a monitor."""

from keras_gemma.training.flops import peak_flops
from keras_gemma.training.flops import training_flops_per_token
from keras_gemma.training.monitor import TrainingMonitor
from keras_gemma.training.objective import NextTokenLoss
from keras_gemma.training.objective import Perplexity
from keras_gemma.training.objective import TokenAccuracy
from keras_gemma.training.optimizers import NORMS_AND_BIASES
from keras_gemma.training.optimizers import TOKEN_EMBEDDING
from keras_gemma.training.optimizers import Adafactor
from keras_gemma.training.optimizers import AdamW
from keras_gemma.training.optimizers import Lion
from keras_gemma.training.schedules import WarmUp
from keras_gemma.training.token_count import TokenCount

__all__ = [
    "NORMS_AND_BIASES",
    "TOKEN_EMBEDDING",
    "Adafactor",
    "AdamW",
    "Lion",
    "NextTokenLoss",
    "Perplexity",
    "TokenAccuracy",
    "TokenCount",
    "TrainingMonitor",
    "WarmUp",
    "peak_flops",
    "training_flops_per_token",
]
