"""The loop around a trainer's steps: callbacks, progress, history, and going on after a crash.

trainer.make_step → logs → callbacks → history
                         ↘ checkpoint: weights, optimizer, reference, place, the trainer's own state
"""

import hashlib
import json
import math

import keras
import numpy as np

from keras_gemma.training import NonFiniteLossError
from keras_gemma.training import run_state
from keras_gemma.training.checkpoint_folder import CheckpointFolder

SHOWN = ("reward", "kl", "ended", "response_length", "accuracy", "loss")


class Progress(keras.callbacks.ProgbarLogger):
    """Keras' progress bar with the few quantities that one watches."""

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, _shown(logs))

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, _shown(logs))


def _shown(logs):
    return {name: logs[name] for name in SHOWN if name in logs and not math.isnan(logs[name])}


class Loop:
    """Epochs of steps of a trainer.

    Args:
        trainer: what has
            `policy`, a compiled model;
            `reference`, a list of arrays that `policy` began as;
            `step`, an int, the steps made, and `make_step()`, which makes one and returns a dict of floats;
            `validate()`, which returns a dict of floats at the end of an epoch, empty where there is nothing to say;
            `settings()`, what it was made with, for json: a checkpoint of another one is refused;
            `state()`, what it knows besides, for json, and `restore(state, reference)`.
        data: what the steps are made of, for json. A checkpoint of other data is refused.
        steps: int, steps of an epoch.
        epochs: int.
        callbacks: Keras callbacks. A step is a batch to them.
        verbose: as of `keras.Model.fit`.
        checkpoints: optional path of a folder for the checkpoints of this run alone.
        save_every: int, steps between two of them.
    """

    def __init__(self, trainer, data, steps, epochs, callbacks, verbose, checkpoints=None, save_every=10):
        if steps < 1 or epochs < 1 or save_every < 1:
            raise ValueError(
                f"`steps`, `epochs` and `save_every_steps` are at least 1. Received: {steps}, {epochs} and {save_every}"
            )
        self.trainer = trainer
        self.steps = steps
        self.epochs = epochs
        self.save_every = save_every
        self.epoch = self.index = 0
        self.sums, self.counts = {}, {}
        self._data = hashlib.sha256(json.dumps(data).encode()).hexdigest()
        self._saved_step = 0
        self._folder = None if checkpoints is None else CheckpointFolder(checkpoints, keep=2)
        self._history = keras.callbacks.History()
        verbose = 1 if verbose == "auto" else verbose
        self._own = list(callbacks)
        shown = [Progress()] if verbose else []
        self._callbacks = keras.callbacks.CallbackList(
            [*self._own, *shown, self._history],
            verbose=verbose,
            epochs=epochs,
            steps=steps,
            model=trainer.policy,
        )

    def run(self):
        """Runs what is left of the epochs.

        Returns:
            A `keras.callbacks.History` that begins where the run began.

        Raises:
            DamagedCheckpointError, ForeignCheckpointError: if the newest checkpoint cannot be gone on from.
            CheckpointNotSavedError: if a checkpoint cannot be written.
            NonFiniteLossError: at a loss or a weight that is NaN or infinite; such a state is not saved.
        """
        policy = self.trainer.policy
        policy.stop_training = False
        policy.history = self._history
        found = self._newest()
        self._callbacks.on_train_begin()
        self._states = run_state.CallbackStates([*self._own, self._history])
        if found:
            self._restore(*found)
        try:
            while self.epoch < self.epochs and not policy.stop_training:
                self._run_epoch()
        finally:
            self._close()
        self._callbacks.on_train_end()
        return self._history

    def _run_epoch(self):
        if not self.index:
            self.sums, self.counts = {}, {}
            self._callbacks.on_epoch_begin(self.epoch)
        while self.index < self.steps and not self.trainer.policy.stop_training:
            self._run_step()
        # A callback may have ended the epoch early; and there are steps without a reward.
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self._callbacks.on_epoch_end(self.epoch, {**means, **self.trainer.validate()})
        self.epoch, self.index = self.epoch + 1, 0
        if self.epoch == self.epochs or self.trainer.policy.stop_training or self._is_due():
            self._save()

    def _run_step(self):
        self._callbacks.on_train_batch_begin(self.index)
        try:
            logs = self.trainer.make_step()
        except ValueError:
            # A reward that failed: nothing of the step is made, and what was made before is kept.
            self._save()
            raise
        self._last = self.epoch, self.index
        if not math.isfinite(logs["loss"]):
            raise self._not_finite("the loss")
        self._add(logs)
        self._callbacks.on_train_batch_end(self.index, logs)
        self.index += 1
        if self._is_due() and self.index < self.steps:
            self._save()
        if self._folder:
            self._folder.check()

    def _add(self, logs):
        for name, value in logs.items():
            if not math.isnan(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def _is_due(self):
        return self.trainer.step % self.save_every == 0

    def _not_finite(self, what):
        checkpoint = self._folder and self._folder.last_good()
        return NonFiniteLossError(f"{what} has become NaN or infinite by", self.trainer.step, *self._last, checkpoint)

    # === Checkpoints ===

    def _newest(self):
        """Step, `run` and `host` of the newest checkpoint, or `None`."""
        if self._folder is None:
            return None
        step = self._folder.verify_latest()
        if step is not None:
            run, host = self._folder.read(step)
            run_state.refuse_foreign(self._folder.path / str(step), run["identity"], self._identity())
        self._folder.open()
        return None if step is None else (step, run, host)

    def _identity(self):
        policy = self.trainer.policy
        settings = {"trainer": type(self.trainer).__name__, "data": self._data, **self.trainer.settings()}
        return run_state.identity(policy, {**run_state.settings(policy, self.steps), **settings})

    def _restore(self, step, run, host):
        self.epoch, self.index, self.sums = run["epoch"], run["index"], run["sums"]
        self.counts = run.get("counts", dict.fromkeys(self.sums, self.index))
        if self.index:
            # What callbacks do at the beginning of an epoch is undone by what they knew.
            self._callbacks.on_epoch_begin(self.epoch)
        extra = {"callbacks": run_state.empty_arrays(run["callback_arrays"]), "reference": self._reference_places()}
        wanted = {**run_state.places_for_arrays(self.trainer.policy), **extra}
        arrays = self._folder.read_variables(step, wanted)
        run_state.assign(self.trainer.policy, arrays)
        self._states.restore(run["callbacks"], arrays["callbacks"])
        reference = [arrays["reference"][name] for name in sorted(arrays["reference"])]
        self.trainer.step = self._saved_step = step
        self.trainer.restore(run["trainer"], reference)
        self.trainer.policy.stop_training = run["stopped"]
        run_state.set_random_state(host["random"])

    def _save(self):
        if self._folder is None or self._saved_step == self.trainer.step:
            return
        if not run_state.all_finite(self.trainer.policy):
            raise self._not_finite("a weight")
        arrays = self._states.arrays()
        run = {
            "identity": self._identity(),
            "versions": run_state.versions(),
            "epoch": self.epoch,
            "index": self.index,
            "sums": self.sums,
            "counts": self.counts,
            "stopped": bool(self.trainer.policy.stop_training),
            "trainer": self.trainer.state(),
            "callbacks": self._states.plain(),
            "callback_arrays": run_state.described_arrays(arrays),
        }
        variables = {**run_state.arrays_of(self.trainer.policy), "callbacks": arrays, "reference": self._reference()}
        self._saved_step = self.trainer.step
        self._folder.save(self.trainer.step, variables, run, {"random": run_state.random_state()})

    def _reference(self):
        return {f"{index:04d}": value for index, value in enumerate(self.trainer.reference)}

    def _reference_places(self):
        if keras.distribution.distribution() is not None:
            return self._reference()
        return {name: np.empty(value.shape, value.dtype) for name, value in self._reference().items()}

    def _close(self):
        if self._folder:
            try:
                self._folder.wait()
            finally:
                self._folder.close()
