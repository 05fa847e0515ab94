"""Every fast path beside a plain formula in float64."""

import importlib

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import kernels

pytestmark = pytest.mark.multi_backend


def random_array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def to_numpy(x):
    return np.asarray(ops.convert_to_numpy(x))


def attention(query, key, value, mask):
    """`[T, N, H]`, `[S, K, H]`, `[S, K, H]`, `[T, S]` → `[T, N, H]`, head by head."""
    group = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head].astype("float64") @ key[:, head // group].T
        weights = np.exp(np.where(mask, scores, -np.inf))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, head // group])
    return np.stack(heads, axis=1)


def for_a_tpu(monkeypatch, module):
    """Lets a module take the ways that it takes on a TPU, as far as they run elsewhere."""
    if keras.backend.backend() != "jax":
        pytest.skip("Only JAX runs on TPUs.")
    monkeypatch.setattr(importlib.import_module(module), "jax_platform", lambda: "tpu")


def test_prompt_attention_on_a_tpu_takes_the_kernels_of_training(monkeypatch):
    for_a_tpu(monkeypatch, "keras_gemma.kernels.attention")
    test_prompt_attention(300, 1)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("length", [7, 130, 256, 600])
def test_prompt_attention(length, kv_heads):
    first_column = np.array([0, 3, length - 1], "int32")
    query = random_array(3, length, 4, 8)
    key = random_array(3, length, kv_heads, 8, seed=1)
    value = random_array(3, length, kv_heads, 8, seed=2)
    attended = to_numpy(kernels.prompt_attention(*map(ops.convert_to_tensor, (query, key, value, first_column))))
    columns = np.arange(length)
    assert np.isfinite(attended).all()
    for row, first in enumerate(first_column):
        mask = (columns[None, :] <= columns[first:, None]) & (columns[None, :] >= first)
        expected = attention(query[row, first:], key[row], value[row], mask)
        np.testing.assert_allclose(attended[row, first:], expected, atol=2e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("length", [1, 3])
def test_cached_attention(length, kv_heads):
    capacity, column = 20, 11
    first_column = np.array([0, 5, 11], "int32")
    query = random_array(3, length, 4, 8)
    key, value = random_array(3, length, kv_heads, 8, seed=1), random_array(3, length, kv_heads, 8, seed=2)
    keys, values = random_array(3, kv_heads, capacity, 8, seed=3), random_array(3, kv_heads, capacity, 8, seed=4)
    # Whatever stands beyond the filled columns.
    keys[:, :, column:] = 1e3
    arguments = (query, key, value, keys.copy(), values.copy(), first_column, np.int32(column))
    attended, new_keys, new_values = map(to_numpy, kernels.cached_attention(*map(ops.convert_to_tensor, arguments)))
    keys[:, :, column : column + length] = key.swapaxes(1, 2)
    values[:, :, column : column + length] = value.swapaxes(1, 2)
    np.testing.assert_array_equal(new_keys, keys)
    np.testing.assert_array_equal(new_values, values)
    columns = np.arange(capacity)
    for row, first in enumerate(first_column):
        mask = (columns[None, :] <= column + np.arange(length)[:, None]) & (columns[None, :] >= first)
        expected = attention(query[row], keys[row].swapaxes(0, 1), values[row].swapaxes(0, 1), mask)
        np.testing.assert_allclose(attended[row], expected, atol=2e-5)


def test_cached_attention_in_bfloat16_scores_in_float32():
    # The scores 256 and 257 are one number in bfloat16.
    query = np.array([16.0, 1.0]).reshape(1, 1, 1, 2)
    keys = np.array([[16.0, 0.0], [0.0, 0.0]]).reshape(1, 1, 2, 2)
    key, value = np.array([16.0, 1.0]).reshape(1, 1, 1, 2), np.ones((1, 1, 1, 2))
    tensors = [ops.cast(x, "bfloat16") for x in (query, key, value, keys, np.zeros((1, 1, 2, 2)))]
    attended, _, _ = kernels.cached_attention(*tensors, ops.zeros((1,), "int32"), ops.convert_to_tensor(1))
    np.testing.assert_allclose(to_numpy(ops.cast(attended, "float32"))[0, 0, 0, 0], 1 / (1 + np.exp(-1)), rtol=4e-3)


@pytest.mark.parametrize("rows", [(1, 1), (8, 1), (3, 70)])
def test_project(rows):
    x, weight = random_array(*rows, 16), random_array(24, 16, seed=1)
    projected = kernels.project(ops.convert_to_tensor(x), ops.convert_to_tensor(weight))
    np.testing.assert_allclose(to_numpy(projected), x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("length", [5, 100, 255])
def test_in_row_chunks(length):
    x, y = random_array(3, length, 4), random_array(3, length, 4, seed=1)
    result = kernels.in_row_chunks(
        lambda x, y: ops.concatenate([x, x * y], axis=-1), *map(ops.convert_to_tensor, (x, y))
    )
    np.testing.assert_allclose(to_numpy(result), np.concatenate([x, x * y], axis=-1), rtol=1e-6)


def test_write_columns():
    cache, columns = random_array(2, 1, 6, 3), random_array(2, 1, 2, 3, seed=1)
    written = kernels.write_columns(
        ops.convert_to_tensor(cache.copy()), ops.convert_to_tensor(columns), ops.convert_to_tensor(3)
    )
    expected = cache.copy()
    expected[:, :, 3:5] = columns
    np.testing.assert_array_equal(to_numpy(written), expected)


def test_a_tpu_writes_columns_without_turning_the_cache_round(monkeypatch):
    for_a_tpu(monkeypatch, "keras_gemma.kernels.cache")
    import jax

    test_write_columns()
    cache, columns = jax.ShapeDtypeStruct((2, 2, 6, 3), "float32"), jax.ShapeDtypeStruct((2, 2, 1, 3), "float32")
    program = jax.jit(lambda cache, columns, first: kernels.write_columns(cache, columns, first))
    assert program.lower(cache, columns, 3).as_text().count("LayoutConstraint") == 2


def test_first_argmax():
    scores = random_array(5, 100)
    scores[1, [7, 50]] = 9.0
    scores[2] = -np.inf
    scores[3] = -1e30
    chosen = kernels.first_argmax(ops.convert_to_tensor(scores))
    assert keras.backend.standardize_dtype(chosen.dtype) == "int32"
    np.testing.assert_array_equal(to_numpy(chosen), scores.argmax(-1))


@pytest.mark.parametrize("size", [1, 2, 12, 64, 100])
def test_draw(size):
    probabilities = np.abs(random_array(size, seed=size)) + 0.01
    probabilities[1::3] = 0.0
    probabilities /= probabilities.sum()
    count = 100_000
    rows = ops.convert_to_tensor(np.tile(probabilities, (count, 1)))
    drawn = kernels.draw(rows, keras.random.SeedGenerator(1))
    assert keras.backend.standardize_dtype(drawn.dtype) == "int32"
    counts = np.bincount(to_numpy(drawn), minlength=size)
    assert len(counts) == size and not counts[probabilities == 0].any()
    # Five standard deviations of a binomial distribution.
    bound = 5 * np.sqrt(count * probabilities * (1 - probabilities))
    assert (np.abs(counts - count * probabilities) <= bound + 1e-6 * count).all()


def test_draws_of_rows_and_times_differ():
    rows, seed = ops.ones((64, 4096)), keras.random.SeedGenerator(1)
    first, second = (to_numpy(kernels.draw(rows, seed)) for _ in range(2))
    assert len(set(first)) > 60 and (first != second).sum() > 60


@pytest.mark.parametrize("by_halves", [False, True])
def test_heads_are_turned_as_complex_numbers(by_halves, monkeypatch):
    if by_halves:
        # As everywhere but on a CPU under XLA.
        monkeypatch.setattr(importlib.import_module("keras_gemma.kernels.rotation"), "on_jax_cpu", lambda: False)
    heads, angles = random_array(2, 5, 3, 8), 10 * random_array(2, 5, 4, seed=1)
    turned = (heads[..., :4] + 1j * heads[..., 4:]) * np.exp(1j * angles.astype("float64"))[:, :, None]
    found = kernels.rotate(*(ops.convert_to_tensor(x) for x in (heads, np.sin(angles), np.cos(angles))))
    np.testing.assert_allclose(to_numpy(found), np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)
