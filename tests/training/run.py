"""Short training runs, each in a process of its own, for tests that kill them.

Reads `FOLDER FORM` (of `DATA`) from the standard input, one run a line, forks, and prints the child's process id, then
its exit status. Imports are made once, before any fork. A run writes the loss after each step to FOLDER/losses.txt
(epoch, batch, loss in hexadecimal), checkpoints to FOLDER/checkpoints, and at its end FOLDER/weights.npz and
FOLDER/history.json.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from keras_gemma import startup

if __name__ == "__main__":
    startup.leave_out_tensorflow()
    startup.silence_libraries()

import keras
import numpy as np

from keras_gemma import data
from keras_gemma import training
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor

VOCABULARY = 64
LENGTH = 8
BATCH = 4
EXAMPLES = 32
TEXTS = [f"{'the sea was calm ' * (n % 3)}on day {n}" for n in range(3 * EXAMPLES)]
EPOCHS = 3


def make_model(dropout=0.1, seed=1, preprocessor=None):
    keras.utils.set_random_seed(seed)
    vocabulary_size = preprocessor.tokenizer.vocabulary_size() if preprocessor else VOCABULARY
    backbone = GemmaBackbone(
        vocabulary_size=vocabulary_size, num_layers=2, num_query_heads=2, num_key_value_heads=1,
        hidden_dim=16, intermediate_dim=32, head_dim=8, dropout=dropout,
    )  # fmt: skip
    model = GemmaCausalLM(backbone, preprocessor)
    model.compile(optimizer=keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(1e-2, 40)))
    return model


def examples(count=EXAMPLES):
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (count, LENGTH + 1))
    inputs = {"token_ids": ids[:, :-1], "padding_mask": np.ones((count, LENGTH), "int32")}
    return inputs, ids[:, 1:]


def make_preprocessor():
    return GemmaCausalLMPreprocessor.from_preset("gemma_tiny_en", sequence_length=2 * LENGTH)


def arrays(preprocessor):
    x, y = examples()
    return {"x": x, "y": y, "batch_size": BATCH, "shuffle": True}


def grain_batches(preprocessor):
    import grain

    inputs, labels = examples()

    def batch(rows):
        return {name: value[rows] for name, value in inputs.items()}, labels[rows]

    rows = grain.MapDataset.range(EXAMPLES).seed(5).shuffle().repeat().to_iter_dataset().batch(BATCH)
    return {"x": rows.map(batch), "steps_per_epoch": 8}


def packed_texts(preprocessor):
    return {"x": TEXTS, "pack": True, "batch_size": BATCH}


def mixture(preprocessor):
    """Two sources, tokenised on the fly, whose shares change in the second epoch."""
    import grain

    sources = {"all": grain.MapDataset.source(TEXTS), "some": grain.MapDataset.source(TEXTS[:9])}
    stages = [data.Stage({"all": 3, "some": 1}, examples=80), data.Stage({"some": 1})]
    batches = data.training_batches(data.mixture(sources, stages, seed=1), preprocessor, BATCH, window=6)
    return {"x": batches, "steps_per_epoch": 8}


DATA = {"arrays": arrays, "grain": grain_batches, "packed": packed_texts, "mixture": mixture}
OF_TEXT = ("packed", "mixture")


class Losses(keras.callbacks.Callback):
    """Writes what Keras reports after each step: the mean loss over the epoch up to there."""

    def __init__(self, path, seconds_per_step):
        super().__init__()
        self._file = path.open("a")
        self._seconds_per_step = seconds_per_step

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self._file.write(f"{self._epoch} {batch} {logs['loss'].hex()}\n")
        self._file.flush()
        time.sleep(self._seconds_per_step)


def train(folder, form="arrays", seconds_per_step=0.0, epochs=EPOCHS, **settings):
    preprocessor = make_preprocessor() if form in OF_TEXT else None
    model = make_model(preprocessor=preprocessor)
    resume = training.ExactResume(folder / "checkpoints", **{"save_every_steps": 3, **settings})
    losses = Losses(folder / "losses.txt", seconds_per_step)
    history = model.fit(**DATA[form](preprocessor), epochs=epochs, verbose=0, callbacks=[losses, resume])
    return model, history


def run(folder, form):
    model, history = train(folder, form, seconds_per_step=0.02)
    (folder / "history.json").write_text(json.dumps({"epoch": history.epoch, **history.history}))
    np.savez(folder / "weights.npz", *[np.asarray(variable.value) for variable in model.variables])


def main():
    for line in sys.stdin:
        folder, form = line.split()
        child = os.fork()
        if not child:
            run(Path(folder), form)
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
