"""What is compiled, how often, and whose memory it touches."""

import keras
import numpy as np
import pytest
from generation.conftest import build
from generation.conftest import random_prompts
from generation.conftest import rows_of
from generation.conftest import tokens_of

from keras_gemma.generation import Engine
from keras_gemma.generation import Request
from keras_gemma.generation import Sampling
from keras_gemma.generation import resolve_sampler
from keras_gemma.generation.buckets import bucket

compiles = pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs eagerly")


def request(prompts, new_tokens, stop_token_ids=(), sampler="greedy", **kwargs):
    sampling = Sampling(resolve_sampler(sampler))
    limits = [new_tokens] * len(prompts)
    return Request(prompts, limits, list(stop_token_ids), sampling.sampler, sampling.values, **kwargs)


@pytest.fixture(scope="module")
def engine():
    return Engine(build().backbone)


def test_buckets_waste_at_most_a_third():
    sizes = range(1, 3000)
    assert all(size <= bucket(size) <= max(1.5 * size, 1) for size in sizes)
    assert len({bucket(size) for size in sizes}) < 2 * np.log2(3000) + 2


@compiles
def test_new_sizes_within_a_bucket_compile_nothing(engine):
    engine.generate(request(random_prompts(9, 30, 4), 20))
    before = engine.compilations
    for lengths, new_tokens in (((32, 1, 2), 3), ((5, 5, 7), 90), ((20, 31, 32), 224)):
        rows, _ = engine.generate(request(random_prompts(*lengths), new_tokens, stop_token_ids=[7, 9]))
        assert all(len(row) <= new_tokens for row in rows)
    assert engine.compilations == before


@compiles
def test_another_sampler_compiles_the_loop_only(engine):
    engine.generate(request(random_prompts(9), 5))
    before = engine.compilations
    engine.generate(request(random_prompts(9), 5, sampler="top_k"))
    assert engine.compilations == before + 1
    engine.generate(request(random_prompts(12), 8, sampler="top_k"))
    engine.generate(request(random_prompts(12), 8))
    assert engine.compilations == before + 1


def test_a_batch_filled_up_is_the_batch(engine):
    prompts = random_prompts(9, 30, 4, 8, 1)
    five, _ = engine.generate(request(prompts, 6))
    alone = [engine.generate(request([prompt], 6))[0][0] for prompt in prompts]
    assert len(five) == 5
    assert five == alone


@pytest.mark.multi_backend
@pytest.mark.parametrize("sampler", ["greedy", "beam"])
def test_continuations_of_a_prompt_are_those_of_its_copies(engine, sampler):
    prompts = random_prompts(9, 30, 4)
    limits = request(prompts, 6, sampler=sampler, continuations=2)
    limits.new_tokens = [6, 2, 5]
    together, _ = engine.generate(limits)
    copies = request([prompt for prompt in prompts for _ in range(2)], 6, sampler=sampler)
    copies.new_tokens = [6, 6, 2, 2, 5, 5]
    assert together == engine.generate(copies)[0]
    assert [len(row) for row in together] == copies.new_tokens


def test_continuations_of_a_prompt_differ_by_chance(engine):
    rows, _ = engine.generate(request(random_prompts(9), 8, sampler="random", continuations=6))
    assert len(set(map(tuple, rows))) == 6


@pytest.mark.parametrize("most, capacities", [(None, [256, 384]), (300, [256, 300]), (10, [256, 289])])
def test_a_cache_is_no_larger_than_what_callers_need(engine, most, capacities):
    # A prompt of 32 columns once it is filled up.
    asked = request(random_prompts(9), 257, most_columns=most)
    expected, _ = engine.generate(request(random_prompts(9), 257))
    decoding = engine.start(asked)
    seen = [decoding.capacity]
    while not decoding.finished:
        engine.advance(decoding)
        seen.append(decoding.capacity)
    assert sorted(set(seen)) == capacities
    assert decoding.new_ids() == expected
    assert engine.start(request(random_prompts(9), 5, most_columns=40)).capacity == 40


def test_results_outlive_the_next_step(engine):
    decoding = engine.start(request(random_prompts(9), 12))
    seen = []
    while not decoding.finished:
        engine.advance(decoding, 3)
        seen.append(decoding.new_ids()[0])
    assert [len(ids) for ids in seen] == [3, 6, 9, 12]
    assert all(ids == seen[-1][: len(ids)] for ids in seen)
    assert seen[-1] == engine.generate(request(random_prompts(9), 12))[0][0]


def test_inputs_and_weights_survive(models):
    model = models()
    weights = model.get_weights()
    inputs = tokens_of(random_prompts(5, 9), 20)
    copies = {name: array.copy() for name, array in inputs.items()}
    first = model.generate(inputs, stop_token_ids=None)
    kept = {name: array.copy() for name, array in first.items()}
    model.generate(inputs, stop_token_ids=None)
    for name in inputs:
        np.testing.assert_array_equal(inputs[name], copies[name])
        np.testing.assert_array_equal(first[name], kept[name])
    for before, after in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(before, after)


@pytest.mark.multi_backend
def test_a_cache_gives_the_logits_of_the_whole(models):
    model = models()
    token_ids = np.array(random_prompts(9, 9))
    whole = model.predict_on_batch({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)})
    cache = model.build_cache(2, 12)
    first, _, cache = model.call_with_cache(token_ids[:, :6], cache, 0)
    second, hidden, cache = model.call_with_cache(token_ids[:, 6:7], cache, 6)
    third, _, _ = model.call_with_cache(token_ids[:, 7:], cache, 7)
    assert tuple(hidden.shape) == (2, 1, model.backbone.hidden_dim)
    pieces = np.concatenate([keras.ops.convert_to_numpy(piece) for piece in (first, second, third)], axis=1)
    np.testing.assert_allclose(pieces, keras.ops.convert_to_numpy(whole), atol=1e-4)


def test_training_goes_on_as_if_nothing_was_generated():
    inputs = tokens_of(random_prompts(8, 8), 9)
    batch = {name: array.astype("int32") for name, array in inputs.items()}

    def losses(generate_between):
        model = build()
        model.compile(optimizer=keras.optimizers.Adam(1e-3))
        history, outputs = [], []
        for _ in range(3):
            history.append(model.fit(batch, np.roll(batch["token_ids"], -1, 1), verbose=0).history["loss"][0])
            if generate_between:
                outputs.append(rows_of(model.generate(inputs, stop_token_ids=None, max_new_tokens=20, sampler="top_k")))
        return history, outputs, int(model.optimizer.iterations)

    expected, _, _ = losses(generate_between=False)
    history, outputs, steps = losses(generate_between=True)
    assert steps == 3
    np.testing.assert_allclose(history, expected, rtol=1e-6)
    assert outputs[0] != outputs[2]


@compiles
def test_fixed_sizes_compile_once_for_all_lengths_and_change_no_token():
    lengths = [(9, 3), (70, 40), (130, 1), (64, 60), (1, 100)]
    prompts = [random_prompts(length)[0] for length, _ in lengths]
    plain, fixed = Engine(build().backbone), Engine(build().backbone)
    fixed.fix_sizes(200, chunk=32)
    after_first = None
    for prompt, (_, new_tokens) in zip(prompts, lengths):
        asked = request([prompt], new_tokens)
        assert fixed.generate(asked)[0] == plain.generate(asked)[0]
        after_first = after_first or fixed.compilations
    assert fixed.compilations == after_first
    # What has no room is run as if nothing were fixed.
    longer = request([random_prompts(190)[0]], 40)
    assert fixed.generate(longer)[0] == plain.generate(longer)[0]
