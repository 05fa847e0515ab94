"""What a preprocessor returns: tensors of the backend to users, NumPy arrays to pipelines of data."""

import contextlib
import sys
import threading

import keras
from keras.src.utils.backend_utils import in_grain_data_pipeline

_LOCAL = threading.local()


@contextlib.contextmanager
def numpy_outputs():
    """Within, preprocessors called by this thread return NumPy arrays: batches wait for their step on the host."""
    before = getattr(_LOCAL, "numpy", False)
    _LOCAL.numpy = True
    try:
        yield
    finally:
        _LOCAL.numpy = before


def as_outputs(batch):
    """A tree of NumPy arrays as what a preprocessor returns here."""
    if getattr(_LOCAL, "numpy", False) or in_grain_data_pipeline():
        return batch
    return keras.tree.map_structure(keras.ops.convert_to_tensor, batch)


def in_tf_graph():
    """Whether a function of TensorFlow is being traced, as by `tf.data`."""
    tf = sys.modules.get("tensorflow")
    return tf is not None and hasattr(tf, "executing_eagerly") and not tf.executing_eagerly()
