"""Callbacks of runs that break off and go on."""

import keras


class Crash(Exception):
    pass


class CrashAt(keras.callbacks.Callback):
    """Breaks training off before a step, counted in this process."""

    def __init__(self, step):
        super().__init__()
        # An iterator, because numbers of callbacks go on with the run.
        self._left = iter(range(step))

    def on_train_batch_begin(self, batch, logs=None):
        if next(self._left, None) is None:
            raise Crash


class Seen(keras.callbacks.Callback):
    """Notes `{(epoch, batch): loss}` of every step in a dict that it is given."""

    def __init__(self, steps):
        super().__init__()
        self._add = steps.__setitem__

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self._add((self._epoch, batch), logs["loss"])
