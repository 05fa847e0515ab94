"""One model serves several threads: each gets its own text, and no two draw the same numbers."""

import concurrent.futures

import numpy as np
from generation.conftest import rows_of
from generation.conftest import tokens_of
from keras_hub.samplers import RandomSampler

from keras_gemma.models import GemmaCausalLM

THREADS = 8


def _in_threads(call, count):
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [future.result() for future in [pool.submit(call, index) for index in range(count)]]


def test_threads_generate_what_one_alone_does(make_model):
    model = make_model(num_layers=2)
    other = GemmaCausalLM(type(model.backbone).from_config(model.backbone.get_config()), model.preprocessor)
    other.set_weights(model.get_weights())
    prompts = [tokens_of([np.arange(4 + index, 4 + 9 * index + 9) % 480], 100) for index in range(THREADS)]
    settings = {"stop_token_ids": None, "max_new_tokens": 6}
    alone = [rows_of(other.generate(prompt, **settings)) for prompt in prompts]
    # No program is compiled yet when all of them begin.
    assert _in_threads(lambda index: rows_of(model.generate(prompts[index], **settings)), THREADS) == alone
    assert model.engine.compilations == other.engine.compilations
    for weight in model.weights:
        weight.assign(weight * 1.5)
    other.set_weights(model.get_weights())
    alone = [rows_of(other.generate(prompt, **settings)) for prompt in prompts]
    assert _in_threads(lambda index: rows_of(model.generate(prompts[index], **settings)), THREADS) == alone


def test_texts_of_threads_without_a_seed_differ(make_model):
    model = make_model()
    model.compile(sampler="random")
    texts = _in_threads(lambda _: model.generate("a", max_new_tokens=8), 24)
    texts += ["".join(pieces) for pieces in zip(*(model.stream("a", max_new_tokens=8) for _ in range(2)))]
    assert len(set(texts)) == len(texts)
    seeded = _in_threads(lambda _: model.generate("a", max_new_tokens=8, seed=3), 8)
    assert len(set(seeded)) == 1


def test_calls_one_after_another_are_those_of_the_sampler(make_model):
    def sampled(model, **kwargs):
        return [model.generate("a", max_new_tokens=8, **kwargs) for _ in range(3)]

    model = make_model()
    expected = sampled(model, sampler=(sampler := RandomSampler(seed=5)))
    assert len(set(expected)) == 3
    again = RandomSampler(seed=5)
    # A stream that nobody draws from is over when nobody holds it.
    model.stream("a", max_new_tokens=8, sampler=again)
    assert sampled(model, sampler=again) == expected
    assert sampled(model, sampler=sampler) != expected
