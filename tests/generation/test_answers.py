"""Stop strings, several texts a prompt, log-probabilities, and streams of batches."""

import asyncio
import threading

import keras
import numpy as np
import pytest
from generation.conftest import build
from generation.conftest import rows_of

from keras_gemma.models import GeneratedText
from keras_gemma.models.stop_strings import StopStrings
from keras_gemma.models.stop_strings import StopWatch
from keras_gemma.models.text_generation import GrowingText

TEXTS = ["The license", "a copy of this", "You may"]
LONG = {"max_new_tokens": 40, "stop_token_ids": None, "seed": 3, "temperature": 1.0}


@pytest.fixture(scope="module")
def free(text_model):
    return text_model.generate(TEXTS, strip_prompt=True, **LONG)


def stop_strings_of(texts):
    """Strings that stand across the pieces of a vocabulary, each in the middle of one of the texts."""
    return [text[len(text) // 2 :][:5] for text in texts[:2]]


@pytest.mark.multi_backend
def test_stop_strings_end_each_row_by_itself(text_model, free):
    stop = stop_strings_of(free)
    expected = [min((text[: text.index(s)] for s in stop if s in text), key=len, default=text) for text in free]
    assert len({len(text) for text in expected[:2]} | {len(text) for text in free[:2]}) >= 3
    assert text_model.generate(TEXTS, strip_prompt=True, stop=stop, **LONG) == expected
    whole = text_model.generate(TEXTS, stop=stop, **LONG)
    assert whole == [prompt + text for prompt, text in zip(TEXTS, expected)]
    pieces = list(text_model.stream(TEXTS, stop=stop, **LONG))
    assert ["".join(piece for of, piece in pieces if of == row) for row in range(3)] == expected
    assert {row for row, _ in pieces} == {0, 1, 2}
    assert pieces != sorted(pieces, key=lambda piece: piece[0])

    tokens = text_model.preprocessor.generate_preprocess(TEXTS[:2])
    rows = rows_of(text_model.generate(tokens, strip_prompt=True, stop=stop, **{**LONG, "temperature": 0}))
    decode = text_model.preprocessor.decode
    greedy = text_model.generate(TEXTS[:2], strip_prompt=True, **{**LONG, "temperature": 0})
    for row, text in zip(rows, greedy):
        if any(s in text for s in stop):
            assert any(s in decode(row) for s in stop)
            assert not any(s in decode(row[:-1]) for s in stop)


def test_a_stop_string_ends_the_work(text_model, free):
    columns = []
    advance = type(text_model.engine).advance

    def counting(engine, decoding, new_tokens=None):
        advance(engine, decoding, new_tokens)
        columns.append(int(decoding.column))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(text_model.engine), "advance", counting)
        text_model.generate(TEXTS[0], stop=free[0][:1], **{**LONG, "max_new_tokens": 200})
    assert len(columns) == 1


def test_a_special_token_is_a_stop_string(text_model):
    tokenizer = text_model.preprocessor.tokenizer
    tokens = {name: text_model.generate(TEXTS, strip_prompt=True, **{**LONG, **arguments}) for name, arguments in {
        "string": {"stop": ["<eos>", "<end_of_turn>"], "max_new_tokens": 200},
        "ids": {"stop_token_ids": tokenizer.stop_token_ids, "max_new_tokens": 200},
    }.items()}  # fmt: skip
    assert tokens["string"] == tokens["ids"]


def test_pieces_never_show_the_beginning_of_a_stop_string():
    growing = GrowingText(StopStrings(["END", "\n\n"]))
    assert [growing.grow(text) for text in ("a E", "a EN", "a ENx", "a ENx\n", "a ENx\n\nb")] == [
        "a ",
        "",
        "ENx",
        "",
        "",
    ]
    assert growing.grow("a ENx\n\nb", complete=True) == ""
    growing = GrowingText(StopStrings("END"))
    assert (growing.grow("a E"), growing.grow("a E", complete=True)) == ("a ", "E")


def test_the_row_ends_with_the_token_that_completes_the_string():
    watch = StopWatch(StopStrings("ab"), lambda rows: ["".join(row) for row in rows], 2)
    assert watch.ends([["x", "a"], ["b", "a"]]) == {}
    assert watch.ends([["x", "a", "bc", "ab"], ["b", "a", "a"]]) == {0: 3}
    assert watch.ends([["x", "a", "bc"], ["b", "a", "a", "b"]]) == {1: 4}


def test_several_texts_of_a_prompt_and_what_the_model_thinks_of_them(text_model):
    model, preprocessor = text_model, text_model.preprocessor
    answers = model.generate(
        TEXTS[:2], num_return_sequences=3, return_log_probs=True, strip_prompt=True, stop="e", top_p=0.9, **LONG
    )
    assert [len(of_prompt) for of_prompt in answers] == [3, 3]
    assert all(isinstance(answer, GeneratedText) for of_prompt in answers for answer in of_prompt)
    assert len({answer.text for answer in answers[0]}) == 3
    plain = model.generate(TEXTS[:2], num_return_sequences=3, strip_prompt=True, stop="e", top_p=0.9, **LONG)
    assert [[answer.text for answer in of_prompt] for of_prompt in answers] == plain

    rows = [(preprocessor.prompt_ids(p), answer) for p, of_prompt in zip(TEXTS, answers) for answer in of_prompt]
    width = max(len(prompt) + len(answer.token_ids) for prompt, answer in rows)
    token_ids = np.zeros((len(rows), width), "int32")
    for row, (prompt, answer) in zip(token_ids, rows):
        row[: len(prompt) + len(answer.token_ids)] = [*prompt, *answer.token_ids]
    logits = model({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)})
    log_probs = keras.ops.convert_to_numpy(keras.ops.log_softmax(logits))
    for i, (prompt, answer) in enumerate(rows):
        columns = np.arange(len(answer.token_ids)) + len(prompt) - 1
        np.testing.assert_allclose(log_probs[i, columns, answer.token_ids], answer.log_probs, atol=1e-3)
        assert preprocessor.decode(answer.token_ids).split("e")[0] == answer.text


def test_log_probs_of_token_ids_and_of_longer_texts(text_model):
    tokens = text_model.preprocessor.generate_preprocess(TEXTS[:1])
    settings = {"stop_token_ids": None, "max_new_tokens": 250, "return_log_probs": True}
    answer = text_model.generate(TEXTS[0], **settings)
    outputs = text_model.generate(tokens, num_return_sequences=2, **settings, top_k=1)
    assert outputs["log_probs"].shape == outputs["token_ids"].shape
    begin = int(tokens["padding_mask"].sum())
    assert not outputs["log_probs"][:, :begin].any()
    # The cache and what is kept beside it grew on the way.
    np.testing.assert_allclose(outputs["log_probs"][0, begin:], answer.log_probs, atol=1e-4)
    assert answer.log_probs.shape == (250,)
    assert (answer.log_probs < 0).all()
    several = text_model.generate(iter(TEXTS[:2]), num_return_sequences=2, **{**LONG, "max_new_tokens": 3})
    assert [len(texts) for texts in several] == [2, 2]


def test_streaming_in_an_event_loop(text_model, free):
    threads = set()
    decodings = text_model.engine.decodings

    def observed(request):
        for decoding in decodings(request):
            threads.add(threading.current_thread())
            yield decoding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_model.engine, "decodings", observed)
        stream = text_model.astream(TEXTS, **LONG)
        ticks, pieces = asyncio.run(_read(text_model, stream))
    assert ["".join(piece for of, piece in pieces if of == row) for row in range(3)] == free
    assert ticks > len(pieces)
    assert threads and threading.main_thread() not in threads


async def _read(model, stream):
    ticks, pieces = 0, []

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    async for piece in stream:
        pieces.append(piece)
    ticking.cancel()
    async for _ in model.astream(TEXTS[0], **LONG):
        break
    return ticks, pieces


def test_a_penalty_gives_the_text_of_transformers(tmp_path, vocabulary):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = build()
    model.backbone.export_to_transformers(str(tmp_path))
    theirs = transformers.GemmaForCausalLM.from_pretrained(tmp_path).eval()
    ids = [2, 17, 301, 44, 17]
    free, penalized = (
        theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, **kwargs)[
            0
        ].tolist()
        for kwargs in ({}, {"repetition_penalty": 1.4})
    )
    inputs = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, 5))}
    settings = {"max_new_tokens": 24, "stop_token_ids": None}
    assert rows_of(model.generate(inputs, **settings)) == [free]
    assert rows_of(model.generate(inputs, repetition_penalty=1.4, **settings)) == [penalized]
    assert free != penalized
