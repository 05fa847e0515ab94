"""Gradients on every backend, for parity tests."""

import keras
import numpy as np


def value_and_gradients(function, *inputs):
    """The value of a scalar function and its gradients for its inputs, as NumPy arrays."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        value, gradients = jax.jit(jax.value_and_grad(function, tuple(range(len(inputs)))))(*inputs)
    elif backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = function(*inputs)
        gradients = tape.gradient(value, inputs)
    else:
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        value = function(*inputs)
        value.backward()
        gradients = [x.grad for x in inputs]
    return float(_to_numpy(value)), [_to_numpy(gradient) for gradient in gradients]


def _to_numpy(x):
    return np.asarray(keras.ops.convert_to_numpy(x))
