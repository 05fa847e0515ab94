"""`fit` that goes on after a crash as if nothing had happened.

ExactResume.fit: newest checkpoint → place, data ┐
Keras' fit → ResumableCallbacks ─────────────────┴→ skips what is trained → restores → trains → saves in between
"""

import dataclasses
import math
import time

import jax
import keras

from keras_gemma import data
from keras_gemma import distribution
from keras_gemma import startup
from keras_gemma.training import run_state
from keras_gemma.training.checkpoint_folder import CheckpointFolder
from keras_gemma.training.errors import ForeignCheckpointError
from keras_gemma.training.errors import NonFiniteLossError
from keras_gemma.training.whole_steps import in_whole_steps


class ExactResume(keras.callbacks.Callback):
    """Saves the whole state of `fit` now and then, and lets the same call go on from there after a crash.

    `model.fit(x, epochs=3, callbacks=[ExactResume("run/checkpoints", save_every_steps=100)])`, run again after the
    process was killed at whatever moment, starts from the newest complete checkpoint. Losses, metrics, history and
    weights are then equal to the bit to those of a run that was never killed, on the same machine with the same
    versions. JAX only. A finished run that is started again trains nothing and returns its history.

    Kept are weights, optimizer, metrics, seed generators, the global generators of Keras, NumPy and Python, the place
    in the data and the order of the examples, the history, and what other callbacks came to know. A new checkpoint is
    written by Orbax in the background and replaces the oldest when it is complete.

    The optimizer's learning rate, where it is a number, comes from the checkpoint as well; a schedule may be changed.

    Several processes call `fit` alike. A run may go on with another mesh or another number of processes, then exact
    but for rounding; where each reads a share of its own (see `GemmaCausalLM.fit`), with as many shares as before.

    With `steps_per_epoch` passes over the data follow each other without regard to epochs.

    Args:
        directory: path of a folder for the checkpoints of this run alone; on several hosts one that all share.
        save_every_steps: int or `None`. Saves whenever the number of batches trained reaches a multiple of it.
        save_every_seconds: float or `None`. Saves when so much time has passed since the last checkpoint. On several
            hosts only `save_every_steps`, because their clocks differ.
        keep: int. How many of the newest checkpoints stay. At least 2 leave one to go back to.
        asynchronous: bool. `False` waits until a checkpoint is complete before training goes on.

    Raises:
        ValueError: where neither interval is given, a number is not positive, and on other backends than JAX.
        ImportError: where Orbax is missing.
    """

    def __init__(self, directory, save_every_steps=None, save_every_seconds=None, keep=2, asynchronous=True):
        super().__init__()
        startup.require_jax("ExactResume")
        given = {"save_every_steps": save_every_steps, "save_every_seconds": save_every_seconds, "keep": keep}
        for name, value in given.items():
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` is a positive number. Received: {value!r}")
        if save_every_steps is None and save_every_seconds is None:
            raise ValueError("Give `save_every_steps`, `save_every_seconds` or both. Received neither.")
        if save_every_seconds is not None and jax.process_count() > 1:
            raise ValueError("Several hosts save by steps, since their clocks differ: give `save_every_steps` alone.")
        self.save_every_steps = save_every_steps or math.inf
        self.save_every_seconds = save_every_seconds or math.inf
        self.asynchronous = asynchronous
        self.folder = CheckpointFolder(directory, keep)
        self.in_use = False

    def on_train_begin(self, logs=None):
        if not self.in_use:
            raise RuntimeError(
                "`ExactResume` needs a `fit` that hands it the data, as that of keras_gemma's models does; for any "
                f"other model call `exact_resume.fit(model, batches, ...)`. Received: {type(self.model).__name__}.fit"
            )

    def fit(self, model, batches, shuffle=False, callbacks=None, verbose="auto", **kwargs):
        """`keras.Model.fit` from the newest checkpoint on.

        Args:
            model: a compiled `keras.Model`.
            batches: what `keras_gemma.data.preprocessed` returned.
            shuffle: bool, for a `keras.utils.PyDataset`: whether its batches come in a new order each epoch.
            callbacks: list of callbacks, this one among them or not.
            verbose, **kwargs: as of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History` that begins where the run began.

        Raises:
            ValueError: for data that cannot start in its middle, an iterator as validation data, and
                `BackupAndRestore` among the callbacks.
            DamagedCheckpointError, ForeignCheckpointError: if the newest checkpoint cannot be gone on from.
            CheckpointNotSavedError: if a checkpoint cannot be written.
            NonFiniteLossError: before a state with a NaN or infinite loss or weight would be saved.
        """
        if isinstance(callbacks, keras.callbacks.CallbackList):
            raise ValueError("Pass `callbacks` as a list beside `ExactResume`. Received: a CallbackList")
        _refuse_other_restoring(callbacks)
        _refuse_to_validate_from_an_iterator(kwargs.get("validation_data"))
        steps_per_epoch, epochs = kwargs.get("steps_per_epoch"), kwargs.get("epochs", 1)
        batches = data.resumable(batches, shuffle, endless=steps_per_epoch is not None)
        settings = run_state.settings(model, steps_per_epoch, kwargs.get("class_weight"))
        checkpoint = self._newest(batches, settings)
        place = checkpoint.place if checkpoint else data.Place(epoch=kwargs.get("initial_epoch", 0))
        kwargs["initial_epoch"] = epochs if checkpoint and checkpoint.run["stopped"] else min(place.epoch, epochs)
        self.folder.open()
        run = ResumableCallbacks(
            self,
            checkpoint,
            place,
            batches,
            settings,
            callbacks,
            model=model,
            add_progbar=verbose != 0,
            verbose=verbose,
            epochs=epochs,
            steps=steps_per_epoch or getattr(batches, "num_batches", None),
        )
        self.in_use = True
        try:
            class_weight = kwargs.get("class_weight")
            rows = distribution.filled_up(batches, class_weight=class_weight, steps=steps_per_epoch)
            if hasattr(model, "token_rules"):
                rows = data.checked(rows, model.token_rules, class_weight=class_weight)
            history = in_whole_steps(keras.Model.fit)(
                model, rows, callbacks=run, shuffle=False, verbose=verbose, **kwargs
            )
            self.folder.wait()
            return history
        except NonFiniteLossError as error:
            self.folder.wait()
            raise error.naming(self.folder.last_good()) from error
        finally:
            self.in_use = False
            run.stop_skipping()
            self.folder.close()

    def _newest(self, batches, settings):
        step = self.folder.verify_latest()
        if step is None:
            return None
        path = self.folder.path / str(step)
        run, host = self.folder.read(step)
        run_state.refuse_foreign(path, run["identity"], settings)
        run_state.refuse_foreign(path, host["data"], _about(batches))
        checkpoint = Checkpoint(step, run, host)
        try:
            batches.restore(host["batches"], checkpoint.place)
        except ValueError as error:
            raise ForeignCheckpointError(f"The checkpoint {path} belongs to another run: {error}.") from error
        return checkpoint


@dataclasses.dataclass
class Checkpoint:
    """What was read from a checkpoint before the model is touched."""

    step: int
    run: dict
    host: dict

    @property
    def place(self):
        return data.Place(**self.run["place"])


class ResumableCallbacks(keras.callbacks.CallbackList):
    """Keras' list of callbacks, which knows where the run stands, and saves when all callbacks have had their turn.

    Keras counts the batches of an epoch from 0. Those that were trained before the crash it counts without drawing
    them: its train function is put aside for so long, and no callback hears of them.
    """

    def __init__(self, resume, checkpoint, place, batches, settings, callbacks, model, add_progbar, **params):
        self._resume = resume
        self._folder = resume.folder
        self._checkpoint = checkpoint
        self._place = place
        self._batches = batches
        self._settings = settings
        self._logs = None
        self._due = False
        self._saved_step = place.step if checkpoint else None
        self._saved_at = time.monotonic()
        self._train_function = None
        super().__init__(callbacks, add_history=True, add_progbar=add_progbar, model=model, **params)

    # === Going on ===

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._states = run_state.CallbackStates([c for c in self.callbacks if _has_own_state(c)])
        if self._checkpoint is None:
            return
        ours = run_state.identity(self.model, self._settings)
        run_state.refuse_foreign(self._folder.path / str(self._checkpoint.step), self._checkpoint.run["identity"], ours)
        if not self._place.batch:
            self._restore()

    def on_epoch_begin(self, epoch, logs=None):
        self._place = dataclasses.replace(self._place, epoch=epoch)
        self._batches.begin_epoch(self._place)
        super().on_epoch_begin(epoch, logs)
        if self._place.batch:
            # The epoch began before the crash: what callbacks just did at its beginning is undone.
            self._restore()
            self._skip()

    def _restore(self):
        run = self._checkpoint.run
        extra = {"callbacks": run_state.empty_arrays(run["callback_arrays"])}
        wanted = {**run_state.places_for_arrays(self.model), **extra}
        arrays = self._folder.read_variables(self._checkpoint.step, wanted)
        run_state.assign(self.model, arrays)
        self._states.restore(run["callbacks"], arrays["callbacks"])
        run_state.set_random_state(self._checkpoint.host["random"])

    def _skip(self):
        logs = self._checkpoint.run["logs"]
        self._train_function = self.model.train_function
        self.model.train_function = lambda state, iterator: (logs, state)

    @property
    def _is_skipping(self):
        return self._train_function is not None

    def on_train_batch_begin(self, batch, logs=None):
        if self._is_skipping and batch < self._place.batch:
            return
        self.stop_skipping()
        if self._due:
            self._save()
        super().on_train_batch_begin(batch, logs)

    def stop_skipping(self):
        """Puts the train function back."""
        if self._is_skipping:
            self.model.train_function, self._train_function = self._train_function, None

    # === Saving ===

    def on_train_batch_end(self, batch, logs=None):
        # Not by its number: that of a short execution lies behind the last batch that was trained.
        if self._is_skipping:
            return
        self._last = self._place.epoch, batch
        self._logs = logs
        trained = self._batches.batches_of_epoch(batch + 1)
        before, step = self._place.step, self._place.step + trained - self._place.batch
        self._place = dataclasses.replace(self._place, step=step, batch=trained)
        self._batches.trained(self._place)
        every = self._resume.save_every_steps
        self._due = (
            self._due
            or before // every < step // every
            or time.monotonic() - self._saved_at >= self._resume.save_every_seconds
        )
        super().on_train_batch_end(batch, logs)
        self._folder.check()

    def on_epoch_end(self, epoch, logs=None):
        self.stop_skipping()
        super().on_epoch_end(epoch, logs)
        self._place = data.Place(self._place.step, epoch + 1, 0)
        if self._due or epoch + 1 == self.params["epochs"] or self.model.stop_training:
            self._save()

    def _save(self):
        self._due = False
        self._saved_at = time.monotonic()
        if self._place.step == self._saved_step:
            return
        self._saved_step = self._place.step
        self._flush_futures()
        self._refuse_non_finite()
        arrays = self._states.arrays()
        run = {
            "identity": run_state.identity(self.model, self._settings),
            "versions": run_state.versions(),
            "place": dataclasses.asdict(self._place),
            "stopped": bool(self.model.stop_training),
            "logs": {name: float(value) for name, value in self._logs.items()},
            "callbacks": self._states.plain(),
            "callback_arrays": run_state.described_arrays(arrays),
        }
        host = {
            "data": _about(self._batches),
            "batches": self._batches.state(self._place),
            "random": run_state.random_state(),
        }
        self._folder.save(self._place.step, {**run_state.arrays_of(self.model), "callbacks": arrays}, run, host)
        if not self._resume.asynchronous:
            self._folder.wait()

    def _refuse_non_finite(self):
        loss = float(self._logs["loss"])
        if math.isfinite(loss) and run_state.all_finite(self.model):
            return
        what = "a weight" if math.isfinite(loss) else "the loss"
        raise NonFiniteLossError(f"{what} has become NaN or infinite by", self._place.step, *self._last)


def _about(batches):
    """What has to be equal of the data: a share of its own goes on with the same share alone."""
    is_own_share = distribution.is_own_share(batches)
    return {**batches.fingerprint(), "share": list(distribution.share_of_data()) if is_own_share else [0, 1]}


def _has_own_state(callback):
    return not isinstance(callback, (ExactResume, keras.callbacks.ProgbarLogger))


def _refuse_other_restoring(callbacks):
    if any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in keras.tree.flatten(callbacks)):
        raise ValueError(
            "`ExactResume` restores all that `BackupAndRestore` does, which would begin another epoch with other "
            "weights: leave `BackupAndRestore` out of `callbacks`. Received: both"
        )


def _refuse_to_validate_from_an_iterator(validation_data):
    if data.is_iterator(validation_data):
        raise ValueError(
            "An exact resume needs `validation_data` that begin anew each time, not an iterator, whose place is lost: "
            "lists or arrays of examples, a `keras.utils.PyDataset`, a `tf.data.Dataset` or a Grain data set. "
            f"Received: {type(validation_data).__name__}"
        )


def exact_resume_among(callbacks):
    """The `ExactResume` in a list of callbacks, or `None`.

    Raises:
        ValueError: if there are two.
    """
    found = [callback for callback in keras.tree.flatten(callbacks) if isinstance(callback, ExactResume)]
    if len(found) > 1:
        raise ValueError(f"One `ExactResume` belongs to a run. Received: {len(found)} of them")
    return found[0] if found else None
