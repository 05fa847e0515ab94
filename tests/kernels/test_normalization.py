import numpy as np
import pytest
from gradients import value_and_gradients
from keras import ops

from keras_gemma import kernels


def plain(x, scale, epsilon):
    return x / ops.sqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + epsilon) * scale


@pytest.mark.multi_backend
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_value_and_gradients(epsilon):
    random = np.random.default_rng(0)
    x = (random.normal(size=(2, 3, 8)) * [[[0.1], [1.0], [10.0]]]).astype("float32")
    scale, weights = random.normal(size=8).astype("float32"), random.normal(size=(2, 3, 8)).astype("float32")
    value, gradients = of(kernels.rms_normalize, x, scale, epsilon, weights)
    expected, expected_gradients = of(plain, x, scale, epsilon, weights)
    assert value == pytest.approx(expected, rel=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def of(function, x, scale, epsilon, weights):
    x, scale, weights = (ops.convert_to_tensor(tensor) for tensor in (x, scale, weights))
    return value_and_gradients(lambda x, scale: ops.sum(weights * function(x, scale, epsilon)), x, scale)
