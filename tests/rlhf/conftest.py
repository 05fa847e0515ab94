import keras
import pytest

from tests.rlhf import enumerated


@pytest.fixture
def make_policy(make_preprocessor):
    def make(**kwargs):
        return enumerated.policy_of(make_preprocessor(sequence_length=32), **kwargs)

    return make


@pytest.fixture
def model(make_model):
    keras.utils.set_random_seed(0)
    policy = make_model(sequence_length=24)
    policy.compile(keras.optimizers.Adam(1e-2))
    return policy
