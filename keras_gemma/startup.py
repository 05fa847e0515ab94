"""What has to be settled before Keras is imported: its backend, and the silence of TensorFlow."""

import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

# Keras writes this into its configuration file at its first import, so the file alone is nobody's choice.
WRITTEN_BY_KERAS = "tensorflow"

# TensorFlow prints these before it can be told not to, on every machine without a GPU.
TENSORFLOW_NOISE = re.compile(
    rb"All log messages before absl|cuda|TensorRT|cpu_feature_guard|oneDNN|To enable the following instructions",
    re.IGNORECASE,
)


def default_to_jax():
    """Makes JAX the backend of Keras unless the user chose one.

    A choice is the environment variable `KERAS_BACKEND`, or another backend than TensorFlow in Keras' configuration
    file (which names TensorFlow when nobody touched it). Once Keras runs it is too late, which is warned of.
    """
    if "KERAS_BACKEND" in os.environ or _configured_backend() != WRITTEN_BY_KERAS:
        return
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "jax"
    elif _running_backend() == WRITTEN_BY_KERAS:
        warnings.warn(
            "keras was imported before keras_gemma and runs on TensorFlow, although no backend was chosen. To run on "
            "JAX, set KERAS_BACKEND=jax before Python starts, or import keras_gemma before keras. To stay on "
            "TensorFlow without this warning, set KERAS_BACKEND=tensorflow.",
            stacklevel=3,  # the line that imports keras_gemma
        )


def _running_backend():
    config = getattr(sys.modules["keras"], "config", None)
    return config.backend() if config else None


def require_jax(what):
    """Refuses to go on where another backend runs.

    Args:
        what: string, the public name that a user called.

    Raises:
        ValueError: on TensorFlow and PyTorch.
    """
    import keras

    if keras.config.backend() != "jax":
        raise ValueError(
            f"{what} needs JAX: set KERAS_BACKEND=jax before Python starts, or import keras_gemma before keras. "
            f"Received: the backend {keras.config.backend()}"
        )


def _configured_backend():
    folder = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()
    try:
        return json.loads((folder / "keras.json").read_text())["backend"]
    except (OSError, ValueError, KeyError):
        return WRITTEN_BY_KERAS


def leave_out_tensorflow():
    """Keeps TensorFlow out of this process, unless it is the backend.

    keras-hub imports TensorFlow wherever it is installed. Without it a program starts in half the time and half the
    memory, and has no `tf.data`.
    """
    if os.environ.get("KERAS_BACKEND") == "tensorflow":
        return
    for package in ("tensorflow", "tensorflow_text"):
        # Python takes None for "cannot be imported".
        sys.modules.setdefault(package, None)


def silence_libraries():
    """Leaves the standard error to the program itself, for those whose user did not write it. Errors still show."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def import_keras_hub_quietly():
    """Imports keras-hub without the lines that TensorFlow writes to the standard error on the way."""
    on_tensorflow = os.environ.get("KERAS_BACKEND") == "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if on_tensorflow else "3")
    if "keras_hub" not in sys.modules:
        with _without_lines(TENSORFLOW_NOISE):
            import keras_hub  # noqa: F401


@contextlib.contextmanager
def _without_lines(noise):
    """Holds back what any library writes to the standard error, and hands on the lines that do not match."""
    try:
        sys.stderr.flush()
        stderr = os.dup(2)
    except (AttributeError, OSError, ValueError):  # a process without a standard error
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            held.seek(0)
            os.write(stderr, b"".join(line for line in held if not noise.search(line)))
            os.close(stderr)
