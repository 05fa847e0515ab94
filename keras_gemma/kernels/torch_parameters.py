"""Weights as PyTorch lists them."""

from keras_gemma.kernels.platform import on_torch


def with_torch_parameters(cls):
    """Decorates a Keras model so that on torch `parameters()` has its weights, which keras-hub's models leave out.

    PyTorch's optimizers and Keras' trainer, which clears gradients by it, then find them.
    """
    if on_torch():
        cls.named_parameters = _named_parameters
    return cls


def _named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
    """Yields the path and the parameter of every weight."""
    for weight in self.weights if recurse else ():
        yield f"{prefix}.{weight.path}" if prefix else weight.path, weight.value
