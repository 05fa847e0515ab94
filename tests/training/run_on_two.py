"""One of two processes that train together: `python run_on_two.py FOLDER PORT PROCESS LAST_STEP`.

Each has its own half of the rows. Appends what was trained to FOLDER/losses_PROCESS.txt, and is gone without a word
after LAST_STEP.
"""

import os
import signal
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

from keras_gemma import startup

startup.leave_out_tensorflow()

import jax  # noqa: E402

folder, port, process, last_step = Path(sys.argv[1]), *map(int, sys.argv[2:])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)

import keras  # noqa: E402
import numpy as np  # noqa: E402

from keras_gemma import data  # noqa: E402
from keras_gemma import training  # noqa: E402

keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((3,)), keras.layers.Dropout(0.2), keras.layers.Dense(1)])
model.compile(optimizer="adam", loss="mse")

rows = np.random.default_rng(process).normal(size=(12, 3)).astype("float32")
batches = data.preprocessed(rows, rows.sum(axis=1), None, 2, lambda x, y, weight: (x, y, weight), shuffle=True)


class Steps(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        # An iterator, because numbers of callbacks go on with the run.
        self._left = iter(range(last_step - 1))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        with (folder / f"losses_{process}.txt").open("a") as file:
            file.write(f"{self._epoch} {batch} {logs['loss'].hex()}\n")
        if last_step and next(self._left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)


exact_resume = training.ExactResume(folder / "checkpoints", save_every_steps=2)
exact_resume.fit(model, batches, callbacks=[Steps()], epochs=2, verbose=0)
np.savez(folder / f"weights_{process}.npz", *[np.asarray(variable.value) for variable in model.variables])
