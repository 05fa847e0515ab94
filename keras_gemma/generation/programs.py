"""Functions compiled by the backend at hand."""

import keras


class Program:
    """A function of tensors, compiled once for each set of shapes.

    Args:
        function: a pure function of trees of tensors.
        donated: positions of arguments whose memory the result may take over. Where the backend knows donation,
            the caller must not use them again.

    Attributes:
        compilations: int, how many sets of shapes were compiled (on torch: how many calls were made).
    """

    def __init__(self, function, donated=()):
        self.compilations = 0

        def traced(*args):
            self.compilations += 1
            return function(*args)

        self._call = _compiled(traced, donated)

    def __call__(self, *args):
        return self._call(*args)


def _compiled(function, donated):
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function, donate_argnums=donated)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True, autograph=False)
    if backend == "torch":
        import torch

        return torch.no_grad()(function)
    return function
