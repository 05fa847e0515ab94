"""Optimizers against their papers written out in NumPy, and what weight decay leaves alone."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.training import NORMS_AND_BIASES
from keras_gemma.training import TOKEN_EMBEDDING
from keras_gemma.training import Adafactor
from keras_gemma.training import AdamW
from keras_gemma.training import Lion
from keras_gemma.training import WarmUp
from tests.conftest import SHAPES

OPTIMIZERS = [AdamW, Adafactor, Lion]
# A query kernel [N, D, H], the embedding [V, D], a norm's scale [D].
KERNELS = {"query/kernel": (2, 6, 4), "token_embedding/embeddings": (10, 6), "norm/scale": (6,)}
RATE, DECAY = 1e-2, 0.3


class Parameter:
    """A weight in NumPy with what an optimizer remembers of it."""

    def __init__(self, value):
        self.value = value.astype("float64")
        self.first = self.second = 0.0


def adamw(parameter, gradient, step, decay):
    parameter.value -= RATE * decay * parameter.value
    parameter.first = 0.9 * parameter.first + 0.1 * gradient
    parameter.second = 0.95 * parameter.second + 0.05 * gradient**2
    first, second = parameter.first / (1 - 0.9**step), parameter.second / (1 - 0.95**step)
    parameter.value -= RATE * first / (np.sqrt(second) + 1e-8)


def lion(parameter, gradient, step, decay):
    direction = np.sign(0.9 * parameter.first + 0.1 * gradient)
    parameter.first = 0.99 * parameter.first + 0.01 * gradient
    parameter.value -= RATE * (direction + decay * parameter.value)


def adafactor(parameter, gradient, step, decay):
    parameter.value -= RATE * decay * parameter.value
    kept = 1 - step**-0.8
    squares = gradient**2 + 1e-30
    if gradient.ndim < 2:
        parameter.second = kept * parameter.second + (1 - kept) * squares
        mean_square = parameter.second
    else:
        # Sums and an outer product, as the paper has it.
        parameter.first = kept * parameter.first + (1 - kept) * squares.sum(axis=-1, keepdims=True)
        parameter.second = kept * parameter.second + (1 - kept) * squares.sum(axis=-2, keepdims=True)
        mean_square = parameter.first * parameter.second / parameter.first.sum(axis=-2, keepdims=True)
    update = gradient / np.sqrt(mean_square)
    update /= max(1.0, np.sqrt(np.mean(update**2)))
    parameter.value -= RATE * max(1e-3, np.sqrt(np.mean(parameter.value**2))) * update


REFERENCES = {AdamW: adamw, Adafactor: adafactor, Lion: lion}


def variables(values):
    made = []
    for path, value in values.items():
        *scopes, name = path.split("/")
        with keras.name_scope("/".join(scopes)):
            made.append(keras.Variable(value, name=name))
    assert [variable.path for variable in made] == list(values)
    return made


def random_values(rng):
    return {path: rng.normal(size=shape).astype("float32") for path, shape in KERNELS.items()}


def tensors(arrays):
    return [ops.convert_to_tensor(array) for array in arrays]


def numpy(variable):
    return np.array(ops.convert_to_numpy(variable))


def stepper(optimizer, weights):
    """`step(gradients)`; on JAX one compiled program, since eager operations compile one by one."""
    optimizer.build(weights)
    if keras.backend.backend() != "jax":
        return lambda gradients: optimizer.apply(tensors(gradients), weights)
    import jax

    compiled = jax.jit(optimizer.stateless_apply)

    def step(gradients):
        state = compiled([v.value for v in optimizer.variables], list(gradients), [w.value for w in weights])
        for variable, value in zip([*weights, *optimizer.variables], [*state[0], *state[1]]):
            variable.assign(value)

    return step


def zeros(weights):
    return [np.zeros(weight.shape, "float32") for weight in weights]


def moved_by_zero_gradients(optimizer, weights):
    before = [numpy(weight) for weight in weights]
    stepper(optimizer, weights)(zeros(weights))
    return {weight.path for weight, old in zip(weights, before) if not np.array_equal(numpy(weight), old)}


@pytest.fixture(scope="module")
def model():
    """A network with no weight at 0."""
    made = GemmaCausalLM(GemmaBackbone(**{**SHAPES["2b"], "num_layers": 1}), preprocessor=None)
    rng = np.random.default_rng(0)
    for weight in made.trainable_variables:
        weight.assign(rng.normal(size=weight.shape).astype("float32"))
    return made


# === Formulas ===


@pytest.mark.multi_backend
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_steps_are_those_of_the_paper(optimizer):
    rng = np.random.default_rng(0)
    values = random_values(rng)
    weights = variables(values)
    expected = [Parameter(value) for value in values.values()]
    take_step = stepper(optimizer(RATE, weight_decay=DECAY, global_clipnorm=None), weights)
    for step in (1, 2, 3):
        gradients = list(random_values(rng).values())
        take_step(gradients)
        for parameter, gradient, path in zip(expected, gradients, values):
            decay = 0.0 if path == "norm/scale" else DECAY
            REFERENCES[optimizer](parameter, gradient.astype("float64"), step, decay)
    for weight, parameter in zip(weights, expected):
        np.testing.assert_allclose(numpy(weight), parameter.value, rtol=2e-4, atol=2e-6)


def test_clipping_scales_all_gradients_by_their_common_norm():
    rng = np.random.default_rng(0)
    values, gradients = random_values(rng), random_values(rng)
    norm = np.sqrt(sum(np.sum(gradient.astype("float64") ** 2) for gradient in gradients.values()))
    for factor in (0.5 / norm, 3.0):
        weights = variables(values)
        take_step = stepper(keras.optimizers.SGD(1.0, global_clipnorm=1.0), weights)
        take_step([gradient * np.float32(factor) for gradient in gradients.values()])
        scale = factor * min(1.0, 1.0 / (factor * norm))
        for weight, value, gradient in zip(weights, values.values(), gradients.values()):
            np.testing.assert_allclose(value - numpy(weight), gradient * scale, rtol=1e-5, atol=1e-6)


def test_every_optimizer_clips_at_one_by_default():
    assert [optimizer(RATE).global_clipnorm for optimizer in OPTIMIZERS] == [1.0] * 3


def test_adafactor_is_that_of_keras_where_that_is_defined():
    rng = np.random.default_rng(0)
    values = random_values(rng)
    ours, theirs = variables(values), variables(values)
    steps = stepper(Adafactor(RATE, global_clipnorm=None), ours), stepper(keras.optimizers.Adafactor(RATE), theirs)
    for _ in range(3):
        gradients = list(random_values(rng).values())
        for take_step in steps:
            take_step(gradients)
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(numpy(one), numpy(other), rtol=1e-4, atol=1e-6)


def test_adafactor_survives_a_row_and_a_column_without_gradient():
    # The row of a token that does not occur, and a unit that is dead. Keras: 0 / sqrt(0).
    gradient = np.random.default_rng(0).normal(size=(10, 6)).astype("float32")
    gradient[3] = gradient[:, 2] = 0
    after = []
    for optimizer in (Adafactor(RATE), keras.optimizers.Adafactor(RATE)):
        weight = keras.Variable(np.ones((10, 6), "float32"))
        stepper(optimizer, [weight])([gradient])
        after.append(numpy(weight))
    assert np.isfinite(after[0]).all() and (after[0][gradient == 0] == 1).all()
    assert np.isnan(after[1]).any(), "Keras' own Adafactor has been repaired"


def test_adafactor_needs_little_memory():
    def state(optimizer):
        optimizer.build(weights)
        return sum(np.prod(variable.shape) for variable in optimizer.variables)

    shapes = {"query/kernel": (4, 64, 32), "ffw/kernel": (64, 128), "norm/scale": (64,)}
    weights = variables({path: np.ones(shape, "float32") for path, shape in shapes.items()})
    size = sum(np.prod(weight.shape) for weight in weights)
    assert state(Adafactor(RATE)) < 0.05 * size
    assert state(keras.optimizers.Adafactor(RATE)) > size


def test_adafactor_caps_its_rate_only_when_told():
    moves = {}
    for relative_step in (False, True):
        weight = keras.Variable(np.ones((4, 4), "float32"))
        optimizer = Adafactor(WarmUp(0.9, decay="constant"), relative_step=relative_step, global_clipnorm=None)
        take_step = stepper(optimizer, [weight])
        optimizer.variables[0].assign(99)
        take_step([np.ones((4, 4), "float32")])
        moves[relative_step] = 1 - numpy(weight)[0, 0]
    assert moves[False] / moves[True] == pytest.approx(0.9 / 0.1, rel=1e-4)


# === Weight decay ===


@pytest.mark.multi_backend
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_decay_spares_the_norm_scales_and_nothing_else(optimizer, model):
    weights = model.trainable_variables
    moved = moved_by_zero_gradients(optimizer(RATE, weight_decay=DECAY), weights)
    spared = {weight.path for weight in weights} - moved
    assert spared == {
        "decoder_block_0/pre_attention_norm/scale",
        "decoder_block_0/pre_ffw_norm/scale",
        "final_normalization/scale",
    }


def test_the_embedding_is_spared_on_request(model):
    optimizer = AdamW(RATE, weight_decay_exclusions=[NORMS_AND_BIASES, TOKEN_EMBEDDING])
    moved = moved_by_zero_gradients(optimizer, model.trainable_variables)
    assert all(path.endswith("kernel") for path in moved) and len(moved) == 7


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_exclusions_survive_serialisation(optimizer):
    ours = optimizer(WarmUp(RATE, 0, 10), weight_decay=DECAY, weight_decay_exclusions=["kernel"])
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(ours))
    assert type(copy) is optimizer and copy.get_config() == ours.get_config()
    moved = moved_by_zero_gradients(copy, variables(random_values(np.random.default_rng(0))))
    assert moved == {"token_embedding/embeddings", "norm/scale"}


def test_a_saved_model_goes_on_without_decaying_its_norms(model, tmp_path):
    model.compile(optimizer=AdamW(WarmUp(RATE, 1, 10), weight_decay=DECAY))
    stepper(model.optimizer, model.trainable_variables)(
        [np.ones(w.shape, "float32") for w in model.trainable_variables]
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is AdamW
    for one, other in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(other))
    for one in (model, loaded):
        stepper(one.optimizer, one.trainable_variables)(zeros(one.trainable_variables))
    for one, other in zip(model.trainable_variables, loaded.trainable_variables, strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(other))


def test_a_string_is_no_list_of_exclusions():
    with pytest.raises(ValueError, match=r"list of regular expressions.*'scale'"):
        AdamW(RATE, weight_decay_exclusions="scale")
