"""What a training run tells about itself beside its loss."""

import contextlib
import math
import threading
import time

import keras
from keras import ops

from keras_gemma.training import flops
from keras_gemma.training.event_files import EventFiles


class TrainingMonitor(keras.callbacks.Callback):
    """Adds speed and learning rate to what `fit` shows and records.

    The progress bar, `History`, and callbacks that come after this one (`CSVLogger`, `TensorBoard`) see

    - `learning_rate`, of the last step;
    - `tokens_per_second`, if the model logs `tokens` (see `TokenCount`): in the progress bar over the last `every`
      steps, at the end of an epoch over the epoch. The first step of `fit`, which compiles, and validation are left
      out; loading data counts, and so does compiling again for a batch of another shape. NaN for an epoch with
      nothing to measure;
    - `model_flop_utilization`, the model FLOPs of these tokens as a share of what the devices could do (PaLM,
      arXiv 2204.02311, appendix B; see `training_flops_per_token`), if the device's peak is known and the model has a
      Gemma `backbone`. Padding is no token, so it lowers the share.

    The loop is not slowed: where Keras lets steps run ahead of their logs, on JAX, it still does.

    Args:
        log_dir: optional path. Writes all logs of a step as event files for TensorBoard: `train` with one point every
            `every` steps, and `validation` with one an epoch, both over the optimizer's steps. Needs the package
            `tensorboard`.
        peak_flops: optional float. Peak FLOP/s of one device in the precision that is trained in. By default the
            vendor's figure for bfloat16, where it is known; never for a CPU.
        sequence_length: optional int. Positions in a row, for the FLOPs of attention. By default the preprocessor's.
        every: int. Steps between two measurements.

    Raises:
        ValueError: for `every` below 1; when training begins, if utilization is to be logged and the length of rows
            is not known, or `peak_flops` is given for a model without a Gemma `backbone`.
        ImportError: for `log_dir` without the package `tensorboard`.

    Example:

    >>> from keras_gemma.training import TrainingMonitor
    >>> callbacks = [TrainingMonitor(every=10)]
    """

    # Keras may call it from a thread that has waited for the step's logs, instead of waiting in the training loop.
    async_safe = True

    def __init__(self, log_dir=None, peak_flops=None, sequence_length=None, every=1):
        super().__init__()
        if every < 1:
            raise ValueError(f"`every` counts steps and is at least 1. Received: {every}")
        self.peak_flops = peak_flops
        self.sequence_length = sequence_length
        self.every = every
        self._event_files = None if log_dir is None else EventFiles(log_dir)
        self._lock = threading.Lock()

    def on_train_begin(self, logs=None):
        # No bool, because those go on with a resumed run, whose first step compiles all the same.
        self._compiled = threading.Event()
        # Here, because `self.model` makes Keras put the state of JAX back into the model, which must not happen midway.
        self._steps_per_execution = self.model.steps_per_execution
        self._tokens_per_second_at_peak = self._speed_at_peak()
        if self._event_files:
            self._event_files.open("train")

    def on_epoch_begin(self, epoch, logs=None):
        self._speed = Speed()
        self._step_of_epoch = 0
        self._rates = None

    def on_train_batch_begin(self, batch, logs=None):
        # A resumed run may begin in the middle of an epoch.
        if self._rates is not None:
            return
        # On JAX the variables are out of reach as soon as the first step of an epoch has begun.
        self._rates = LearningRates(self.model.optimizer, steps_of_epoch=batch)
        # Before the clock runs, since the first time may compile.
        self._shown = {"learning_rate": self._rates.of_step(batch)}
        if self._compiled.is_set():
            self._speed.start(0, time.perf_counter())

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        before = batch + 1 - self._steps_per_execution
        # With several steps in one execution, the last one is cut short by the end of the epoch.
        step = min(batch + 1, self.params.get("steps") or batch + 1)
        due = step // self.every > before // self.every
        with self._lock:
            # Threads may overtake one another.
            is_latest = step > self._step_of_epoch
            if is_latest:
                self._compiled.set()
                self._step_of_epoch = step
                self._speed.record(logs.get("tokens"), now, due)
            added = self._shown
            if due:
                added = {"learning_rate": self._rates.of_step(step - 1), **self._speed_logs(self._speed.latest)}
                self._write("train", step, {**logs, **added})
            if is_latest:
                self._shown = added
            logs.update(added)

    def on_epoch_end(self, epoch, logs=None):
        if not self._step_of_epoch:
            return
        logs["learning_rate"] = self._rates.of_step(self._step_of_epoch - 1)
        if "tokens" in logs:
            logs.update(self._speed_logs(self._speed.mean()))
        validation = {name[4:]: value for name, value in logs.items() if name.startswith("val_")}
        self._write("validation", self._step_of_epoch, validation)

    def on_train_end(self, logs=None):
        if self._event_files:
            self._event_files.close()

    def _write(self, run, step_of_epoch, values):
        if self._event_files:
            self._event_files.write(run, self._rates.first_step + step_of_epoch, values)

    def _speed_logs(self, tokens_per_second):
        if tokens_per_second is None:
            return {}
        logs = {"tokens_per_second": tokens_per_second}
        if self._tokens_per_second_at_peak:
            logs["model_flop_utilization"] = tokens_per_second / self._tokens_per_second_at_peak
        return logs

    def _speed_at_peak(self):
        backbone = getattr(self.model, "backbone", None)
        is_gemma = any(base.__name__ == "GemmaBackbone" for base in type(backbone).__mro__)
        if self.peak_flops and not is_gemma:
            raise ValueError(f"`peak_flops` is for models with a Gemma `backbone`. Received: {backbone!r}")
        peak = self.peak_flops or flops.peak_flops()
        if not peak or not is_gemma:
            return None
        length = self.sequence_length or getattr(getattr(self.model, "preprocessor", None), "sequence_length", None)
        if length is None:
            raise ValueError(
                "Utilization depends on the length of rows. Pass `TrainingMonitor(sequence_length=...)` for a model "
                "without a preprocessor. Received: sequence_length=None"
            )
        share = _size(backbone.trainable_weights) / _size(backbone.weights)
        per_token = flops.training_flops_per_token(backbone.get_config(), length, trainable_share=share)
        return peak * flops.device_count() / per_token


class Speed:
    """Tokens a second within one epoch, from counts that begin with the epoch and the times they were reached.

    Attributes:
        latest: the speed over the last stretch that ended, or `None` as long as there is none.
    """

    def __init__(self):
        self._first = self._last = self._mark = self.latest = None

    def start(self, tokens, now):
        """Begins to measure: `tokens` are done at `now`, in seconds."""
        self._first = self._last = self._mark = tokens, now

    def record(self, tokens, now, due):
        """Takes in that `tokens` (`None` if nobody counts) are done at `now`; ends a stretch if one is `due`."""
        if tokens is None:
            return
        if self._first is None:
            self.start(tokens, now)
            return
        # Threads may have read the clock in another order.
        self._last = tokens, max(now, self._last[1])
        if due and self._last[1] > self._mark[1]:
            self.latest = _rate(self._mark, self._last)
            self._mark = self._last

    def mean(self):
        """The speed over everything measured, NaN if that is nothing."""
        return float("nan") if self._first is None or self._first == self._last else _rate(self._first, self._last)


def _rate(begin, end):
    return (end[0] - begin[0]) / (end[1] - begin[1])


class LearningRates:
    """The learning rates of an epoch, without a look at the optimizer while its steps are under way.

    A rate that is a number is the one at the start of the epoch.

    Args:
        optimizer: a Keras optimizer between two steps.
        steps_of_epoch: int. How many of its steps belong to the epoch that is under way.
    """

    def __init__(self, optimizer, steps_of_epoch=0):
        # What `LossScaleOptimizer` wraps has the schedule.
        self._optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self._iterations = self._optimizer.variables[0]
        self.first_step = int(ops.convert_to_numpy(self._iterations)) - steps_of_epoch
        rate = self._optimizer.learning_rate
        self._fixed = float(ops.convert_to_numpy(rate)) if isinstance(rate, keras.Variable) else None

    def of_step(self, step):
        """The rate of a step, counted from 0 within the epoch."""
        if self._fixed is not None:
            return self._fixed
        with _beside_the_steps_under_way():
            iteration = ops.convert_to_tensor(self.first_step + step, self._iterations.dtype)
            with keras.StatelessScope(state_mapping=[(self._iterations, iteration)]):
                return float(ops.convert_to_numpy(self._optimizer.learning_rate))


def _beside_the_steps_under_way():
    """Computes on the CPU of this host: on an accelerator, what is asked for now waits until the steps are done."""
    if keras.backend.backend() != "jax":
        return keras.device("cpu:0")
    import jax

    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out.
        return contextlib.nullcontext()


def _size(weights):
    return sum(math.prod(weight.shape) for weight in weights)
