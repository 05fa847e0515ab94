"""One of several processes that train a small Gemma.

    python run_on_several.py PORT COUNT PROCESS FOLDER VICTIM HEARTBEAT OWN_SHARES SAVE_EVERY

All of them train their rows of the same batches, or with OWN_SHARES 1 all rows of batches that they alone have, save to
FOLDER/checkpoints every SAVE_EVERY steps and append the losses to FOLDER/losses_PROCESS.txt. The victim is gone without
a word after some steps, which the others have to notice in HEARTBEAT seconds. At the end each writes its weights to
FOLDER/weights_PROCESS.npz.
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

# Of the victim, in each of its runs.
STEPS_TO_LIVE = 3


class Steps(keras.callbacks.Callback):
    def __init__(self, path, is_victim):
        super().__init__()
        self._path = path
        # An iterator, because numbers of callbacks go on with the run.
        self._left = iter(range(STEPS_TO_LIVE - 1)) if is_victim else None

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        with self._path.open("a") as file:
            file.write(f"{self._epoch} {batch} {logs['loss'].hex()}\n")
        if self._left is not None and next(self._left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)


def main(port, count, process, folder, victim, heartbeat, own_shares, save_every):
    distribution.initialize(f"127.0.0.1:{port}", count, process, heartbeat_timeout_seconds=heartbeat)
    everywhere = keras.distribution.DataParallel(auto_shard_dataset=False) if own_shares else distribution.local_data()
    keras.distribution.set_distribution(everywhere)
    keras.utils.set_random_seed(1)
    backbone = GemmaBackbone(
        vocabulary_size=64, num_layers=1, num_query_heads=2, num_key_value_heads=1, hidden_dim=8, intermediate_dim=16,
        head_dim=4, dropout=0.1,
    )  # fmt: skip
    model = GemmaCausalLM(backbone)
    model.compile(training.AdamW(1e-2))
    ids = np.random.default_rng(process if own_shares else 0).integers(1, 64, (14, 9))
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((14, 8), "int32")}
    resume = training.ExactResume(folder / "checkpoints", save_every_steps=save_every)
    steps = Steps(folder / f"losses_{process}.txt", process == victim)
    model.fit(x, ids[:, 1:], batch_size=4, epochs=2, verbose=0, callbacks=[steps, resume])
    np.savez(folder / f"weights_{process}.npz", *[distribution.whole(weight) for weight in model.weights])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]), *map(int, sys.argv[5:]))
