"""bfloat16 compute with float32 master weights: what is float32, and that small steps are not lost."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.training import AdamW

SHAPE = {
    "vocabulary_size": 32, "num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1,
    "hidden_dim": 16, "intermediate_dim": 32, "head_dim": 8,
}  # fmt: skip
STEPS = 20


class RecordingAdamW(AdamW):
    """Keeps the dtypes of the gradients it is given."""

    def apply(self, gradients, *args):
        self.received = {keras.backend.standardize_dtype(gradient.dtype) for gradient in gradients}
        return super().apply(gradients, *args)


def batch():
    ids = np.random.default_rng(0).integers(3, 32, (4, 9)).astype("int32")
    ones = np.ones((4, 8), "int32")
    return {"token_ids": ids[:, :-1], "padding_mask": ones}, ids[:, 1:], ones


def new_model(dtype, optimizer):
    model = GemmaCausalLM(GemmaBackbone(**SHAPE, dtype=dtype), preprocessor=None)
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if len(weight.shape) > 1:
            weight.assign(rng.normal(0, 0.3, weight.shape).astype("float32"))
    model.compile(optimizer=optimizer, weighted_metrics=[])
    optimizer.build(model.trainable_variables)
    return model


def dtypes(variables):
    return {keras.backend.standardize_dtype(variable.dtype) for variable in variables}


def state(model):
    return [np.array(ops.convert_to_numpy(v)) for v in [*model.trainable_variables, *model.optimizer.variables]]


def restore(model, values):
    for variable, value in zip([*model.trainable_variables, *model.optimizer.variables], values, strict=True):
        variable.assign(value)


@pytest.fixture(scope="module")
def compiled_once():
    model = new_model("mixed_bfloat16", RecordingAdamW(3e-4))
    return model, state(model)


@pytest.fixture
def mixed(compiled_once):
    """A model before its first step."""
    restore(*compiled_once)
    return compiled_once[0]


def test_weights_gradients_and_moments_are_float32(mixed):
    x, y, weights = batch()
    mixed.train_on_batch(x, y, weights)
    assert mixed.backbone.compute_dtype == "bfloat16"
    assert dtypes(mixed.trainable_variables) == mixed.optimizer.received == {"float32"}
    moments = [variable for variable in mixed.optimizer.variables if len(variable.shape)]
    assert dtypes(moments) == {"float32"} and len(moments) == 2 * len(mixed.trainable_variables)


def test_gradients_accumulate_in_float32():
    optimizer = AdamW(1e-3, gradient_accumulation_steps=2)
    optimizer.build(GemmaBackbone(**SHAPE, dtype="mixed_bfloat16").trainable_variables)
    sums = [variable for variable in optimizer.variables if "gradient_accumulator" in variable.path]
    assert dtypes(sums) == {"float32"} and len(sums) == len(optimizer._trainable_variables)


def test_a_step_taken_twice_is_the_same_to_the_bit(mixed):
    x, y, weights = batch()
    before = state(mixed)
    results = []
    for _ in range(2):
        restore(mixed, before)
        mixed.train_on_batch(x, y, weights)
        results.append(state(mixed))
    assert any(not np.array_equal(old, new) for old, new in zip(before, results[0]))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.multi_backend
def test_steps_below_the_resolution_of_bfloat16_add_up():
    moved = {}
    for policy in ("mixed_bfloat16", "bfloat16"):
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", dtype=policy)
        layer.build((None, 2))
        # 2⁻⁸ is the distance of 1 to the next smaller number.
        optimizer = keras.optimizers.SGD(2.0**-12)
        for _ in range(16):
            optimizer.apply([ops.ones((2, 1), layer.kernel.dtype)], [layer.kernel])
        moved[policy] = 1 - float(np.array(ops.convert_to_numpy(ops.cast(layer.kernel, "float32")))[0, 0])
    assert moved == {"mixed_bfloat16": 2.0**-8, "bfloat16": 0.0}


def test_the_loss_falls_as_in_float32_and_would_not_with_bfloat16_weights(mixed):
    x, y, weights = batch()
    models = {policy: new_model(policy, AdamW(3e-4)) for policy in ("float32", "bfloat16")}
    losses = {
        policy: np.array([model.train_on_batch(x, y, weights, return_dict=True)["loss"] for _ in range(STEPS)])
        for policy, model in {**models, "mixed": mixed}.items()
    }
    fall = losses["float32"][0] - losses["float32"][-1]
    assert fall > 0.2
    error = {policy: np.max(np.abs(curve - losses["float32"])) / fall for policy, curve in losses.items()}
    assert error["mixed"] < 0.03 and error["bfloat16"] > 0.2, error
