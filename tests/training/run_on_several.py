"""One of several processes that train a small Gemma.

    python run_on_several.py FOLDER PORT COUNT PROCESS LAST_STEP HEARTBEAT

All of them train their rows of the same batches, save to FOLDER/checkpoints and append the losses to
FOLDER/losses_PROCESS.txt. The process is gone without a word after LAST_STEP, if that is not 0, which the others
have to notice in HEARTBEAT seconds. At the end it writes its weights to FOLDER/weights_PROCESS.npz.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from keras_gemma import startup

if __name__ == "__main__":
    startup.leave_out_tensorflow()

import keras
import numpy as np

from keras_gemma import distribution
from keras_gemma import training
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM


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


def main(folder, port, count, process, last_step, heartbeat):
    distribution.initialize(f"127.0.0.1:{port}", count, process, heartbeat_timeout_seconds=heartbeat)
    keras.distribution.set_distribution(distribution.local_data())
    keras.utils.set_random_seed(1)
    backbone = GemmaBackbone(
        vocabulary_size=64, num_layers=1, num_query_heads=2, num_key_value_heads=1, hidden_dim=8, intermediate_dim=16,
        head_dim=4, dropout=0.1,
    )  # fmt: skip
    model = GemmaCausalLM(backbone)
    model.compile(training.AdamW(1e-2))
    ids = np.random.default_rng(0).integers(1, 64, (14, 9))
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((14, 8), "int32")}
    resume = training.ExactResume(folder / "checkpoints", save_every_steps=2)
    steps = Steps(folder / f"losses_{process}.txt", last_step)
    model.fit(x, ids[:, 1:], batch_size=4, epochs=2, verbose=0, callbacks=[steps, resume])
    np.savez(folder / f"weights_{process}.npz", *[distribution.whole(weight) for weight in model.weights])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
