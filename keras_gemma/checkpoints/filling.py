"""A backbone without values, then each variable's value from a file: never random first, never twice in memory."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import keras
import ml_dtypes
import numpy as np
from keras.src.backend.common import global_state

from keras_gemma.checkpoints.canonical import listed

UNINITIALIZED = "uninitialized_variables"


@dataclass(frozen=True)
class Wanted:
    """A variable, and where a file format keeps its value.

    Attributes:
        variable: a `keras.Variable`.
        name: name of the tensor in the file.
        shape: tuple of ints, its shape in the file.
        convert: callable from the array of the file to the array of the variable.
    """

    variable: keras.Variable
    name: str
    shape: tuple
    convert: Callable


@contextlib.contextmanager
def without_values():
    """Scope in which layers create their variables without giving them a value."""
    before = global_state.get_global_attribute(UNINITIALIZED)
    global_state.set_global_attribute(UNINITIALIZED, [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Else the next scope of anybody's would initialise our variables at random.
        global_state.set_global_attribute(UNINITIALIZED, before or [])


def resolve_policies(model):
    """Gives every layer its own dtype policy out of the map of a quantised model.

    Keras' layers look for their quantisation in the map itself when they save, and find that of its default.
    """
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer._dtype_policy, keras.dtype_policies.DTypePolicyMap):
            layer._dtype_policy = layer._dtype_policy[layer.path or layer.name]


def fill(model, wanted, stored, where, ignored=()):
    """Gives every variable of a model that was built `without_values` its value.

    All names, shapes and dtypes are checked before the first value is read.

    Args:
        model: a `keras.Model`.
        wanted: list of `Wanted`, one for each variable that files keep.
        stored: dict of `StoredTensor` by name.
        where: the file that lists what should be there, for messages.
        ignored: names of stored tensors that the model has no use for.

    Raises:
        ValueError: for a missing, additional or mismatched tensor, naming file and variable.
    """
    _check_covered(model, wanted)
    _check_names(wanted, stored, where, ignored)
    for want in wanted:
        _check_tensor(want, stored[want.name])
    # The largest first: what a tensor needs besides itself while it is read then adds to little.
    for want in sorted(wanted, key=lambda want: math.prod(want.shape), reverse=True):
        _give_value(want.variable, want.convert(stored[want.name].read()))
    for variable in model.variables:
        if variable._value is None:
            variable._deferred_initialize()
    _register_with_torch(model)


def _check_covered(model, wanted):
    covered = {id(want.variable) for want in wanted}
    left = [v.path for v in model.variables if id(v) not in covered and "seed_generator" not in v.path]
    if left:
        raise ValueError(f"Weight files of Gemma keep no value for {listed(left)}.")


def _check_names(wanted, stored, where, ignored):
    missing = [want for want in wanted if want.name not in stored]
    if missing:
        variables = listed([want.variable.path for want in missing])
        raise ValueError(f"`{where}` lacks {listed([want.name for want in missing])}, the values of {variables}.")
    extra = sorted(set(stored) - {want.name for want in wanted} - set(ignored))
    if extra:
        raise ValueError(
            f"`{stored[extra[0]].file}` holds {listed(extra)}, for which this configuration has no variable. "
            "Does `config.json` belong to these weights?"
        )


def _check_tensor(want, tensor):
    if tuple(tensor.shape) != tuple(want.shape):
        raise ValueError(
            f"`{tensor.file}` keeps `{tensor.name}` in shape {tuple(tensor.shape)}, but the variable "
            f"`{want.variable.path}` needs {tuple(want.shape)}. Does `config.json` belong to these weights?"
        )
    needed, kept = keras.backend.standardize_dtype(want.variable.dtype), str(tensor.dtype)
    if needed != kept and not (_is_float(needed) and _is_float(kept)):
        raise ValueError(
            f"`{tensor.file}` keeps `{tensor.name}` as {kept}, but the variable `{want.variable.path}` needs {needed}."
        )


def _is_float(dtype):
    return dtype == "bfloat16" or np.issubdtype(np.dtype(dtype), np.floating)


def _give_value(variable, array):
    dtype = keras.backend.standardize_dtype(variable.dtype)
    with np.errstate(invalid="ignore"):
        array = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, copy=False)
    if keras.distribution.distribution() is None:
        array = keras.ops.convert_to_tensor(array, dtype)
    # With a distribution, every device takes its shard from host memory: none has to hold the whole.
    variable._initialize(array)
    variable._initializer = None
    if keras.config.backend() == "jax":
        # JAX copies in the background, and would hold on to the arrays of several tensors on a busy machine.
        variable._value.block_until_ready()


def _register_with_torch(model):
    if keras.config.backend() == "torch":
        # Layers list their parameters when built, but not before these have a value.
        for layer in model._flatten_layers():
            layer._track_variables()
