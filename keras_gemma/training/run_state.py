"""All that `fit` changes while it runs, as arrays and as what json can write."""

import copy
import functools
import random
import re

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random import seed_generator

import keras_gemma
from keras_gemma.training.errors import ForeignCheckpointError

FORMAT = 3
GROUPS = ("trainable_variables", "non_trainable_variables", "metrics_variables")


def variables_of(model):
    """The model's variables by group: `{group: [keras.Variable]}`, the optimizer's among them."""
    return {**{group: getattr(model, group) for group in GROUPS}, "optimizer_variables": model.optimizer.variables}


def arrays_of(model):
    """The values of all variables as `{group: {"0000 path": array}}`, as they lie on the devices."""
    # In the middle of an epoch the values are with the trainer.
    model.jax_state_sync()
    return {
        group: {_key(index, variable): variable.value for index, variable in enumerate(variables)}
        for group, variables in variables_of(model).items()
    }


def _key(index, variable):
    return f"{index:04d} {_without_numbers(variable.path)}"


def _without_numbers(path):
    # Keras numbers names through a process: the second model's optimizer is `adam_1`.
    return re.sub(r"_\d+(?=[/_]|$)", "", path).replace("/", " ")


def places_for_arrays(model):
    """What `arrays_of` gives, as the form in which a checkpoint's arrays are wanted.

    Without a distribution they are wanted as NumPy arrays: JAX compiles the train step anew for arrays that are bound
    to a device, as those that a checkpoint gives would be and those of a new model are not.
    """
    arrays = arrays_of(model)
    if keras.distribution.distribution() is not None:
        return arrays
    return {
        group: {key: np.empty(array.shape, array.dtype) for key, array in of_group.items()}
        for group, of_group in arrays.items()
    }


def assign(model, arrays):
    """Puts `arrays`, in the structure of `arrays_of`, into the model."""
    for group, variables in variables_of(model).items():
        for index, variable in enumerate(variables):
            variable.assign(arrays[group][_key(index, variable)])


def described_arrays(arrays):
    """Shapes and dtypes of a dict of arrays, for json."""
    return {name: [array.shape, str(array.dtype)] for name, array in arrays.items()}


def empty_arrays(described):
    """NumPy arrays of the shapes and dtypes that `described_arrays` told."""
    return {name: np.empty(shape, dtype) for name, (shape, dtype) in described.items()}


def all_finite(model):
    """Whether no weight is NaN or infinite."""
    model.jax_state_sync()
    values = [variable.value for variable in model.trainable_variables]
    return not values or bool(keras.ops.convert_to_numpy(_program_of_finite()(values)))


@functools.cache
def _program_of_finite():
    # One program for all weights. Several that are on their way at once wait for each other for ever where processes
    # with a few devices each on few cores begin them in different orders.
    import jax

    return jax.jit(lambda values: jax.numpy.stack([jax.numpy.isfinite(value).all() for value in values]).all())


# === What a checkpoint belongs to ===


def settings(model, steps_per_epoch, class_weight=None):
    """What has to be equal for a run to go on exactly, as far as it is known before the optimizer is built."""
    return {
        "format": FORMAT,
        "backend": keras.backend.backend(),
        "optimizer": type(model.optimizer).__name__,
        "steps_per_epoch": steps_per_epoch,
        "steps_per_execution": model.steps_per_execution,
        # Pairs, because json has names for keys.
        "class_weight": class_weight and [[int(name), float(weight)] for name, weight in sorted(class_weight.items())],
        "gradient_accumulation_steps": getattr(model, "gradient_accumulation_steps", 1),
    }


def identity(model, settings):
    """What has to be equal for a run to go on exactly: the settings and all variables."""
    return {
        **settings,
        "variables": {
            group: [[_without_numbers(v.path), list(v.shape), v.dtype] for v in variables]
            for group, variables in variables_of(model).items()
        },
    }


def versions():
    """Recorded for who looks into a checkpoint; not compared."""
    return {"keras_gemma": keras_gemma.__version__, "keras": keras.__version__}


def refuse_foreign(folder, saved, ours):
    """Raises at the first thing in which `identity` differs.

    Raises:
        ForeignCheckpointError: naming the checkpoint's folder, what it has and what this run has.
    """
    difference = _first_difference(saved, ours)
    if difference:
        raise ForeignCheckpointError(
            f"The checkpoint {folder} belongs to another run: {difference}. Run what was run before, or choose another "
            "folder."
        )


def _first_difference(saved, ours):
    for name in ours:
        if name != "variables" and saved.get(name) != ours[name]:
            return f"{name} is {saved.get(name)!r} there and {ours[name]!r} here"
    for group, variables in ours.get("variables", {}).items():
        others = saved["variables"][group]
        for there, here in zip(others, variables):
            if there != here:
                return f"one of its {group} is {_described(there)} there and {_described(here)} here"
        if len(others) != len(variables):
            return f"there are {len(others)} {group} there and {len(variables)} here"
    return None


def _described(variable):
    path, shape, dtype = variable
    return f"{path!r} {dtype}{shape}"


# === Random generators outside the model ===


def random_state():
    """Python's, NumPy's and Keras' global generators."""
    kind, keys, *rest = np.random.get_state()
    keras_generator = global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "keras": keras_generator and keras.ops.convert_to_numpy(keras_generator.state.value).tolist(),
    }


def set_random_state(state):
    if state["keras"] is not None:
        seed_generator.global_seed_generator().state.assign(state["keras"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))


# === Other callbacks ===


class CallbackStates:
    """What callbacks such as `History`, `EarlyStopping` and `ReduceLROnPlateau` have come to know in training.

    Only attributes that changed since it began are kept, so that a setting may be changed between two runs.
    """

    def __init__(self, callbacks):
        self._callbacks = callbacks
        self._at_first = [{name: copy.deepcopy(value) for name, value in _states_of(c)} for c in callbacks]

    def plain(self):
        """Changed attributes that json can write, `[[class name, {attribute: value}]]`."""
        return [
            [type(callback).__name__, {name: _as_plain(value) for name, value in self._changed(i) if _is_plain(value)}]
            for i, callback in enumerate(self._callbacks)
        ]

    def arrays(self):
        """Changed attributes that are lists of arrays, as the best weights: `{"number attribute index": array}`."""
        return {
            f"{i:02d} {name} {j:04d}": array
            for i in range(len(self._callbacks))
            for name, value in self._changed(i)
            if not _is_plain(value)
            for j, array in enumerate(value)
        }

    def restore(self, plain, arrays):
        """Gives the attributes back to callbacks of the same classes, in their order."""
        left = list(self._callbacks)
        for number, (class_name, attributes) in enumerate(plain):
            callback = next((callback for callback in left if type(callback).__name__ == class_name), None)
            if callback is not None:
                left.remove(callback)
                if getattr(callback, "monitor_op", True) is None:
                    # Keras does this later, and changes the sign of a number that is restored here.
                    callback._set_monitor_op()
                vars(callback).update({**attributes, **_array_lists(arrays, number)})

    def _changed(self, number):
        before = self._at_first[number]
        for name, value in _states_of(self._callbacks[number]):
            if name not in before or not _equal(before[name], value):
                yield name, value


def _states_of(callback):
    for name, value in vars(callback).items():
        if name != "params" and (_is_plain(value) or _is_array_list(value)):
            yield name, value


def _equal(one, other):
    if _is_plain(one) and _is_plain(other):
        return one == other
    return one is other


def _array_lists(arrays, number):
    lists = {}
    for key in sorted(arrays):
        of, name, _ = key.split()
        if int(of) == number:
            lists.setdefault(name, []).append(np.asarray(arrays[key]))
    return lists


def _is_plain(value):
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str, np.bool_, np.number))


def _as_plain(value):
    if isinstance(value, (list, tuple)):
        return [_as_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _as_plain(one) for key, one in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def _is_array_list(value):
    return isinstance(value, list) and bool(value) and all(isinstance(one, np.ndarray) for one in value)
