"""Greedy decoding writes what the argmax of full forward passes over the growing text would write."""

import numpy as np
import pytest
from generation.conftest import assert_greedy
from generation.conftest import build
from generation.conftest import random_prompts
from generation.conftest import rows_of
from generation.conftest import set_weights
from generation.conftest import tokens_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def continue_greedily(model, prompts, **kwargs):
    inputs = tokens_of(prompts, max(map(len, prompts)) + 1)
    return rows_of(model.generate(inputs, **{"stop_token_ids": None, **kwargs}))


@pytest.mark.multi_backend
def test_rows_of_different_lengths(models, shape_name, prompts):
    model = models(shape_name)
    rows = continue_greedily(model, prompts, max_new_tokens=12)
    assert [len(row) for row in rows] == [len(prompt) + 12 for prompt in prompts]
    assert_greedy(model, prompts, rows)


@pytest.mark.multi_backend
def test_rows_stop_one_by_one(models, prompts):
    model = models()
    free = continue_greedily(model, prompts, max_new_tokens=12)
    # The third new token of one row and the seventh of another; the last row runs on.
    stops = [free[0][len(prompts[0]) + 2], free[1][len(prompts[1]) + 6]]
    stopped = continue_greedily(model, prompts, max_new_tokens=12, stop_token_ids=stops)
    for prompt, row, full in zip(prompts, stopped, free):
        ends = [i + 1 for i in range(len(prompt), len(full)) if full[i] in stops]
        assert row == full[: ends[0] if ends else None]


@pytest.mark.multi_backend
def test_a_cache_that_grows(models):
    model = models()
    prompts = random_prompts(190, 40)
    rows = continue_greedily(model, prompts, max_new_tokens=80)
    assert_greedy(model, prompts, rows)


def test_prompts_longer_than_a_segment(models, shape_name):
    model = models(shape_name)
    prompts = random_prompts(300, 3, 384, 257)
    assert_greedy(model, prompts, continue_greedily(model, prompts, max_new_tokens=5))


def test_rows_do_not_depend_on_their_company(models, prompts):
    model = models()
    together = continue_greedily(model, prompts, max_new_tokens=12)
    alone = [continue_greedily(model, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == alone


def test_lora(prompts):
    model = build()
    model.backbone.enable_lora(2)
    random = np.random.default_rng(1)
    adapters = [variable for variable in model.trainable_variables if "lora" in variable.path]
    assert adapters
    before = continue_greedily(model, prompts, max_new_tokens=8)
    for variable in adapters:
        variable.assign(random.normal(0.0, 0.3, variable.shape))
    rows = continue_greedily(model, prompts, max_new_tokens=8)
    assert rows != before
    assert_greedy(model, prompts, rows)


@pytest.mark.multi_backend
def test_int8(prompts):
    model = build()
    model.quantize("int8")
    assert_greedy(model, prompts, continue_greedily(model, prompts, max_new_tokens=8), margin=0.02)


def test_quantizing_after_generating(prompts):
    model = build()
    continue_greedily(model, prompts, max_new_tokens=8)
    model.quantize("int8")
    assert_greedy(model, prompts, continue_greedily(model, prompts, max_new_tokens=8), margin=0.02)


def test_mixed_bfloat16(prompts):
    model = build(dtype="mixed_bfloat16")
    assert_greedy(model, prompts, continue_greedily(model, prompts, max_new_tokens=8), margin=0.1)


def test_new_weights_are_seen(prompts):
    model = build()
    before = continue_greedily(model, prompts, max_new_tokens=8)
    set_weights(model.backbone, seed=5)
    rows = continue_greedily(model, prompts, max_new_tokens=8)
    assert rows != before
    assert_greedy(model, prompts, rows)


def test_packed_weights_and_layers_agree(models, shape_name, prompts, monkeypatch):
    model = models(shape_name)
    packed = continue_greedily(model, prompts, max_new_tokens=12)
    monkeypatch.setattr("keras_gemma.kernels.prefers_packed_weights", lambda: False)
    assert continue_greedily(model, prompts, max_new_tokens=12) == packed
