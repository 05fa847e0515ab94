"""Settings of `generate`: what they leave of a distribution, beside transformers, and what makes none."""

import keras
import keras_hub
import numpy as np
import pytest
from generation.conftest import random_prompts
from generation.conftest import rows_of
from generation.conftest import tokens_of

from keras_gemma.generation import CombinedSampler
from keras_gemma.generation import resolve_sampler
from keras_gemma.generation.logits_processors import penalize_repetition

SAMPLERS = keras_hub.samplers
SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 33, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.3, "top_p": 1.0, "min_p": 0.0},
]


def warped(transformers, torch, logits, temperature=1.0, top_k=None, top_p=1.0, min_p=None):
    """What transformers makes of logits, its warpers in the order in which its `generate` has them."""
    process = transformers.generation.logits_process
    warpers = [process.TemperatureLogitsWarper(float(temperature))]
    warpers += [process.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [process.MinPLogitsWarper(min_p)] if min_p else []
    scores = process.LogitsProcessorList(warpers)(None, torch.tensor(logits))
    return torch.softmax(scores, dim=-1).numpy()


def test_distributions_are_those_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (4, 50)).astype("float32")
    for settings in SETTINGS:
        ours = CombinedSampler(**settings).compute_probabilities(logits)
        ours = keras.ops.convert_to_numpy(ours)
        np.testing.assert_allclose(ours, warped(transformers, torch, logits, **settings), atol=1e-6, err_msg=settings)

    tokens = random.integers(0, 50, (4, 9))
    processor = transformers.generation.logits_process.RepetitionPenaltyLogitsProcessor(1.3)
    theirs = processor(torch.tensor(tokens), torch.tensor(logits)).numpy()
    # Columns that hold nothing yet hold any id.
    padded = np.concatenate([random.integers(0, 50, (4, 3)), tokens, np.zeros((4, 2), int)], axis=1).astype("int32")
    filled = np.array([[False] * 3 + [True] * 9 + [False] * 2] * 4)
    ours = penalize_repetition(logits, padded, filled, 1.3)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(ours), theirs, rtol=1e-6)


def test_a_penalty_counts_prompt_and_continuation_alone(models):
    model, prompts = models(), random_prompts(5, 2, 9)
    settings = {"stop_token_ids": None, "max_new_tokens": 6}
    rows = rows_of(model.generate(tokens_of(prompts, 16), repetition_penalty=1e6, **settings))
    # Logits of either sign: no token comes twice, and none of the padding counts.
    assert all(len(set(row[len(p) :]) | set(p)) == len(set(p)) + 6 for row, p in zip(rows, prompts))
    free = rows_of(model.generate(tokens_of(prompts, 16), **settings))
    assert rows_of(model.generate(tokens_of(prompts, 16), repetition_penalty=1.0, **settings)) == free
    alone = [rows_of(model.generate(tokens_of([p], 16), repetition_penalty=1.3, **settings))[0] for p in prompts]
    assert rows_of(model.generate(tokens_of(prompts, 16), repetition_penalty=1.3, **settings)) == alone != free


@pytest.mark.multi_backend
def test_temperature_0_is_greedy(models):
    model, inputs = models(), tokens_of(random_prompts(5, 9), 12)
    greedy = rows_of(model.generate(inputs, stop_token_ids=None))

    class Own(SAMPLERS.RandomSampler):
        pass

    for sampler in (
        SAMPLERS.RandomSampler(temperature=0),
        SAMPLERS.TopKSampler(k=5, temperature=0.0),
        SAMPLERS.TopPSampler(p=0.9, temperature=1e-30),
        SAMPLERS.GreedySampler(temperature=0),
        SAMPLERS.BeamSampler(temperature=0),
        SAMPLERS.ContrastiveSampler(temperature=0),
        CombinedSampler(temperature=0, top_k=3),
        Own(temperature=0),
    ):
        assert rows_of(model.generate(inputs, stop_token_ids=None, sampler=sampler)) == greedy, type(sampler)
    for settings in ({"temperature": 0}, {"temperature": 0.0, "top_p": 0.5}, {"top_k": 1}, {"top_p": 1e-9}):
        assert rows_of(model.generate(inputs, stop_token_ids=None, seed=1, **settings)) == greedy, settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAMPLERS.RandomSampler(temperature=-1), "`temperature` is a number of at least 0.*Received: -1"),
        (lambda: SAMPLERS.RandomSampler(temperature=float("nan")), "`temperature`.*Received: nan"),
        (lambda: SAMPLERS.GreedySampler(temperature=float("inf")), "`temperature`.*Received: inf"),
        (lambda: SAMPLERS.BeamSampler(temperature="hot"), "`temperature`.*Received: 'hot'"),
        (lambda: SAMPLERS.TopKSampler(k=0), "`k` is an integer from 1 to 500.*Received: 0"),
        (lambda: SAMPLERS.TopKSampler(k=501), "`k` is an integer from 1 to 500.*Received: 501"),
        (lambda: SAMPLERS.TopKSampler(k=2.0), "`k` is an integer.*Received: 2.0"),
        (lambda: SAMPLERS.TopPSampler(p=0), "`p` is a number above 0 and at most 1. Received: 0"),
        (lambda: SAMPLERS.TopPSampler(p=1.1), "`p`.*Received: 1.1"),
        (lambda: SAMPLERS.TopPSampler(p=0.5, k=501), "`k`.*Received: 501"),
        (lambda: SAMPLERS.ContrastiveSampler(k=501), "`k`.*Received: 501"),
        (lambda: SAMPLERS.ContrastiveSampler(alpha=2), "`alpha`.*Received: 2"),
        (lambda: SAMPLERS.BeamSampler(num_beams=0), "`num_beams` is an integer of at least 1. Received: 0"),
    ],
)
def test_samplers_that_make_no_distribution(models, make, message):
    with pytest.raises(ValueError, match=message):
        resolve_sampler(make(), 500)
    with pytest.raises(ValueError, match=message):
        models().compile(sampler=make())
    with pytest.raises(ValueError, match=message):
        models().generate(tokens_of(random_prompts(3), 5), sampler=make(), stop_token_ids=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "`temperature`"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"temperature": True}, "`temperature`"),
        ({"top_k": 0}, "`top_k` is an integer from 1 to 500"),
        ({"top_k": 501}, "`top_k` is an integer from 1 to 500"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"top_p": 1.5}, "`top_p`"),
        ({"min_p": -0.1}, "`min_p`"),
        ({"min_p": 1.1}, "`min_p`"),
        ({"repetition_penalty": 0}, "`repetition_penalty` is a number above 0"),
        ({"repetition_penalty": 1.1, "sampler": "beam"}, "BeamSampler"),
        ({"temperature": 1, "sampler": "top_k"}, "take the place of a sampler.*'top_k' and temperature"),
        ({"num_return_sequences": 0, "temperature": 1}, "`num_return_sequences` is an integer"),
        ({"num_return_sequences": 2}, "GreedySampler would write the same text 2 times"),
        ({"num_return_sequences": 2, "sampler": "beam"}, "BeamSampler would write"),
        ({"return_log_probs": True, "sampler": "contrastive"}, "ContrastiveSampler"),
        ({"stop": "x"}, "no preprocessor"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": 3}, "a string or a list of strings"),
    ],
)
def test_arguments_that_are_refused(models, settings, message):
    models().compile()
    with pytest.raises(ValueError, match=message):
        models().generate(tokens_of(random_prompts(3), 5), stop_token_ids=None, **settings)


def test_other_numbers_compile_nothing(models):
    model, inputs = models(), tokens_of(random_prompts(5), 20)
    settings = {"stop_token_ids": None, "seed": 1}
    first = {"temperature": 0.5, "top_k": 17, "top_p": 0.9, "repetition_penalty": 1.1}
    model.generate(inputs, **first, **settings)
    model.generate(inputs, sampler=SAMPLERS.RandomSampler(temperature=0.5), **settings)
    before = model.engine.compilations
    other = {"temperature": 1.5, "top_k": 20, "top_p": 0.3, "repetition_penalty": 1.7}
    assert rows_of(model.generate(inputs, **other, **settings)) != rows_of(model.generate(inputs, **first, **settings))
    hot, cold = (model.generate(inputs, temperature=t, **settings) for t in (3.0, 0.1))
    assert rows_of(hot) != rows_of(cold)
    random = model.generate(inputs, sampler=SAMPLERS.RandomSampler(temperature=3.0), **settings)
    assert rows_of(random) == rows_of(hot)
    assert model.engine.compilations == before + 1
