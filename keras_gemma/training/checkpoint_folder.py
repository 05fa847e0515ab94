"""One folder of checkpoints, written by Orbax, with digests of every file.

    run/checkpoints/
      1200/                      a checkpoint, named after the steps trained; under another name until it is complete
        variables/               arrays (Orbax, OCDBT)
        run/run.json             what the checkpoint belongs to, where the run stands, its history
        hosts/process_0.json     per process: random generators, place in the data
        digests.json             SHA-256 of every other file, written last

Orbax checks the sums of some of its files only, so the digests are compared before anything is read.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import secrets
import threading

import jax
import numpy as np

from keras_gemma.locking import locked
from keras_gemma.training.errors import CheckpointNotSavedError
from keras_gemma.training.errors import DamagedCheckpointError

DIGESTS = "digests.json"
# Orbax writes the time of the end into these, after the digests are taken.
WRITTEN_LATER = ("commit_success.txt", "_CHECKPOINT_METADATA")
LOCK_FILE = ".checkpoints.lock"

# Who of this process writes to a folder: by its path, the thread and what releases the lock.
_writers = {}


class CheckpointFolder:
    """Checkpoints of one run.

    Args:
        directory: path, on a file system that all processes share.
        keep: int. How many of the newest checkpoints stay.
    """

    def __init__(self, directory, keep):
        self._orbax = _import_orbax()
        from etils import epath

        self.path = epath.Path(os.path.abspath(directory) if "://" not in str(directory) else directory)
        self._keep = keep
        self._manager = None
        self._being_saved = None
        self._held = None

    def steps(self):
        """Steps of the complete checkpoints, damaged or not, the oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.path.iterdir() if entry.name.isdigit())

    def last_good(self):
        """Path of the newest complete checkpoint, or `None`."""
        steps = self.steps()
        return self.path / str(steps[-1]) if steps else None

    def verify_latest(self):
        """Compares every file of the newest checkpoint with its digest.

        Returns:
            Its step, or `None` where there is no checkpoint.

        Raises:
            ValueError: where processes do not see one folder.
            DamagedCheckpointError: naming the folder, the files and the newest checkpoint that is whole.
        """
        self._refuse_separate_folders()
        steps = self.steps()
        if not steps:
            return None
        latest = steps.pop()
        damage = _damage_seen_anywhere(self.path / str(latest))
        if not damage:
            return latest
        while steps and _damage_seen_anywhere(self.path / str(steps[-1])):
            steps.pop()
        raise DamagedCheckpointError(
            f"The checkpoint {self.path / str(latest)} is damaged: {damage}. "
            + (
                f"The checkpoint of step {steps[-1]} is whole: remove {_and_newer(self.steps(), steps[-1])} from "
                f"{self.path} to go on from there."
                if steps
                else f"No other checkpoint in {self.path} is whole: choose another folder, or empty it, to begin anew."
            )
        )

    def _refuse_separate_folders(self):
        if jax.process_count() == 1:
            return
        from jax.experimental import multihost_utils

        name = f"seen_by_all_{multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))}"
        is_first = jax.process_index() == 0
        if is_first:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_text("")
        multihost_utils.sync_global_devices(name)
        seen = multihost_utils.process_allgather(np.array((self.path / name).exists()))
        if is_first:
            (self.path / name).unlink()
        if not seen.all():
            raise ValueError(
                f"All processes see one folder. Received: {self.path}, which process {int(np.argmin(seen))} does not "
                "share with process 0"
            )

    def open(self):
        """Removes what an interrupted save left behind, and gets ready to write.

        Raises:
            InUseError: if another run writes to the folder.
        """
        self._lock()
        orbax = self._orbax
        by_each_process = orbax.JsonCheckpointHandler(
            f"process_{jax.process_index()}.json",
            multiprocessing_options=orbax.options.MultiprocessingOptions(primary_host=None),
        )
        self._manager = orbax.CheckpointManager(
            self.path,
            options=orbax.CheckpointManagerOptions(
                max_to_keep=self._keep,
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                async_options=orbax.AsyncOptions(post_finalization_callback=self._write_digests),
            ),
            item_handlers={
                "variables": orbax.StandardCheckpointHandler(),
                "run": orbax.JsonCheckpointHandler(filename="run.json"),
                "hosts": by_each_process,
            },
        )

    def save(self, step, variables, run, host):
        """Copies the arrays and writes them in the background.

        Args:
            step: int, larger than that of every checkpoint here.
            variables: dict of arrays, each whole or spread over devices and processes.
            run: what json can write, equal on all processes.
            host: what json can write, of this process.

        Raises:
            CheckpointNotSavedError: if this checkpoint or the one before could not be written.
        """
        self.wait()
        self._being_saved = step
        save = self._orbax.args
        items = {"variables": save.StandardSave(variables), "run": save.JsonSave(run), "hosts": save.JsonSave(host)}
        with _naming_errors(self):
            self._manager.save(step, args=save.Composite(**items), force=True)

    def check(self):
        """Raises what went wrong in the background, without waiting."""
        if self._being_saved is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self):
        """Waits for the background, and raises what went wrong there."""
        with _naming_errors(self):
            self._manager.wait_until_finished()
        self._being_saved = None

    def not_saved(self, error):
        """The error that a user reads, from the one that a library raised."""
        step, self._being_saved = self._being_saved, None
        if jax.process_index() == 0:
            self._remove_half_written(step)
        good = self.last_good()
        return CheckpointNotSavedError(
            f"The checkpoint of step {step} could not be written to {self.path}{_reason(error)}. "
            + (f"The last good checkpoint is {good}" if good else "There is no earlier checkpoint")
            + ": make room or choose another folder, then start `fit` again to go on from there."
        )

    def _remove_half_written(self, step):
        for path in self.path.glob(f"{step}.orbax-checkpoint-tmp*"):
            with contextlib.suppress(OSError):
                path.rmtree()

    def read(self, step):
        """What `save` was given as `run` and, by this process, as `host`; by the first if there were fewer."""
        folder = self.path / str(step)
        run = json.loads((folder / "run" / "run.json").read_text())
        own = folder / "hosts" / f"process_{jax.process_index()}.json"
        host = own if own.exists() else folder / "hosts" / "process_0.json"
        return run, json.loads(host.read_text())

    def read_variables(self, step, like):
        """The arrays of a checkpoint.

        Args:
            step: int.
            like: dict of arrays with the shapes, dtypes and shardings that are wanted.

        Returns:
            A dict of arrays.
        """
        wanted = jax.tree.map(self._orbax.utils.to_shape_dtype_struct, like)
        # For those without a sharding, where they were saved on more devices than there are.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        restore = self._orbax.args
        variables = restore.StandardRestore(wanted, fallback_sharding=here)
        arrays = self._manager.restore(step, args=restore.Composite(variables=variables)).variables
        return jax.tree.map(_as_numpy_where_wanted, like, arrays)

    def close(self):
        if self._manager is not None:
            self._manager.close()
        self._unlock()

    def _lock(self):
        # Object stores have no locks.
        if jax.process_index() > 0 or "://" in str(self.path):
            return
        path, thread = str(self.path), threading.get_ident()
        # A thread has one run at a time: an earlier one, which could not close its folder, is over.
        if path in _writers and _writers[path][0] == thread:
            _writers.pop(path)[1].close()
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(os.path.join(path, LOCK_FILE), path))
            self._held = stack.pop_all()
            _writers[path] = thread, self._held

    def _unlock(self):
        writer = _writers.get(str(self.path))
        if writer and writer[1] is self._held:
            _writers.pop(str(self.path))[1].close()

    def _write_digests(self):
        # Between the last file and the renaming, on the first process, when all have written.
        final = self.path / str(self._being_saved)
        # Object stores cannot rename: there Orbax writes to the final place and marks it as complete.
        unfinished = next(iter(self.path.glob(f"{final.name}.orbax-checkpoint-tmp*")), final)
        (unfinished / DIGESTS).write_text(json.dumps(_digests(unfinished)))


def _as_numpy_where_wanted(like, array):
    return np.asarray(array) if isinstance(like, np.ndarray) else array


@contextlib.contextmanager
def _naming_errors(folder):
    """Raises errors of Orbax, tensorstore and the file system under one name."""
    try:
        yield
    except Exception as error:
        raise folder.not_saved(error) from error


def _reason(error):
    text = f"{type(error).__name__}: {error}"
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
    return f", because the disk is full ({text.splitlines()[0]})" if full else f": {text}"


def _and_newer(steps, whole):
    return ", ".join(str(step) for step in steps if step > whole)


def _damage_seen_anywhere(folder):
    """What is wrong with a checkpoint, or `None`; the same on all processes, each of which reads a part of it."""
    mine = _damage(folder, jax.process_index(), jax.process_count())
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    seen = multihost_utils.process_allgather(np.array(mine is not None))
    return (mine or f"process {int(np.argmax(seen))} found a damaged file") if seen.any() else None


def _damage(folder, part=0, parts=1):
    try:
        expected = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError):
        return f"{DIGESTS} is missing or unreadable (or it was not written by ExactResume)"
    names = sorted(expected)[part::parts]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        return f"missing {', '.join(missing)}"
    found = _digests(folder, names)
    changed = [name for name in names if found[name] != expected[name]]
    return f"{', '.join(changed)} changed since it was written" if changed else None


def _digests(folder, names=None):
    if names is None:
        names = [str((parent / name).relative_to(folder)) for parent, _, files in folder.walk() for name in files]
    names = [name for name in names if name.split("/")[-1] not in WRITTEN_LATER]
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names)))


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _import_orbax():
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError('Checkpoints are written by Orbax: pip install "keras_gemma[train]"') from error
    return orbax.checkpoint
