import numpy as np
import pytest
from keras import ops

from keras_gemma import kernels

pytestmark = pytest.mark.multi_backend


def naive(query, key, value, segment_ids):
    """One query, one key at a time, in float64."""
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    attended = np.zeros((batch, length, heads, value.shape[-1]))
    for b, t, n in np.ndindex(batch, length, heads):
        seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
        scores = np.exp([float(query[b, t, n] @ key[b, s, n // group]) for s in seen])
        attended[b, t, n] = (scores / scores.sum()) @ value[b, seen, n // group]
    return attended


def operands(heads, kv_heads, length=7, head_dim=4):
    rng = np.random.default_rng(heads + kv_heads)
    shapes = [(2, length, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (4, 2), (3, 3)])
def test_attention_equals_its_definition(heads, kv_heads):
    arrays = operands(heads, kv_heads)
    segment_ids = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 2, 2, 2, 3, 0]], "int32")
    received = kernels.causal_attention(*map(ops.convert_to_tensor, arrays), ops.convert_to_tensor(segment_ids))
    np.testing.assert_allclose(ops.convert_to_numpy(received), naive(*arrays, segment_ids), atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (4, 2)])
@pytest.mark.parametrize("column, length", [(5, 1), (3, 3)])
def test_attention_over_a_cache_equals_attention_over_the_row(heads, kv_heads, column, length):
    query, key, value = operands(heads, kv_heads)
    first = np.array([0, 2], "int32")
    segment_ids = (np.arange(7)[None, :] >= first[:, None]).astype("int32")
    expected = naive(query, key, value, segment_ids)[:, column : column + length]
    # What stands before a row's first column or after its last query must not be read.
    unread = (segment_ids == 0) | (np.arange(7) >= column + length)
    cache = [np.where(unread[:, :, None, None], 1e4, array).astype("float32").swapaxes(1, 2) for array in (key, value)]
    received, _, _ = kernels.cached_attention(
        *(ops.convert_to_tensor(array[:, column : column + length]) for array in (query, key, value)),
        *map(ops.convert_to_tensor, cache),
        ops.convert_to_tensor(first),
        column,
    )
    np.testing.assert_allclose(ops.convert_to_numpy(received), expected, atol=1e-5)


def test_products_of_bfloat16_are_accumulated_in_float32():
    # In bfloat16 a sum of ones stops at 256.
    ones = ops.ones((1, 1000), "bfloat16")
    product = kernels.einsum_float32("td,vd->tv", ones, ones)
    assert float(ops.convert_to_numpy(product)[0, 0]) == 1000.0
