"""Which of Keras' optimizers move weights that are bfloat16 themselves: measured, and said before training."""

import inspect
import types
import warnings

import keras
import numpy as np
import pytest

from keras_gemma.training.optimizers import warn_of_weights_that_cannot_move

OPTIMIZERS = {
    name: cls
    for name, cls in inspect.getmembers(keras.optimizers, inspect.isclass)
    if name not in ("Optimizer", "OptimizerMap", "LossScaleOptimizer", "MultiOptimizer")
}
STEPS = 6


def start_and_goal():
    random = np.random.default_rng(0)
    return (random.choice([-0.125, 0.125, 0.25], size=(16, 16)).astype("float32") for _ in range(2))


def moved(optimizer, dtype):
    """How far a table of embeddings goes in a few steps."""
    start, goal = start_and_goal()
    # Muon leaves embeddings to Adam.
    table = keras.Variable(start, dtype=dtype, name="embeddings")
    optimizer.build([table])
    for _ in range(STEPS):
        optimizer.apply([keras.ops.cast(table.value - goal, dtype)], [table])
    return np.sqrt(np.mean(np.square(keras.ops.convert_to_numpy(keras.ops.cast(table.value, "float32")) - start)))


def complaint(optimizer, dtype="bfloat16"):
    model = types.SimpleNamespace(optimizer=optimizer, trainable_variables=[keras.Variable(np.ones(2), dtype=dtype)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            warn_of_weights_that_cannot_move(model)
        except ValueError as error:
            return str(error)
    return "".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_does_not_move_bfloat16_weights_says_so(name):
    cls = OPTIMIZERS[name]
    moves = 0.8 < moved(cls(learning_rate=0.02), "bfloat16") / moved(cls(learning_rate=0.02), "float32") < 1.25
    assert moves == (not complaint(cls(learning_rate=0.02)))
    assert not complaint(cls(learning_rate=0.02), dtype="float32")


def test_a_smaller_beta_2_moves_them():
    for name in ("Adam", "AdamW", "Lamb", "Nadam", "ScheduleFreeAdamW"):
        assert not complaint(OPTIMIZERS[name](0.02, beta_2=0.95)), name
    assert not complaint(keras.optimizers.Muon(0.02, adam_beta_2=0.95))


def test_optimizers_within_optimizers_are_asked():
    adam = keras.optimizers.Adam(0.02)
    assert "Adam" in complaint(keras.optimizers.LossScaleOptimizer(adam))
    table = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {"dense": keras.optimizers.Nadam(0.1)})
    assert "NaN" in complaint(keras.optimizers.MultiOptimizer(table))
