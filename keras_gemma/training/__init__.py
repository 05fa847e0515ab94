"""What `fit` needs around it: loss, step, optimizers, schedules, a monitor, exact resume, a stop at NaN, and tuning."""

from keras_gemma.training.compiled import refuse_uncompiled
from keras_gemma.training.errors import CheckpointNotSavedError
from keras_gemma.training.errors import DamagedCheckpointError
from keras_gemma.training.errors import ForeignCheckpointError
from keras_gemma.training.errors import NonFiniteLossError
from keras_gemma.training.finite import StopOnNonFiniteLoss
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
from keras_gemma.training.preference_loss import bradley_terry_losses
from keras_gemma.training.progress import ProgressBar
from keras_gemma.training.progress import ProgressLines
from keras_gemma.training.progress import with_progress_bar
from keras_gemma.training.resume import ExactResume
from keras_gemma.training.resume import exact_resume_among
from keras_gemma.training.schedules import WarmUp
from keras_gemma.training.token_count import TokenCount
from keras_gemma.training.tuning import KeepBest
from keras_gemma.training.tuning import tune
from keras_gemma.training.whole_steps import in_whole_steps
from keras_gemma.training.whole_steps import uninterrupted

__all__ = [
    "NORMS_AND_BIASES",
    "TOKEN_EMBEDDING",
    "Adafactor",
    "AdamW",
    "CheckpointNotSavedError",
    "DamagedCheckpointError",
    "ExactResume",
    "ForeignCheckpointError",
    "KeepBest",
    "Lion",
    "NextTokenLoss",
    "NonFiniteLossError",
    "Perplexity",
    "ProgressBar",
    "ProgressLines",
    "StopOnNonFiniteLoss",
    "TokenAccuracy",
    "TokenCount",
    "TrainingMonitor",
    "WarmUp",
    "bradley_terry_losses",
    "exact_resume_among",
    "in_whole_steps",
    "peak_flops",
    "refuse_uncompiled",
    "training_flops_per_token",
    "tune",
    "uninterrupted",
    "with_progress_bar",
]
