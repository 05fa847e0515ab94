"""Training that may break off anywhere: the model is then as it was after its last whole step.

On JAX Keras takes the values out of a model's variables while it trains, evaluates or predicts, and a step takes over
the memory of the values that it is given. Here the values after each step are kept until they are back in the model.

`fit` → whole_steps → values out of the model → step → step → error ─┐
                      values into the model ←────────────────────────┘
"""

import contextlib
import functools
import signal
import threading

import keras

# As Keras' JAX trainer orders them in the state of a step.
GROUPS = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
_ATTRIBUTE = "_values_out_of_the_model"
_PATCHED = ("_get_jax_state", "jax_state_sync", "_make_function")


def in_whole_steps(method):
    """Decorates `keras.Model.fit` and the like: whatever raises there, the model is as after its last whole step."""

    @functools.wraps(method)
    def run(model, *args, **kwargs):
        with whole_steps(model):
            return method(model, *args, **kwargs)

    return run


@contextlib.contextmanager
def whole_steps(model):
    """Within, Keras may train, evaluate and predict; at the end, and after any error, the values are in the model.

    Args:
        model: a `keras.Model`. What is within may call what is within again, as `fit` calls `evaluate`.

    Raises:
        RuntimeError: where a device failed in the midst of a step and the values from before it are gone.
    """
    if keras.backend.backend() != "jax":
        yield
        return
    # Not among the attributes that Keras tracks and saves.
    attributes = vars(model)
    is_outermost = _ATTRIBUTE not in attributes
    if is_outermost:
        attributes[_ATTRIBUTE] = _ValuesOutOfTheModel(model)
        attributes.update({name: getattr(attributes[_ATTRIBUTE], name) for name in _PATCHED})
    values = attributes[_ATTRIBUTE]
    try:
        values.jax_state_sync()
        yield
    finally:
        with uninterrupted(), contextlib.ExitStack() as at_last:
            if is_outermost:
                at_last.callback(lambda: [attributes.pop(name) for name in (_ATTRIBUTE, *_PATCHED)])
            values.jax_state_sync()


class _ValuesOutOfTheModel:
    """What stands for three methods of Keras' JAX trainer, and knows where the values are."""

    def __init__(self, model):
        self._model = model
        self._groups = ()
        self._values = None
        self._are_of_a_step = False

    def _get_jax_state(self, purge_model_variables=False, **wanted):
        with uninterrupted():
            values = type(self._model)._get_jax_state(self._model, **wanted)
            self._groups = [group for group in GROUPS if wanted.get(group)]
            self._values, self._are_of_a_step = values, False
            self._model._jax_state = None
            if purge_model_variables:
                self._model._purge_model_variables(**wanted)
        return values

    def _make_function(self, step, *args, **kwargs):
        # Keras keeps the function for later calls, with other values.
        attributes = vars(self._model)

        def kept(state, data):
            with uninterrupted():
                outputs, state = step(state, data)
                if _ATTRIBUTE in attributes:
                    attributes[_ATTRIBUTE].keep(state)
            return outputs, state

        return type(self._model)._make_function(self._model, kept, *args, **kwargs)

    def keep(self, values):
        """Remembers the values after a step."""
        self._values, self._are_of_a_step = values, True

    def jax_state_sync(self):
        """Puts the values back, where they are not in the model."""
        if self._values is not None:
            with uninterrupted():
                self._put_back()
        self._model._jax_state_synced = True
        self._model._jax_state = None

    def _put_back(self):
        values, self._values = self._newest(), None
        for group, of_group in zip(self._groups, values):
            for variable, value in zip(self._variables(group), of_group):
                variable.assign(value)

    def _newest(self):
        values = self._values
        if not self._are_of_a_step and self._model._jax_state:
            # A function that was made outside keeps nothing. After each execution of it, Keras does.
            values = tuple(self._model._jax_state.values())
        if any(value.is_deleted() for of_group in values for value in of_group):
            raise RuntimeError(
                "A device failed in the midst of a step, which had taken over the memory of the weights: they are "
                "lost. Load the model again."
            )
        return values

    def _variables(self, group):
        return self._model.optimizer.variables if group == "optimizer_variables" else getattr(self._model, group)


@contextlib.contextmanager
def uninterrupted():
    """Within, the handlers of Ctrl-C and of SIGTERM wait until the end."""
    # Elsewhere Python runs no handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _waiting(signal.SIGINT), _waiting(signal.SIGTERM):
        yield


@contextlib.contextmanager
def _waiting(number):
    handler = signal.getsignal(number)
    if not callable(handler):
        yield
        return
    received = []
    try:
        signal.signal(number, lambda *_: received.append(number))
        yield
    finally:
        signal.signal(number, handler)
        if received:
            signal.raise_signal(number)
