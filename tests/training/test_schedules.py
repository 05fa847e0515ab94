"""Learning rates at the steps where something ends or begins."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.training import WarmUp

PEAK, FINAL = 3e-4, 3e-5


def rates(schedule, *steps):
    return ops.convert_to_numpy(schedule(ops.convert_to_tensor(steps, "int32"))).tolist()


@pytest.mark.multi_backend
@pytest.mark.parametrize("decay, middle", [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_the_borders_are_exact(decay, middle):
    schedule = WarmUp(PEAK, warmup_steps=100, total_steps=1100, decay=decay)
    peak = float(np.float32(PEAK))
    end = peak if decay == "constant" else 0.0
    assert rates(schedule, 0, 100, 1100, 1101, 10**7) == [0.0, peak, end, end, end]
    np.testing.assert_allclose(
        rates(schedule, 1, 50, 99, 600), [PEAK / 100, PEAK / 2, PEAK * 0.99, PEAK * middle], 1e-6
    )


@pytest.mark.multi_backend
def test_decays_follow_their_formulas_down_to_the_final_rate():
    steps = np.arange(100, 1101, 50)
    progress = (steps - 100) / 1000
    expected = {
        "cosine": FINAL + (PEAK - FINAL) * (1 + np.cos(np.pi * progress)) / 2,
        "linear": PEAK + (FINAL - PEAK) * progress,
    }
    for decay, values in expected.items():
        schedule = WarmUp(PEAK, 100, 1100, decay, FINAL)
        np.testing.assert_allclose(rates(schedule, *steps), values, rtol=1e-5)
        assert rates(schedule, 1100, 5000) == [float(np.float32(FINAL))] * 2


def test_cosine_is_that_of_keras():
    ours = WarmUp(PEAK, warmup_steps=10, total_steps=40)
    keras_own = keras.optimizers.schedules.CosineDecay(0.0, decay_steps=30, warmup_target=PEAK, warmup_steps=10)
    for step in (5, 10, 17, 50):
        assert rates(ours, step) == pytest.approx([float(keras_own(step))], rel=1e-5, abs=1e-10)


def test_without_warm_up_the_first_rate_is_the_peak():
    assert rates(WarmUp(PEAK, total_steps=10), 0) == [float(np.float32(PEAK))]
    assert rates(WarmUp(PEAK, decay="constant"), 0, 7) == [float(np.float32(PEAK))] * 2


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="compiles with JAX")
def test_a_compiled_step_gets_the_same_rate():
    import jax

    schedule = WarmUp(PEAK, 3, 10)
    compiled = [float(jax.jit(schedule)(step)) for step in range(12)]
    np.testing.assert_allclose(compiled, rates(schedule, *range(12)), rtol=1e-5)


@pytest.mark.multi_backend
def test_an_optimizer_steps_at_these_rates():
    weight = keras.Variable(np.zeros(1, "float32"))
    optimizer = keras.optimizers.SGD(WarmUp(1.0, warmup_steps=2, total_steps=4, decay="linear"))
    moves = []
    for _ in range(6):
        before = float(ops.convert_to_numpy(weight)[0])
        optimizer.apply([ops.convert_to_tensor(np.ones(1, "float32"))], [weight])
        moves.append(before - float(ops.convert_to_numpy(weight)[0]))
    assert moves == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]


def test_survives_serialisation_within_an_optimizer():
    optimizer = keras.optimizers.SGD(WarmUp(PEAK, 5, 20, "linear", FINAL))
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert copy.get_config() == optimizer.get_config()
    assert copy.get_config()["learning_rate"]["registered_name"] == "keras_gemma>WarmUp"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"decay": "square"}, "'cosine', 'linear', 'constant'.*'square'"),
        ({"warmup_steps": 10, "total_steps": 10}, "warmup_steps=10, total_steps=10"),
        ({}, "total_steps=None"),
        ({"warmup_steps": -1, "total_steps": 10}, "not negative"),
        ({"decay": "constant", "final": 0.1}, "no `final` rate"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        WarmUp(PEAK, **arguments)
