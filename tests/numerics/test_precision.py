"""What is computed in float32 under every dtype policy, and what is rounded as the reference rounds it."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_gemma import kernels
from keras_gemma.models.backbone import EmbeddingScale
from keras_gemma.models.backbone import GemmaBackbone
from keras_gemma.models.rms_normalization import RMSNormalization
from keras_gemma.models.rotary_embedding import RotaryEmbedding
from tests.numerics.references import batch
from tests.numerics.references import logits
from tests.numerics.references import ours
from tests.numerics.references import to_numpy

BFLOAT16_POLICIES = ["bfloat16", "mixed_bfloat16"]
POLICIES = ["float32", *BFLOAT16_POLICIES]

SHAPE = {
    "vocabulary_size": 200, "num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 1,
    "hidden_dim": 32, "intermediate_dim": 128, "head_dim": 8,
}  # fmt: skip

pytestmark = pytest.mark.multi_backend


@pytest.mark.parametrize("policy", BFLOAT16_POLICIES)
@pytest.mark.parametrize("width, rounded", [(2048, 45.25), (3072, 55.5)])
def test_sqrt_of_the_width_is_rounded_to_bfloat16(policy, width, rounded):
    scaled = EmbeddingScale(dtype=policy)(ops.ones((1, 1, width), "bfloat16"))
    assert np.unique(to_numpy(scaled)) == [rounded]


def test_sqrt_of_the_width_is_exact_in_float32():
    scaled = EmbeddingScale(dtype="float32")(ops.ones((1, 1, 3072), "float32"))
    assert np.unique(to_numpy(scaled)) == [np.float32(np.sqrt(3072))]


@pytest.mark.parametrize("policy", BFLOAT16_POLICIES)
def test_one_plus_scale_is_computed_in_float32(policy):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 128)).astype(ml_dtypes.bfloat16).astype("float32")
    scale = rng.uniform(-0.02, 0.02, 128).astype(ml_dtypes.bfloat16).astype("float32")
    normalized = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    expected = (normalized * (1 + scale)).astype(ml_dtypes.bfloat16)
    rounded_early = (normalized * (1 + scale).astype(ml_dtypes.bfloat16).astype("float32")).astype(ml_dtypes.bfloat16)
    assert np.mean(expected != rounded_early) > 0.1

    layer = RMSNormalization(dtype=policy)
    layer.build((None, 128))
    layer.scale.assign(scale)
    received = layer(ops.cast(x, "bfloat16"))
    assert keras.backend.standardize_dtype(received.dtype) == "bfloat16"
    assert np.mean(to_numpy(received) != expected.astype("float32")) < 0.005  # a tie may round either way


def test_scale_zero_leaves_a_row_at_unit_mean_square():
    layer = RMSNormalization()
    received = to_numpy(layer(ops.convert_to_tensor(np.random.default_rng(0).normal(size=(3, 64)).astype("float32"))))
    np.testing.assert_allclose(np.mean(received**2, axis=-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_positions_8190_and_8191_are_told_apart(policy):
    positions = np.array([[8190, 8191, 8192]])
    sine, cosine = RotaryEmbedding(64, dtype=policy)(
        ops.zeros((1, 3), "int32"), positions=ops.convert_to_tensor(positions)
    )
    angles = positions[..., None] / 10_000.0 ** (np.arange(0, 64, 2) / 64)
    assert keras.backend.standardize_dtype(sine.dtype) == keras.backend.standardize_dtype(cosine.dtype) == "float32"
    np.testing.assert_allclose(to_numpy(sine), np.sin(angles), atol=1e-3)
    np.testing.assert_allclose(to_numpy(cosine), np.cos(angles), atol=1e-3)


def test_inverse_frequencies_are_computed_in_float64_and_rounded_once():
    in_float32 = np.float32(10_000) ** -(np.arange(0, 256, 2, dtype="float32") / np.float32(256))
    expected = (10_000.0 ** -(np.arange(0, 256, 2) / 256)).astype("float32")
    assert np.any(in_float32 != expected), "the test could not tell them apart"
    np.testing.assert_array_equal(RotaryEmbedding(256).inverse_frequencies(), expected)
    # What the angles are made of: where the sine of a small angle is the angle, it is the frequency itself.
    sine, _ = RotaryEmbedding(256).rotation(ops.ones((1, 1), "int32"))
    np.testing.assert_array_equal(to_numpy(sine)[0, 0, -8:], expected[-8:])


def test_positions_count_from_zero_when_left_out():
    layer = RotaryEmbedding(8)
    left_out, _ = layer(ops.zeros((2, 5), "int32"))
    given, _ = layer(ops.zeros((2, 5), "int32"), positions=ops.convert_to_tensor(np.tile(np.arange(5), (2, 1))))
    np.testing.assert_array_equal(to_numpy(left_out), to_numpy(given))


def test_rotation_is_half_split():
    sine, cosine = ops.full((1, 1, 2), 0.6), ops.full((1, 1, 2), 0.8)
    rotated = kernels.rotate(ops.convert_to_tensor(np.array([[[[1.0, 2.0, 3.0, 4.0]]]], "float32")), sine, cosine)
    expected = [1 * 0.8 - 3 * 0.6, 2 * 0.8 - 4 * 0.6, 3 * 0.8 + 1 * 0.6, 4 * 0.8 + 2 * 0.6]
    np.testing.assert_allclose(to_numpy(rotated).ravel(), expected, rtol=1e-5)


def test_attention_scores_of_bfloat16_are_float32():
    # The scores 256 and 257 are one number in bfloat16, and both keys would get the same weight.
    query = np.array([16.0, 1.0], "float32").reshape(1, 1, 1, 2).repeat(2, axis=1)
    key = np.array([[16.0, 0.0], [16.0, 1.0]], "float32").reshape(1, 2, 1, 2)
    value = np.array([[0.0, 0.0], [1.0, 1.0]], "float32").reshape(1, 2, 1, 2)
    attended = kernels.causal_attention(
        *(ops.cast(array, "bfloat16") for array in (query, key, value)), ops.ones((1, 2), "int32")
    )
    np.testing.assert_allclose(to_numpy(attended)[0, 1, 0, 0], 1 / (1 + np.exp(-1.0)), rtol=4e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_logits_are_float32_under_every_policy(policy):
    model = ours(SHAPE, dtype=policy)
    inputs = batch(SHAPE["vocabulary_size"])
    assert keras.backend.standardize_dtype(model.output.dtype) == "float32"
    received = model({name: ops.convert_to_tensor(value) for name, value in inputs.items()})
    assert keras.backend.standardize_dtype(received.dtype) == "float32"
    # Not float32 numbers that went through bfloat16:
    if policy != "float32":
        values = to_numpy(received)
        assert np.mean(values.astype(ml_dtypes.bfloat16).astype("float32") == values) < 0.1


@pytest.mark.parametrize("policy", BFLOAT16_POLICIES)
def test_bfloat16_stays_near_float32_on_the_rounded_weights(policy):
    low, exact = ours(SHAPE, dtype=policy), ours(SHAPE, dtype="float32")
    for weight, rounded in zip(exact.backbone.weights, low.backbone.weights):
        weight.assign(to_numpy(ops.cast(rounded.value, "bfloat16")))
    inputs = batch(SHAPE["vocabulary_size"])
    expected, real = logits(exact, inputs), inputs["padding_mask"].astype(bool)
    error = np.sqrt(np.mean((logits(low, inputs) - expected)[real] ** 2)) / np.std(expected[real])
    assert error < 0.04


def test_only_the_weights_of_the_policy_bfloat16_are_bfloat16():
    shape = {
        "vocabulary_size": 10, "num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1,
        "hidden_dim": 8, "intermediate_dim": 16, "head_dim": 4,
    }  # fmt: skip
    assert {weight.dtype for weight in GemmaBackbone(**shape, dtype="bfloat16").weights} == {"bfloat16"}
    assert {weight.dtype for weight in GemmaBackbone(**shape, dtype="mixed_bfloat16").weights} == {"float32"}


@pytest.mark.parametrize("policy", BFLOAT16_POLICIES)
def test_sines_and_cosines_reach_the_rotation_in_float32(policy, monkeypatch):
    received, rotate = [], kernels.rotate

    def recording_rotate(x, sine, cosine):
        received.extend(keras.backend.standardize_dtype(angle.dtype) for angle in (sine, cosine))
        return rotate(x, sine, cosine)

    monkeypatch.setattr(kernels, "rotate", recording_rotate)
    backbone = GemmaBackbone(32, 1, 2, 1, 16, 32, 8, dtype=policy)
    ones = np.ones((1, 4), "int32")
    received.clear()
    backbone({"token_ids": ones, "padding_mask": ones})
    assert set(received) == {"float32"}
