"""One of several processes of which one stops in its own way: `python stopped.py PORT COUNT PROCESS VICTIM HOW`.

The others wait for it in a collective; the victim is killed, frozen, or raises an error.
"""

import os
import signal
import sys

from keras_gemma import startup

if __name__ == "__main__":
    startup.leave_out_tensorflow()

import numpy as np
from jax.experimental import multihost_utils

from keras_gemma import distribution


def frozen():
    os.kill(os.getpid(), signal.SIGSTOP)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def failed():
    raise RuntimeError("the victim's own error")


if __name__ == "__main__":
    port, count, process, victim = map(int, sys.argv[1:5])
    distribution.initialize(f"127.0.0.1:{port}", count, process)
    multihost_utils.process_allgather(np.array(process))
    print("met", flush=True)
    if process == victim:
        globals()[sys.argv[5]]()
    multihost_utils.process_allgather(np.array(process))
    print("went on", flush=True)
