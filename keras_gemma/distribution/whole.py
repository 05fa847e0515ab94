"""Arrays whose parts are on several processes, in one piece."""

import functools

import keras
import numpy as np


def whole(x):
    """A NumPy copy of a tensor. Where its parts are on several processes, all of them must ask for it.

    Args:
        x: tensor, `keras.Variable` or array.

    Returns:
        A NumPy array, on every process.
    """
    x = x.value if isinstance(x, keras.Variable) else x
    if not _is_spread(x):
        # A copy: on a CPU, JAX would show NumPy memory that a later program takes over.
        return np.array(keras.ops.convert_to_numpy(x))
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def with_whole_outputs(predict_function):
    """A predict function of Keras whose outputs are whole on every process.

    Args:
        predict_function: callable `(state, iterator) → (outputs, state)`, as `make_predict_function` makes it.

    Returns:
        A callable of the same. All processes call it.
    """

    def predict(state, iterator):
        outputs, state = predict_function(state, iterator)
        return keras.tree.map_structure(lambda x: whole(x) if _is_spread(x) else x, outputs), state

    return predict


def _is_spread(x):
    return not (getattr(x, "is_fully_addressable", True) or x.is_fully_replicated)


def written_once(save):
    """Decorates a method of a model that writes its variables to files.

    Where they are on devices of several processes, all call it, the first one writes, and the others wait until it
    has. The first process needs memory for all of the weights.
    """

    @functools.wraps(save)
    def saved(model, *args, **kwargs):
        if all(map(_is_of_this_process, model.variables)):
            return save(model, *args, **kwargs)
        with _WholeVariables(model.variables) as is_first:
            if is_first:
                save(model, *args, **kwargs)

    return saved


def _is_of_this_process(variable):
    return getattr(variable._value, "is_fully_addressable", True)


class _WholeVariables:
    """Within, the variables have whole values in the memory of the first process; at its end all have met again."""

    def __init__(self, variables):
        # Those that are whole on every process as well: a computation with them would wait for the other processes.
        self._variables = [variable for variable in variables if not _is_of_this_process(variable)]

    def __enter__(self):
        import jax

        self._is_first = jax.process_index() == 0
        self._values = [variable._value for variable in self._variables]
        # One after the other: no other process keeps more than one of them.
        for variable, value in zip(self._variables, self._values):
            gathered = whole(value)
            if self._is_first:
                variable._value = gathered
        # What Keras makes while it saves would be laid out by all processes together, and the others do not come.
        self._distribution = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        return self._is_first

    def __exit__(self, kind, error, traceback):
        from jax.experimental import multihost_utils

        keras.distribution.set_distribution(self._distribution)
        for variable, value in zip(self._variables, self._values):
            variable._value = value
        failed = multihost_utils.process_allgather(np.array(error is not None))
        if failed.any() and error is None:
            raise OSError("The first process could not write the files: its error tells why.")
