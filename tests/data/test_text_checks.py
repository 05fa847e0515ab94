"""What is text and what is a list of it: the same everywhere, and an error that says which one is none."""

import json

import grain
import numpy as np
import pytest

from keras_gemma.data import from_jsonl
from keras_gemma.data import preference_pairs
from keras_gemma.data import text_checks
from keras_gemma.data import training_batches
from keras_gemma.data import tuning_examples
from keras_gemma.models import GemmaRewardModel
from keras_gemma.models import GemmaRewardModelPreprocessor
from keras_gemma.rlhf import ReinforceTrainer

SURROGATE = json.loads(r'"cut \ud83d"')
CIRCLE = []
CIRCLE.append(CIRCLE)
DEEP = "end"
for _ in range(100_000):
    DEEP = [DEEP]

BAD = {
    "surrogate": (SURROGATE, "lone surrogate U\\+D83D", "a lone surrogate"),
    "bytes": (b"caf\xe9", "byte 3 is 0xE9", "bytes that are not UTF-8"),
    "None": (None, "None, a missing value", "a missing value"),
    "NaN": (float("nan"), "nan, a missing value", "a missing value"),
    "number": (7, "Received: 7", "an int"),
}


def containers(columns):
    """Fields of lists in everything that holds such."""
    import pandas
    import pyarrow

    return [
        columns,
        {name: tuple(values) for name, values in columns.items()},
        {name: np.array(values) for name, values in columns.items()},
        {name: np.array([value.encode() for value in values]) for name, values in columns.items()},
        {name: pandas.Series(values, index=range(9, 9 - len(values), -1)) for name, values in columns.items()},
        pandas.DataFrame(columns, index=range(9, 9 - len(columns["prompts"]), -1)),
        pyarrow.table(columns),
    ]


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model(sequence_length=16)
    model.compile()
    return model


def in_grain(bad):
    # To Grain itself an element that is None is none at all.
    return grain.MapDataset.source([{"text": "a"}, {"text": bad}])


def test_every_container_holds_the_same_examples(model):
    columns = {"prompts": ["a work", "you", "the"], "responses": ["x", "yy", "z\0éro"]}
    x, _, _ = model.preprocessor(columns)
    losses, kept = set(), []
    for form in containers(columns):
        received = model.preprocessor(form)
        np.testing.assert_array_equal(received[0]["token_ids"], x["token_ids"])
        losses.add(tuple(model.evaluate(form, batch_size=2, verbose=0)))
        kept.append([dict(example) for example in tuning_examples(form, model.preprocessor)[0]])
    assert len(losses) == 1
    assert kept == [kept[0]] * len(kept)
    text, tokens = columns["responses"][2], model.preprocessor.tokenizer.encode(columns["responses"][2])
    assert model.preprocessor.tokenizer.detokenize([tokens]) == [text]


@pytest.mark.parametrize("bad, error, _", BAD.values(), ids=BAD)
def test_every_entry_names_the_text_that_is_none(model, bad, error, _):
    tokenizer, preprocessor = model.preprocessor.tokenizer, model.preprocessor
    rewards = GemmaRewardModelPreprocessor(tokenizer, sequence_length=16)
    pair = {"prompts": "a", "chosen": "b", "rejected": bad}
    numbered = {
        "tokenizer": lambda: tokenizer(["a", "b", bad]),
        "preprocessor": lambda: preprocessor(["a", "b", bad]),
        "fields": lambda: preprocessor({"prompts": ["a"] * 3, "responses": ["a", "b", bad]}),
        "dialogues": lambda: preprocessor([[{"role": "user", "content": text}] for text in ("a", "b", bad)]),
        "generate": lambda: model.generate(["a", "b", bad], max_new_tokens=1),
        "pack": lambda: model.fit(["a", "b", bad], pack=True, verbose=0),
        # In the third batch of examples, and known before the first.
        "fit": lambda: model.fit(["a", "b", bad], batch_size=1, shuffle=False, verbose=0),
        "evaluate": lambda: model.evaluate(np.array(["a", "b", bad], object), batch_size=1, verbose=0),
        "pairs": lambda: rewards({"prompts": ["a"] * 3, "chosen": ["b"] * 3, "rejected": ["a", "b", bad]}),
    }
    alone = {
        "encode": lambda: tokenizer.encode(bad),
        "stream": lambda: list(model.stream(bad, max_new_tokens=1)),
        "chat": lambda: model.chat([{"role": "user", "content": bad}], max_new_tokens=1),
        "training_batches": lambda: list(training_batches(in_grain(bad), preprocessor, 1)),
        "score": lambda: GemmaRewardModel(model.backbone, rewards).score([pair["prompts"]], [pair["rejected"]]),
        "scored_row": lambda: rewards.scored_row(pair["prompts"], pair["rejected"]),
    }
    for name, entry in {**numbered, **alone}.items():
        with pytest.raises(ValueError, match=f"(?s){'Example 2: .*' if name in numbered else ''}{error}"):
            entry()


def test_prompts_of_reinforcement_are_texts(model):
    trainer = ReinforceTrainer(model, lambda prompts, texts: [0.0] * len(texts), max_new_tokens=2)
    for bad, error, _ in BAD.values():
        with pytest.raises(ValueError, match=f"{error}.*number 1"):
            trainer.prompt_rows(["a", bad])
    assert trainer.prompt_rows(np.array(["a", "b"])) == trainer.prompt_rows(("a", b"b"))


@pytest.mark.parametrize("bad, _, reason", BAD.values(), ids=BAD)
def test_what_is_no_text_is_left_out_and_accounted_for(model, bad, _, reason):
    good = {"prompts": "a", "responses": "b"}
    dialogue = [{"role": "user", "content": "a"}, {"role": "model", "content": bad}]
    kept, dropped = tuning_examples(
        [good, {**good, "responses": bad}, dialogue, {**good, "prompts": bad}], model.preprocessor
    )
    assert kept == [good]
    assert [(text.split(" that are no ")[0], numbers) for text, numbers in dropped.by_reason.items()] == [
        ("responses", [1]),
        ("contents of messages", [2]),
        ("prompts", [3]),
    ]
    assert all(reason in text for text in dropped.by_reason)
    str(dropped).encode()

    pair = {"prompts": "a", "chosen": "b", "rejected": "c"}
    rewards = GemmaRewardModelPreprocessor(model.preprocessor.tokenizer, sequence_length=16)
    kept, dropped = preference_pairs([{**pair, "chosen": bad}, pair, {**pair, "margins": bad}], rewards)
    assert len(kept) == (2 if bad == 7 else 1)
    assert [0] in dropped.by_reason.values() and dropped.count == 3 - len(kept)


@pytest.mark.parametrize("nested", [DEEP, CIRCLE], ids=["deep", "circle"])
def test_what_is_nested_too_deep_is_no_text(model, nested):
    good = {"prompts": "a", "responses": "b"}
    kept, dropped = tuning_examples([good, nested, {**good, "responses": nested}], model.preprocessor)
    assert (kept, dropped.count) == ([good], 2)
    str(dropped)
    for entry in (
        lambda: model.preprocessor(["a", nested]),
        lambda: model.generate(nested),
        lambda: model.fit(["a", nested], verbose=0),
        lambda: model.preprocessor.tokenizer(nested),
    ):
        with pytest.raises(ValueError):
            entry()


def test_errors_name_file_and_line(model, tmp_path):
    path = tmp_path / "web.jsonl"
    lines = ['{"text": "a"}', "   ", "", "\t", '{"text": "b \\ud83d"}', '{"text": "c"}']
    path.write_text("\n".join(lines))
    source = from_jsonl(path)
    assert len(source) == 3
    assert next(iter(source.batch(2)))["text"].shape == (2,)
    with pytest.raises(ValueError, match=r"web.jsonl, line 5: .*lone surrogate"):
        list(training_batches(source, model.preprocessor, 2))
    with pytest.raises(ValueError, match=r"web.jsonl, line 5: .*lone surrogate"):
        list(training_batches(source.shuffle(seed=0).repeat(2), model.preprocessor, 2))
    path.write_text('{"text": "a"}\n' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"web.jsonl, line 2: .*recursion"):
        list(training_batches(from_jsonl(path), model.preprocessor, 2))
    path.write_text('{"prompts": "a", "responses": "b"}\n\n{"prompts": " ", "responses": "b"}\n')
    _, dropped = tuning_examples(from_jsonl(path), model.preprocessor)
    assert dropped.by_reason == {"empty prompt (white space alone)": [1]}
    assert f"(number 1, {path}, line 3: " in str(dropped)


def test_a_table_may_have_more_than_one_form(model):
    rows = [
        {"prompts": "a", "responses": "b", "messages": None},
        {"prompts": None, "responses": None, "messages": [{"role": "user", "content": "a"}]},
    ]
    assert len(list(training_batches(grain.MapDataset.source(rows), model.preprocessor, 1, pack=False))) == 2


def test_a_value_is_shown_however_it_is_made():
    assert text_checks.shown(SURROGATE) == r"'cut \ud83d'"
    assert len(text_checks.shown("x" * 10_000)) <= text_checks.SHOWN_CHARACTERS
    assert len(text_checks.shown(DEEP)) <= text_checks.SHOWN_CHARACTERS
