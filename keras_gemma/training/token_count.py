"""How many tokens an epoch has had."""

import keras
from keras import ops

# Tokens that are counted as one carry.
CARRY = 2**20


@keras.saving.register_keras_serializable(package="keras_gemma")
class TokenCount(keras.metrics.Metric):
    """Number of tokens since the start of the epoch, over the whole batch on all devices; padding does not count.

    Counts in two int32, `2**20` tokens in one of the other: float32 would stop at 2²⁴ tokens, and int32 at 2³¹. What
    it returns is rounded to float32, to about one in ten million.

    Args:
        name: string. `TrainingMonitor` looks for `"tokens"`.
    """

    def __init__(self, name="tokens", **kwargs):
        super().__init__(name=name, **kwargs)
        self.carried = self.add_weight(shape=(), initializer="zeros", dtype="int32", name="carried")
        self.rest = self.add_weight(shape=(), initializer="zeros", dtype="int32", name="rest")

    def update_state(self, y_true, y_pred=None, sample_weight=None):
        """Adds one batch.

        Args:
            y_true: int tensor `[B, T]`, the token ids.
            y_pred: not looked at.
            sample_weight: optional tensor `[B, T]`, zero where no token stands (a padding mask will do). All of them
                count if left out.
        """
        tokens = ops.ones_like(y_true) if sample_weight is None else ops.not_equal(sample_weight, 0)
        total = self.rest + ops.sum(ops.cast(tokens, "int32"))
        self.carried.assign_add(total // CARRY)
        self.rest.assign(total % CARRY)

    def result(self):
        return ops.cast(self.carried, "float32") * CARRY + ops.cast(self.rest, "float32")
