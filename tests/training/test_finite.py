"""Training stops at the first loss that is no number."""

import keras
import numpy as np
import pytest

from keras_gemma import training
from keras_gemma.training import run_state

BATCHES = 6


class Batches(keras.utils.PyDataset):
    """Gives a label of `value` in one batch of one epoch; drawing a batch for building counts as an epoch."""

    def __init__(self, batch, value, epoch=None):
        super().__init__()
        self._bad = epoch, batch
        self._value = value
        self._epoch = None

    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        y = np.ones((2, 1), "float32")
        return np.ones((2, 3), "float32"), y * self._value if (self._epoch, index) == self._bad else y


class Epoch(keras.callbacks.Callback):
    """Tells the data which epoch it is."""

    def __init__(self, batches):
        super().__init__()
        self._batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self._batches._epoch = epoch


def fit(batches, **compile_arguments):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse", **compile_arguments)
    callbacks = [training.StopOnNonFiniteLoss(), Epoch(batches)]
    return model.fit(batches, epochs=3, verbose=0, shuffle=False, callbacks=callbacks)


@pytest.mark.multi_backend
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("epoch, batch", [(0, 0), (1, 2), (2, 5)])
def test_the_first_loss_that_is_not_finite_is_named(value, epoch, batch):
    with pytest.raises(training.NonFiniteLossError, match=f"batch {batch} of epoch {epoch}") as error:
        fit(Batches(batch, value, epoch))
    assert (error.value.step, error.value.epoch, error.value.batch) == (epoch * BATCHES + batch + 1, epoch, batch)
    assert error.value.checkpoint is None and "There is no checkpoint" in str(error.value)


def test_finite_losses_pass():
    assert len(fit(Batches(0, 1.0, 0)).epoch) == 3


def test_several_steps_per_execution():
    with pytest.raises(training.NonFiniteLossError) as error:
        fit(Batches(1, np.nan, 1), steps_per_execution=3)
    assert (error.value.step, error.value.batch) == (9, 2), "the last of its execution"


def test_it_does_not_wait_for_each_step():
    assert training.StopOnNonFiniteLoss.async_safe
    callbacks = keras.callbacks.CallbackList([training.StopOnNonFiniteLoss()])
    if keras.backend.backend() == "jax":
        assert callbacks._async_train


@pytest.mark.multi_backend
def test_an_exact_resume_is_refused_off_jax(tmp_path):
    if keras.backend.backend() == "jax":
        pytest.skip("It works here.")
    pytest.importorskip("orbax.checkpoint")
    with pytest.raises(ValueError, match="ExactResume needs JAX"):
        training.ExactResume(tmp_path, 1)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Exact resume is JAX's.")
def test_a_model_without_trainable_weights_is_finite():
    frozen = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, trainable=False)])
    assert run_state.all_finite(frozen)
