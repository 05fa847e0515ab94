"""What goes into `generate`, `stream` and `chat`, and what comes out."""

import numpy as np
import pytest
from generation.conftest import build
from generation.conftest import random_prompts
from generation.conftest import rows_of
from generation.conftest import tokens_of

from keras_gemma.models.text_generation import text_pieces

TEXTS = ["The license", "a copy of this"]
DIALOGUE = [{"role": "user", "content": "May I copy it?"}]
SHORT = {"max_new_tokens": 6, "stop_token_ids": None}


@pytest.mark.multi_backend
def test_strings(text_model):
    one, two = text_model.generate(TEXTS, **SHORT)
    assert one.startswith(TEXTS[0])
    assert two.startswith(TEXTS[1])
    assert text_model.generate(TEXTS[0], **SHORT) == one
    assert text_model.generate({"prompts": TEXTS}, **SHORT) == [one, two]
    assert text_model.generate(np.array(TEXTS), **SHORT) == [one, two]


def test_without_the_prompt(text_model):
    whole = text_model.generate(TEXTS, **SHORT)
    new = text_model.generate(TEXTS, strip_prompt=True, **SHORT)
    assert [prompt + text for prompt, text in zip(TEXTS, new)] == whole


def test_text_is_that_of_the_token_ids(text_model):
    preprocessor = text_model.preprocessor
    tokens = text_model.generate(preprocessor.generate_preprocess(TEXTS), **SHORT)
    assert preprocessor.generate_postprocess(tokens) == text_model.generate(TEXTS, **SHORT)


def test_dialogues(text_model):
    prompt = text_model.preprocessor.tokenizer.apply_chat_template(DIALOGUE, add_generation_prompt=True, tokenize=False)
    expected = text_model.generate(prompt, strip_prompt=True, allow_special_tokens=True, **SHORT)
    assert "".join(text_model.stream(prompt, allow_special_tokens=True, **SHORT)) == expected
    assert text_model.generate(DIALOGUE, strip_prompt=True, **SHORT) == expected
    assert text_model.generate([DIALOGUE], strip_prompt=True, **SHORT) == [expected]
    assert text_model.chat(DIALOGUE, **SHORT) == expected


def test_data_sets(text_model):
    tf = pytest.importorskip("tensorflow")
    texts = [*TEXTS, "You may"]
    expected = text_model.generate(TEXTS, **SHORT) + text_model.generate(["You may"], **SHORT)
    assert text_model.generate(tf.data.Dataset.from_tensor_slices(texts).batch(2), **SHORT) == expected
    assert text_model.generate(iter([texts[:2], texts[2:]]), **SHORT) == expected
    tokens = text_model.generate(iter([tokens_of(random_prompts(3), 5), tokens_of(random_prompts(4, 2), 8)]), **SHORT)
    assert [len(row) for row in rows_of(tokens)] == [9, 10, 8]


@pytest.mark.multi_backend
def test_lengths(text_model):
    inputs = tokens_of(random_prompts(3, 6), 10)

    def lengths(**kwargs):
        outputs = text_model.generate(inputs, stop_token_ids=None, **kwargs)
        assert outputs["token_ids"].shape == outputs["padding_mask"].shape
        return [len(row) for row in rows_of(outputs)]

    assert lengths() == [10, 10]
    assert lengths(max_length=8) == [8, 8]
    assert lengths(max_length=30) == [30, 30]
    assert lengths(max_new_tokens=2) == [5, 8]
    assert lengths(max_new_tokens=20) == [23, 26]
    assert lengths(max_new_tokens=4, max_length=8) == [7, 8]
    assert text_model.generate(inputs, stop_token_ids=None, max_new_tokens=2)["token_ids"].shape == (2, 10)


def test_the_sequence_length_bounds_text(text_model):
    length = text_model.preprocessor.sequence_length
    bounded = text_model.generate(TEXTS, stop_token_ids=None)
    assert bounded == text_model.generate(TEXTS, stop_token_ids=None, max_length=length)
    assert bounded != text_model.generate(TEXTS, stop_token_ids=None, max_length=length + 1)


def test_stop_tokens(text_model):
    tokenizer = text_model.preprocessor.tokenizer
    inputs = tokens_of(random_prompts(3, 6), 40)
    free = rows_of(text_model.generate(inputs, stop_token_ids=None))
    stop = free[0][5]
    first, _ = rows_of(text_model.generate(inputs, stop_token_ids=[stop]))
    assert first == free[0][: free[0].index(stop, 3) + 1]
    assert rows_of(text_model.generate(inputs)) == rows_of(
        text_model.generate(inputs, stop_token_ids=(tokenizer.end_token_id, tokenizer.end_of_turn_id))
    )


@pytest.mark.multi_backend
@pytest.mark.parametrize("prompt", [TEXTS[0], DIALOGUE])
def test_streaming(text_model, prompt):
    settings = {"max_new_tokens": 24, "sampler": "random", "stop_token_ids": None}
    for seed in range(3):
        pieces = list(text_model.stream(prompt, seed=seed, **settings))
        assert len(pieces) > 1
        assert "".join(pieces) == text_model.generate(prompt, strip_prompt=True, seed=seed, **settings)


def test_streaming_moves_the_sampler_on(text_model):
    text_model.compile(sampler="random")
    first, second = ("".join(text_model.stream(TEXTS[0], **SHORT)) for _ in range(2))
    assert first != second


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("text", ["naïve 😀 ok €5 👩‍👩‍👧", "\ufffd", "a\ufffd\ufffd\ufffd\ufffd\ufffdb", "日本"])
def test_no_piece_splits_a_character(text_model, text, step):
    preprocessor = text_model.preprocessor
    ids = preprocessor.tokenizer.encode(text)
    growing = [ids[:end] for end in range(step, len(ids) + step, step)]
    pieces = list(text_pieces(growing, preprocessor.decode))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_characters_stream_too(text_model):
    preprocessor = text_model.preprocessor
    first_byte = preprocessor.tokenizer.encode("\x00")[0]
    random = np.random.default_rng(0)
    for _ in range(50):
        ids = [first_byte + int(byte) for byte in random.integers(128, 256, 12)]
        growing = [ids[:end] for end in range(1, len(ids) + 1)]
        assert "".join(text_pieces(growing, preprocessor.decode)) == preprocessor.decode(ids)


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        ([], {}, "at least one example"),
        ("The license", {"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ("The license", {"max_length": 3}, "shorter than the whole sequence"),
        ("The license " * 50, {}, "shorter than the whole sequence"),
        ("The license", {"sampler": "topk"}, "'top_k'"),
        ("The license", {"stop_token_ids": "eos"}, "'auto', None or token ids"),
        (
            {"token_ids": np.ones((1, 3), "int32"), "padding_mask": np.ones((1, 3), "int32")},
            {},
            "shorter than the whole sequence",
        ),
        ({"token_ids": np.ones((1, 3), "int32"), "padding_mask": np.array([[0, 1, 0]])}, {}, "padded on the right"),
        ({"token_ids": np.ones((1, 3), "int32"), "padding_mask": np.zeros((1, 3))}, {}, "at least one token"),
        ({"token_ids": np.ones((0, 3), "int32"), "padding_mask": np.ones((0, 3), "int32")}, {}, "at least one prompt"),
        ({"token_ids": np.ones((1, 3), "int32")}, {}, "'padding_mask'"),
    ],
)
def test_refused(text_model, inputs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        text_model.generate(inputs, **kwargs)


def test_refused_streams(text_model):
    with pytest.raises(ValueError, match="`top_p`"):
        text_model.astream(TEXTS, top_p=2)
    with pytest.raises(ValueError, match="BeamSampler"):
        text_model.stream(TEXTS[0], sampler="beam")


def test_without_a_preprocessor():
    model = build()
    with pytest.raises(ValueError, match="preprocessor"):
        model.generate("text", stop_token_ids=None)
    with pytest.raises(ValueError, match="stop_token_ids='auto'"):
        model.generate(tokens_of(random_prompts(3), 5))


def test_a_data_set_of_single_prompts_gives_a_text_a_prompt(text_model):
    greedy = {**SHORT, "sampler": "greedy"}
    assert text_model.generate(iter(TEXTS), **greedy) == text_model.generate(TEXTS, **greedy)
    with pytest.raises(ValueError, match="at least one batch"):
        text_model.generate(iter([]), **SHORT)


def test_a_cache_without_room_or_of_keras_hubs_form_is_refused(text_model):
    tokens = np.ones((1, 2), "int32")
    with pytest.raises(ValueError, match="4 columns"):
        text_model.call_with_cache(tokens, text_model.build_cache(1, 4), 3)
    with pytest.raises(ValueError, match="build_cache"):
        text_model.call_with_cache(tokens, np.zeros((1, 2, 2, 4, 1, 8)), 0)
