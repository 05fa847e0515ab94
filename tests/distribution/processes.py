"""Checks on several processes. `conftest.py` runs `python processes.py FOLDER PORT COUNT PROCESS CHECK...` in each.

Several checks share a run: starting the processes takes longer than most checks. What they compare with is computed
in each process alone, on one device.
"""

import contextlib
import sys
from pathlib import Path

from keras_gemma import startup

if __name__ == "__main__":
    startup.leave_out_tensorflow()

import jax
import keras
import numpy as np
from eight_devices import LENGTH
from eight_devices import build
from eight_devices import examples
from eight_devices import generated
from eight_devices import pods
from eight_devices import trained

from keras_gemma import distribution


def run(shape):
    model = build(shape, num_layers=2, scan_layers=True)
    history = trained(model)
    return history, [distribution.whole(weight) for weight in model.weights], generated(model)


def train_and_generate(folder, shape, *meshes):
    history, weights, tokens = run(shape)
    for mesh in meshes:
        with pods(*mesh).scope():
            received, weights_received, tokens_received = run(shape)
        for name in history:
            np.testing.assert_allclose(received[name], history[name], rtol=1e-5, err_msg=f"{name} on {mesh}")
        for weight, expected in zip(weights_received, weights):
            np.testing.assert_allclose(weight, expected, atol=1e-5, err_msg=str(mesh))
        np.testing.assert_array_equal(tokens_received, tokens, err_msg=str(mesh))


def four_devices_train_and_generate_as_one_does(folder):
    train_and_generate(folder, "2b", (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4))


if __name__ == "__main__":
    folder, port, count, process = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    assert distribution.initialize(f"127.0.0.1:{port}", count, process) == (process, count)
    import time
    for name in sys.argv[5:]:
        t=time.time()
        globals()[name](folder)
        print(name, time.time()-t, flush=True)
