"""Training that stops where it breaks."""

import collections
import math
import threading

import keras

from keras_gemma.training.errors import NonFiniteLossError


class StopOnNonFiniteLoss(keras.callbacks.Callback):
    """Raises at the first batch whose loss is NaN or infinite, with its number.

    Keras reports the mean over the epoch, which stays NaN once a batch was; the first such mean names the batch. The
    device is not waited for: a loss is looked at when it is there, while the next steps are already running. With
    `steps_per_execution` above 1, the last batch of the execution is named. Beside an `ExactResume` the error also
    names the last good checkpoint.

    Raises:
        NonFiniteLossError: from `fit`.
        ValueError: from `fit`, where the train step reports no `"loss"`.
    """

    # Keras then calls from other threads, several at once, and training does not wait for the value.
    async_safe = True

    def __init__(self):
        super().__init__()
        self._steps_before_epoch = 0

    def on_train_begin(self, logs=None):
        self._steps_before_epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._last_batch = -1
        self._raised = False
        self._turn = threading.Condition()
        self._running = collections.deque()
        # `self.model` moves JAX's state about, so that it must not be touched from another thread.
        self._steps_per_execution = self.model.steps_per_execution

    def on_train_batch_begin(self, batch, logs=None):
        with self._turn:
            self._running.append(batch)

    def on_train_batch_end(self, batch, logs=None):
        if "loss" not in logs:
            raise ValueError(f"The train step has to report a 'loss'. Received: {sorted(logs)}")
        first = batch - self._steps_per_execution + 1
        with self._turn:
            # One after the other. A batch for which another callback failed never has its turn: hence the time limit.
            self._turn.wait_for(lambda: self._running[0] == first, timeout=5)
            self._running.remove(first)
            self._turn.notify_all()
            self._last_batch = max(self._last_batch, batch)
            if not math.isfinite(logs["loss"]) and not self._raised:
                self._raised = True
                step = self._steps_before_epoch + batch + 1
                raise NonFiniteLossError(f"The loss is {logs['loss']} at", step, self._epoch, batch)

    def on_epoch_end(self, epoch, logs=None):
        self._steps_before_epoch += self._last_batch + 1
