"""One training step with the same batch in 1, 2 and 4 processes on one machine, each with one device.

On as many cores as there are processes the ratio would be near to 1 / processes; beyond that it says what talking to
each other costs. The counts take turns, so that a machine that slows down slows all of them.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import local_processes

COUNTS = (1, 2, 4)
MODEL = {
    "vocabulary_size": 8000,
    "num_layers": 4,
    "num_query_heads": 4,
    "num_key_value_heads": 1,
    "hidden_dim": 256,
    "intermediate_dim": 2048,
    "head_dim": 64,
}
ROWS, LENGTH = 8, 256
STEPS = 5
# For all processes of one measurement together.
SECONDS = 900
CASE = f"V 8000, 4 layers, D 256, batch {ROWS} x {LENGTH}"


def run(repeats):
    """Measures every number of processes `repeats` times.

    Returns:
        A list of dicts with `case`, `processes`, `cores` of the machine, `step_seconds` (the median) and `ratio`, to
        the step of one process.
    """
    seconds = {count: [] for count in COUNTS}
    for _ in range(repeats):
        for count in COUNTS:
            seconds[count].append(_seconds_with(count))
    medians = {count: statistics.median(measured) for count, measured in seconds.items()}
    return [
        {
            "case": CASE,
            "processes": count,
            "cores": os.cpu_count(),
            "step_seconds": medians[count],
            "ratio": medians[count] / medians[1],
        }
        for count in COUNTS
    ]


def _seconds_with(count):
    with tempfile.TemporaryDirectory() as folder:
        statuses, output = local_processes.run(count, __file__, Path(folder), seconds=SECONDS, TF_CPP_MIN_LOG_LEVEL="3")
        if any(statuses):
            raise RuntimeError(f"one of {count} processes failed:\n{output[-2000:]}")
        return json.loads((Path(folder) / "process_0.log").read_text().splitlines()[-1])


class Clock:
    """Seconds of a step, over `STEPS` of them after one that compiles."""

    def __init__(self, keras):
        self.callback = keras.callbacks.LambdaCallback(on_train_batch_end=self._tick)
        self._ticks = []

    def _tick(self, batch, logs):
        # Without the value the step might still be running.
        float(logs["loss"])
        self._ticks.append(time.perf_counter())

    @property
    def seconds(self):
        return (self._ticks[-1] - self._ticks[0]) / (len(self._ticks) - 1)


def measure(port, count, process):
    """Seconds of a step, in this process of several."""
    from keras_gemma import startup

    startup.leave_out_tensorflow()

    import keras
    import numpy as np

    from keras_gemma import distribution
    from keras_gemma.models import GemmaBackbone
    from keras_gemma.models import GemmaCausalLM

    distribution.initialize(f"127.0.0.1:{port}", count, process)
    keras.distribution.set_distribution(distribution.local_data())
    model = GemmaCausalLM(GemmaBackbone(**MODEL))
    model.compile(optimizer=keras.optimizers.AdamW(1e-4))
    ids = np.random.default_rng(0).integers(5, MODEL["vocabulary_size"], (ROWS, LENGTH + 1)).astype("int32")
    batch = {"token_ids": ids[:, :-1], "padding_mask": np.ones((ROWS, LENGTH), "int32")}, ids[:, 1:]
    clock = Clock(keras)
    batches = (batch for _ in range(STEPS + 1))
    model.fit(batches, steps_per_epoch=STEPS + 1, verbose=0, callbacks=[clock.callback])
    return clock.seconds


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
