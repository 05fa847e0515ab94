"""How far training is, for people: a bar that fits a terminal, or a line now and then where there is none."""

import collections
import math
import statistics
import sys
import time

import keras

# What belongs to `History` and TensorBoard, not to a line that someone watches.
HIDDEN = {
    "gradient_norm",
    "learning_rate",
    "model_flop_utilization",
    "perplexity",
    "tokens",
    "tokens_per_second",
}
SHORT = {"token_accuracy": "accuracy", "val_token_accuracy": "val_accuracy"}
# With the numbers beside it, a line stays below 100 columns.
BAR_WIDTH = 10
LINE_WIDTH = 100
STEPS_OF_ESTIMATE = 50


class ProgressBar(keras.callbacks.ProgbarLogger):
    """Keras' progress bar with loss, accuracy and tokens a second, below 100 columns.

    Metrics that were passed to `compile` are shown, too. Everything else stays in `History` and TensorBoard.
    `fit` and `evaluate` of this package's models use it unless `callbacks` has a
    `keras.callbacks.ProgbarLogger`.
    """

    def on_epoch_begin(self, epoch, logs=None):
        self._speed = _Speed()
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch, logs=None):
        tokens_per_second = self._speed.after(logs, time.perf_counter())
        super().on_train_batch_end(batch, {**shown(logs), **tokens_per_second})

    def on_test_batch_end(self, batch, logs=None):
        super().on_test_batch_end(batch, shown(logs))

    def on_epoch_end(self, epoch, logs=None):
        logs = shown(logs)
        if any(name.startswith("val_") for name in logs):
            # A line with the results of validation has no room for speed.
            _forget(self.progbar, "tokens/s")
        else:
            logs |= self._speed.latest
        super().on_epoch_end(epoch, _within_line(logs))

    def on_test_end(self, logs=None):
        super().on_test_end(shown(logs))

    def _maybe_init_progbar(self):
        if self.progbar is None:
            self.progbar = keras.utils.Progbar(
                target=self.target,
                width=BAR_WIDTH,
                verbose=self.verbose,
                unit_name="step",
                # Shown as they are: they are means already.
                stateless_metrics=(),
            )


class ProgressLines(keras.callbacks.Callback):
    """Prints a line of progress every few steps, for logs and pipes.

    Args:
        every: int, steps between two lines.
        total_steps: optional int, steps of the whole run, for the time that is left.
        file: where to print, standard output by default.

    Raises:
        ValueError: for `every` below 1.
    """

    def __init__(self, every=10, total_steps=None, file=None):
        super().__init__()
        if every < 1:
            raise ValueError(f"`every` counts steps and is at least 1. Received: {every}")
        self.every = every
        self.total_steps = total_steps
        self.file = file

    def on_train_begin(self, logs=None):
        self._durations = collections.deque(maxlen=STEPS_OF_ESTIMATE)

    def on_epoch_begin(self, epoch, logs=None):
        self._speed = _Speed()
        self._epoch = epoch
        self._last = None

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        steps = self.params.get("steps")
        step = batch + 1 + (self._epoch * steps if steps else 0)
        if self._last is not None:
            self._durations.append(now - self._last)
        self._last = now
        speed = self._speed.after(logs, now)
        if step % self.every and step != self.total_steps:
            return
        total = self.total_steps or (steps and steps * self.params["epochs"])
        where = f"step {step}/{total}" if total else f"step {step}"
        self._print(where, {**shown(logs), **speed}, self._left(step, total))

    def on_epoch_end(self, epoch, logs=None):
        validation = {name: value for name, value in shown(logs).items() if name.startswith("val_")}
        if validation:
            self._print(f"epoch {epoch + 1}", validation)

    def _left(self, step, total):
        if not total or step >= total or not self._durations:
            return ""
        # The median: a step that compiles says nothing about the others.
        return f", {_duration((total - step) * statistics.median(self._durations))} left"

    def _print(self, where, values, left=""):
        numbers = ", ".join(f"{name} {_readable(value)}" for name, value in values.items())
        print(f"{where}: {numbers}{left}", file=self.file or sys.stdout, flush=True)


class StopAtStep(keras.callbacks.Callback):
    """Ends training after a number of steps, in the middle of an epoch if need be.

    Args:
        step: int, the last step, counted from 1 over all epochs.
        steps_per_epoch: int.
    """

    def __init__(self, step, steps_per_epoch):
        super().__init__()
        self.step = step
        self.steps_per_epoch = steps_per_epoch
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self._epoch * self.steps_per_epoch + batch + 1 >= self.step:
            self.model.stop_training = True


def shown(logs):
    """The logs that someone who watches wants to see, under short names. Numbers that are not finite are left out.

    Example:

    >>> from keras_gemma.training.progress import shown
    >>> shown({"loss": 2.5, "token_accuracy": 0.25, "gradient_norm": 1.0, "tokens": 512})
    {'loss': 2.5, 'accuracy': 0.25}
    """
    logs = {name: float(value) for name, value in (logs or {}).items() if name.removeprefix("val_") not in HIDDEN}
    # A loss that is NaN is news.
    return {SHORT.get(name, name): value for name, value in logs.items() if math.isfinite(value) or name == "loss"}


def with_progress_bar(callbacks, verbose):
    """Callbacks of `fit` or `evaluate` and our bar, unless nothing is shown or a bar is among them."""
    if callbacks is None:
        callbacks = []
    is_list = isinstance(callbacks, (list, tuple))
    if not verbose or not (is_list or isinstance(callbacks, keras.callbacks.Callback)):
        return callbacks
    callbacks = list(callbacks) if is_list else [callbacks]
    if any(isinstance(callback, keras.callbacks.ProgbarLogger) for callback in callbacks):
        return callbacks
    return [*callbacks, ProgressBar()]


class _Speed:
    """Tokens a second since the first step of an epoch, from the count in a model's logs.

    Attributes:
        latest: dict with the speed, empty as long as there is none.
    """

    def __init__(self):
        self._first = None
        self.latest = {}

    def after(self, logs, now):
        tokens = (logs or {}).get("tokens")
        if tokens is None:
            return {}
        tokens = float(tokens)
        if self._first is None:
            self._first = tokens, now
        elif now > self._first[1] and tokens > self._first[0]:
            self.latest = {"tokens/s": round((tokens - self._first[0]) / (now - self._first[1]))}
        return self.latest


def _forget(progbar, name):
    # Keras' bar has no public way to drop a number.
    names = getattr(progbar, "_values_order", [])
    if name in names:
        names.remove(name)


def _within_line(logs):
    """As many logs as fit into a line beside the bar, the first ones first."""
    room = LINE_WIDTH - BAR_WIDTH - len("1000/1000  1000s 100ms/step")
    kept = {}
    for name, value in logs.items():
        room -= len(f" - {name}: {value:.4f}")
        if room < 0:
            break
        kept[name] = value
    return kept


def _readable(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _duration(seconds):
    """Seconds as people say them.

    Example:

    >>> from keras_gemma.training.progress import _duration
    >>> [_duration(seconds) for seconds in (5, 95, 4000)]
    ['5 s', '1 min 35 s', '1 h 6 min']
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
