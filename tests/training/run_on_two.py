"""One of two processes that train together: `python run_on_two.py FOLDER PORT PROCESS LAST_STEP`.

Each has its own half of the rows. Appends what was trained to FOLDER/losses_PROCESS.txt, and is gone without a word
after LAST_STEP.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from keras_gemma import startup

if __name__ == "__main__":
    startup.leave_out_tensorflow()

import jax
import keras
import numpy as np

from keras_gemma import data
from keras_gemma import training


class Steps(keras.callbacks.Callback):
    def __init__(self, path, last_step):
        super().__init__()
        self._path = path
        # An iterator, because numbers of callbacks go on with the run.
        self._left = iter(range(last_step - 1)) if last_step else None

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        with self._path.open("a") as file:
            file.write(f"{self._epoch} {batch} {logs['loss'].hex()}\n")
        if self._left is not None and next(self._left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, port, process, last_step):
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dropout(0.2), keras.layers.Dense(1)])
    model.compile(optimizer="adam", loss="mse")
    rows = np.random.default_rng(process).normal(size=(12, 3)).astype("float32")
    batches = data.preprocessed(rows, rows.sum(axis=1), None, 2, lambda *parts: parts, shuffle=True)
    exact_resume = training.ExactResume(folder / "checkpoints", save_every_steps=2)
    steps = Steps(folder / f"losses_{process}.txt", last_step)
    exact_resume.fit(model, batches, callbacks=[steps], epochs=2, verbose=0)
    np.savez(folder / f"weights_{process}.npz", *[np.asarray(variable.value) for variable in model.variables])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
