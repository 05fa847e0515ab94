"""A short run for a test that kills it: `python run.py FOLDER STEP`, killed before a step unless that is -1."""

import os
import signal
import sys

from keras_gemma import startup

if __name__ == "__main__":
    startup.leave_out_tensorflow()

import keras
import numpy as np

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor
from keras_gemma.rlhf import ReinforceTrainer


def lengths(prompts, texts):
    return [len(text) for text in texts]


class Kill(keras.callbacks.Callback):
    """Ends its own process as the system does when memory is short."""

    def __init__(self, trainer, step):
        super().__init__()
        self.trainer = trainer
        self.step = step

    def on_train_batch_begin(self, batch, logs=None):
        if self.trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(checkpoints=None, killed_before=-1):
    """What the run ends with, a dict of arrays."""
    keras.utils.set_random_seed(0)
    backbone = GemmaBackbone(
        vocabulary_size=4096, num_layers=1, num_query_heads=2, num_key_value_heads=1, hidden_dim=8,
        intermediate_dim=16, head_dim=4,
    )  # fmt: skip
    policy = GemmaCausalLM(backbone, GemmaCausalLMPreprocessor.from_preset("gemma_tiny_en", sequence_length=16))
    policy.compile(keras.optimizers.Adam(1e-2))
    trainer = ReinforceTrainer(policy, lengths, max_new_tokens=4)
    history = trainer.fit(
        ["The sea", "At noon", "In the"], batch_size=1, epochs=2, verbose=0, callbacks=[Kill(trainer, killed_before)],
        checkpoints=checkpoints, save_every_steps=1,
    )  # fmt: skip
    variables = policy.variables + policy.optimizer.variables
    values = {f"{i} {variable.path}": np.array(variable) for i, variable in enumerate(variables)}
    return {**values, "kl": history.history["kl"], "samples": np.array(str(trainer.samples))}


if __name__ == "__main__":
    end = run(f"{sys.argv[1]}/checkpoints", int(sys.argv[2]))
    np.savez(f"{sys.argv[1]}/end.npz", *end.values())
