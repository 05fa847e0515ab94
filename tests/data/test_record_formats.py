"""Records of other tools are read as ours are."""

import numpy as np
import pytest

from keras_gemma.data import preference_pairs
from keras_gemma.data import record_formats
from keras_gemma.data import tuning_examples
from keras_gemma.data.loader import tokens_of
from keras_gemma.data.long_texts import Cuts
from keras_gemma.models import GemmaRewardModelPreprocessor
from keras_gemma.models.reward_model import _as_columns


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TEXTS = {"prompts": "the ", "responses": "Work"}
ASKED, DIALOGUE = [user("Who?")], [user("Who?"), assistant("You.")]
SHAREGPT = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "You."}]

# A record of each kind, and what it means in our fields.
TUNING = {
    "TRL": ({"prompt": "the ", "completion": "Work", "id": 1}, TEXTS),
    "TRL, messages": ({"prompt": ASKED, "completion": DIALOGUE[1:]}, {"prompts": ASKED, "responses": "You."}),
    "TRL, both": ({"prompt": "Who?", "completion": DIALOGUE[1:]}, {"prompts": ASKED, "responses": "You."}),
    "TRL, dialogue": ({"messages": DIALOGUE, "source": "x"}, DIALOGUE),
    "Alpaca": ({"instruction": "Who?", "input": "", "output": "You.", "text": "### Who?"}, DIALOGUE),
    "Alpaca, input": (
        {"instruction": "Name it", "input": "Work", "output": "a"}, [user("Name it\n\nWork"), assistant("a")]
    ),
    "Dolly": ({"instruction": "Who?", "context": "", "response": "You.", "category": "qa"}, DIALOGUE),
    "ShareGPT": ({"id": "a", "conversations": SHAREGPT}, DIALOGUE),
    "ShareGPT, bare": (SHAREGPT, DIALOGUE),
    "tables with nulls": ({"prompt": None, "completion": None, "messages": DIALOGUE}, DIALOGUE),
}  # fmt: skip


@pytest.mark.parametrize("record, ours", TUNING.values(), ids=TUNING)
def test_records_of_others_train_as_ours(make_preprocessor, record, ours):
    preprocessor = make_preprocessor(sequence_length=60)
    batches = [preprocessor([record, record]), preprocessor([ours, ours])]
    if isinstance(record, dict):
        batches.append(preprocessor({name: [value] * 2 for name, value in record.items() if value is not None}))
    for _, y, weights in batches:
        np.testing.assert_array_equal(y, batches[1][1])
        np.testing.assert_array_equal(weights, batches[1][2])
    kept, dropped = tuning_examples([record], preprocessor)
    assert dropped.count == 0 and preprocessor.row(kept[0]) == preprocessor.row(ours)
    if isinstance(record, dict):
        for name, values in tokens_of(record, preprocessor, 60, "refuse", Cuts())[0].items():
            np.testing.assert_array_equal(values, preprocessor.unpadded([ours])[0][name])


@pytest.mark.parametrize(
    "record, lack",
    [
        ({"instruction": "Who?", "input": ""}, "'output' is missing"),
        ({"completion": "You."}, "needs its 'prompt'"),
        ({"prompt": "Who?", "completion": "You.", "label": False}, "'label'"),
        ({"prompt": ASKED, "completion": ASKED}, "one message of the assistant"),
        ({"conversations": [{"from": "tool", "value": "1"}]}, "the roles"),
        ({"question": "Who?"}, "'prompts' and 'responses', or 'messages'"),
    ],
)
def test_what_a_record_lacks_is_said_by_name(make_preprocessor, record, lack):
    with pytest.raises(ValueError, match=lack):
        make_preprocessor()([record])
    with pytest.raises(ValueError, match=lack):
        tuning_examples([record], make_preprocessor())


def test_columns_of_different_lengths_are_named(make_preprocessor):
    with pytest.raises(ValueError, match="'prompt': 2, 'completion': 1"):
        make_preprocessor()({"prompt": ["a", "b"], "completion": ["c"]})


YES, NO = assistant("Yo"), assistant("No")
PAIR = {"prompts": [user("Hi")], "chosen": "Yo", "rejected": "No"}
PAIRS = {
    "strings": PAIR,
    "TRL": {"prompt": [user("Hi")], "chosen": "Yo", "rejected": "No", "score": 1},
    "messages": {"prompt": [user("Hi")], "chosen": [YES], "rejected": [NO]},
    "a string and messages": {"prompts": "Hi", "chosen": [YES], "rejected": [NO]},
    "implicit": {"chosen": [user("Hi"), YES], "rejected": [user("Hi"), NO]},
    "repeated": {"prompt": [user("Hi")], "chosen": [user("Hi"), YES], "rejected": [user("Hi"), NO]},
    "repeated, as UltraFeedback": {"prompt": "Hi", "chosen": [user("Hi"), YES], "rejected": [user("Hi"), NO]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Yo"},
        "rejected": {"from": "gpt", "value": "No"},
    },
}


@pytest.mark.parametrize("record", PAIRS.values(), ids=PAIRS)
def test_pairs_of_others_are_ours(tokenizer, record):
    preprocessor = GemmaRewardModelPreprocessor(tokenizer, sequence_length=40)
    expected = preprocessor({name: [value] for name, value in PAIR.items()})
    received = preprocessor({name: [value] for name, value in record.items()})
    np.testing.assert_array_equal(received[0]["token_ids"], expected[0]["token_ids"])
    assert preference_pairs([record], preprocessor)[0] == [PAIR] == [record_formats.pair(record)]


def test_reward_models_take_each_kind_in_one_list():
    expected = {name: [value] * len(PAIRS) for name, value in PAIR.items()}
    assert _as_columns(list(PAIRS.values())) == expected


def test_longer_dialogues_share_all_but_their_last_answers():
    shared = [user("Hi"), YES, user("And?")]
    pair = record_formats.pair({"chosen": [*shared, YES], "rejected": [*shared, NO], "margin": 0.5})
    assert pair == {"prompts": shared, "chosen": "Yo", "rejected": "No", "margins": 0.5}
    system = [{"role": "system", "content": "Be brief."}]
    pair = record_formats.pair({"prompt": system, "chosen": [*shared, YES], "rejected": [*shared, NO]})
    assert pair["prompts"] == system + shared


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ("Human: Hi\n\nAssistant: I'd", "Human: Hi\n\nAssistant: I'm", ("Human: Hi\n\nAssistant:", " I'd", " I'm")),
        ("The sea is deep", "The sea is", ("The sea", " is deep", " is")),
        ("a  b", "a  c", ("a", "  b", "  c")),
    ],
)  # fmt: skip
def test_texts_that_begin_alike_are_cut_between_words(chosen, rejected, expected):
    pair = record_formats.pair({"chosen": chosen, "rejected": rejected})
    assert tuple(pair.values()) == expected


@pytest.mark.parametrize(
    "record, lack",
    [
        ({"chosen": [YES], "rejected": [NO]}, "begin with the same messages"),
        ({"chosen": "Yo", "rejected": "No"}, "begin with the same words"),
        ({"chosen": [user("Hi"), YES, user("So?"), YES], "rejected": [user("Hi"), NO]}, "one message of the assistant"),
        ({"prompt": "Hi", "chosen": "Yo"}, "'rejected'"),
    ],
)
def test_what_a_pair_lacks_is_said_by_name(tokenizer, record, lack):
    preprocessor = GemmaRewardModelPreprocessor(tokenizer, sequence_length=40)
    with pytest.raises(ValueError, match=lack):
        preprocessor({name: [value] for name, value in record.items()})
    with pytest.raises(ValueError, match=lack):
        preference_pairs([record], preprocessor)


def test_prompts_and_what_else_is_known_of_them():
    prompts = record_formats.prompts_and_columns
    rows = [{"prompt": "a", "answer": 1}, {"prompt": ASKED, "answer": 2}]
    expected = ["a", ASKED], {"answer": [1, 2]}
    assert prompts(rows) == prompts({"prompts": ["a", ASKED], "answer": [1, 2]}) == expected
    assert prompts(["a", SHAREGPT[:1]]) == (["a", ASKED], {})
    for wrong, rule in {
        "a single dialogue": ASKED,
        "one field 'prompt'": [{"question": "a"}],
        "same fields.*number 1": [rows[0], {"prompt": "b"}],
        "as many examples": {"prompt": ["a", "b"], "answer": [1]},
    }.items():
        with pytest.raises(ValueError, match=wrong):
            prompts(rule)
