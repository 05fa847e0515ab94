"""The loss of the next token and the metrics that come out of the same pass over the vocabulary."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_gemma")
class NextTokenLoss(keras.losses.SparseCategoricalCrossentropy):
    """Cross-entropy of the next token in nats, divided by the sum of the weights.

    `GemmaCausalLM` computes it without the logits of a whole batch as long as its metrics are `Perplexity` and
    `TokenAccuracy` at most; with other metrics, and outside of it, it is a loss of logits like any other.

    Args:
        z_loss: float. Coefficient of the squared log-normaliser added to every token's loss; 1e-4 keeps logits from
            drifting in long runs (Chowdhery et al., arXiv 2204.02311, section 5).
        name: string.

    Example:

    >>> import numpy as np
    >>> from keras_gemma.training import NextTokenLoss
    >>> loss = NextTokenLoss()(np.array([[1, 0]]), np.zeros((1, 2, 4), "float32"), sample_weight=np.array([[1.0, 0.0]]))
    >>> round(float(loss), 4)
    1.3863
    """

    def __init__(self, z_loss=0.0, name="loss", dtype=None):
        super().__init__(from_logits=True, reduction="mean_with_sample_weight", name=name, dtype=dtype)
        if z_loss < 0:
            raise ValueError(f"`z_loss` is a coefficient of at least 0. Received: {z_loss}")
        self.z_loss = z_loss

    def call(self, y_true, y_pred):
        losses = super().call(y_true, y_pred)
        if not self.z_loss:
            return losses
        return losses + self.z_loss * ops.square(ops.logsumexp(y_pred, axis=-1))

    def get_config(self):
        return {"z_loss": self.z_loss, "name": self.name, "dtype": self.dtype}


@keras.saving.register_keras_serializable(package="keras_gemma")
class Perplexity(keras.metrics.Mean):
    """The exponential of the mean cross-entropy of all weighted tokens since the last reset.

    Args:
        name: string.
        dtype: of the sums.
    """

    def __init__(self, name="perplexity", dtype=None):
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds tokens with targets `[B, T]`, logits `[B, T, V]` and weights `[B, T]`."""
        losses = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        super().update_state(losses, sample_weight=sample_weight)

    def add(self, sums):
        """Adds the `kernels.TokenSums` of a batch."""
        self.total.assign_add(ops.cast(sums.cross_entropy, self.dtype))
        self.count.assign_add(ops.cast(sums.weight, self.dtype))

    def result(self):
        return ops.exp(super().result())


@keras.saving.register_keras_serializable(package="keras_gemma")
class TokenAccuracy(keras.metrics.SparseCategoricalAccuracy):
    """The weighted share of tokens that the largest logit names, since the last reset.

    Args:
        name: string.
        dtype: of the sums.
    """

    def __init__(self, name="token_accuracy", dtype=None):
        super().__init__(name=name, dtype=dtype)

    def add(self, sums):
        """Adds the `kernels.TokenSums` of a batch."""
        self.total.assign_add(ops.cast(sums.correct, self.dtype))
        self.count.assign_add(ops.cast(sums.weight, self.dtype))


def is_of_token_sums(metric):
    """Whether a metric can be computed without logits."""
    return isinstance(metric, (Perplexity, TokenAccuracy))
