"""Attention over prompts that stand once, beside plain attention over a row for each continuation."""

import numpy as np
import pytest
from keras import ops

from keras_gemma import kernels
from keras_gemma.kernels import attention
from keras_gemma.kernels.continuations import Continued
from tests.kernels.test_attention import HEADS
from tests.kernels.test_attention import assert_close
from tests.kernels.test_attention import on_jax_only
from tests.kernels.test_attention import results

GROUPS, PROMPT, CONTINUATIONS, BEHIND = 2, 5, 3, 4
COLUMNS = PROMPT + CONTINUATIONS * BEHIND


def in_rows(x):
    """A row for each continuation, written out."""
    rows = []
    for of_group in x:
        for i in range(CONTINUATIONS):
            first = PROMPT + i * BEHIND
            rows.append(np.concatenate([of_group[:PROMPT], of_group[first : first + BEHIND]]))
    return np.stack(rows)


def once(rows):
    """What all rows of a group say of their prompt, added up, and what each says of its own columns."""
    of_groups = rows.reshape(GROUPS, CONTINUATIONS, *rows.shape[1:])
    behind = of_groups[:, :, PROMPT:].reshape(GROUPS, CONTINUATIONS * BEHIND, *rows.shape[2:])
    return np.concatenate([of_groups[:, :, :PROMPT].sum(axis=1), behind], axis=1)


def test_rows_and_back():
    x = np.arange(GROUPS * COLUMNS * 2).reshape(GROUPS, COLUMNS, 2)
    continued = Continued(PROMPT, CONTINUATIONS)
    np.testing.assert_array_equal(continued.in_rows(x), in_rows(x))
    np.testing.assert_array_equal(continued.once(continued.in_rows(x)), x)


@pytest.mark.multi_backend
@pytest.mark.parametrize("heads", HEADS)
def test_no_continuation_sees_another(heads):
    count, kv_heads, head_dim = HEADS[heads]
    random = np.random.default_rng(0)
    shapes = [(GROUPS, COLUMNS, n, head_dim) for n in (count, kv_heads, kv_heads, count)]
    arrays = [random.normal(size=shape).astype("float32") for shape in shapes]
    # Prompts are padded in front and continuations behind.
    segment_ids = np.ones((GROUPS, COLUMNS), "int32")
    segment_ids[0, :2] = segment_ids[1, -3:] = 0

    def attend(query, key, value, segment_ids):
        with kernels.continued_prompts(PROMPT, CONTINUATIONS):
            return kernels.causal_attention(query, key, value, segment_ids)

    *inputs, upstream = map(in_rows, arrays)
    # A prompt's result is read once, whatever the number of rows that have it.
    upstream.reshape(GROUPS, CONTINUATIONS, *upstream.shape[1:])[:, 1:, :PROMPT] = 0.0
    attended, *gradients = results(attention.plain_attention, [*inputs, upstream], in_rows(segment_ids))
    expected = [ops.convert_to_numpy(Continued(PROMPT, CONTINUATIONS).once(attended)), *map(once, gradients)]
    assert_close(results(attend, arrays, segment_ids), expected)


@on_jax_only
def test_long_rows_are_computed_in_blocks(monkeypatch):
    monkeypatch.setattr(attention, "WHOLE_SCORES", 4)
    test_no_continuation_sees_another("2b")
