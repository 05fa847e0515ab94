"""What is kept to tune on, and the account of what is not."""

import json

import grain
import pytest

from keras_gemma.data import from_jsonl
from keras_gemma.data import from_parquet
from keras_gemma.data import tuning_examples

PAIR = {"prompts": "To license\n", "responses": "To grant."}
DIALOGUE = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "You."}]


def test_what_is_complete_is_kept_as_it_is(make_preprocessor):
    preprocessor = make_preprocessor(sequence_length=40)
    kept, dropped = tuning_examples([{**PAIR, "source": "licence"}, dict(PAIR)], preprocessor)
    assert kept == [PAIR, PAIR]
    assert (dropped.total, dropped.count, dropped.by_reason) == (2, 0, {})


@pytest.mark.parametrize(
    "example, reason",
    [
        ({"prompts": "To license", "responses": " \n"}, "empty response"),
        ({"prompts": "", "responses": "To grant."}, "empty prompt"),
        ({"prompts": "To license"}, "missing fields: 'prompts' and 'responses', or 'messages'"),
        ({"prompts": "To license", "responses": None}, "responses that are no strings"),
        ({"prompts": "To license", "responses": "grant " * 50}, "longer than 40 tokens"),
        ("To license", "neither prompt and response nor a dialogue"),
        (DIALOGUE[1:], "not Gemma's form: Turns alternate and the user begins: message 0 must be by 'user'."),
        ({"messages": None}, "not Gemma's form"),
        (DIALOGUE[:1], "empty response"),
    ],
)
def test_what_is_dropped_is_counted_with_its_reason(make_preprocessor, example, reason):
    fitting = DIALOGUE if reason.startswith(("not", "empty response")) and not isinstance(example, dict) else PAIR
    kept, dropped = tuning_examples([fitting, example, fitting], make_preprocessor(sequence_length=40))
    assert kept == [fitting, fitting]
    ((received, numbers),) = dropped.by_reason.items()
    assert received.startswith(reason)
    assert numbers == [1]


def test_the_longest_example_that_a_row_holds_is_kept(make_preprocessor):
    preprocessor = make_preprocessor()
    row = len(preprocessor.row(PAIR).ids)
    assert tuning_examples([PAIR], make_preprocessor(sequence_length=row - 1))[0] == [PAIR]
    with pytest.raises(ValueError, match=f"(?s)No example is left.*longer than {row - 2} tokens"):
        tuning_examples([PAIR], make_preprocessor(sequence_length=row - 2))


def test_filters_see_both_sides_and_their_reasons_count(make_preprocessor):
    seen = []

    def no_second_round(said, answered):
        seen.append((said, answered))
        return "asked twice" if "\n" in said else None

    long = [*DIALOGUE, {"role": "user", "content": "Me?"}, {"role": "model", "content": "Yes."}]
    kept, dropped = tuning_examples(
        [DIALOGUE, long], make_preprocessor(sequence_length=200), filters=[no_second_round, lambda *texts: None]
    )
    assert seen == [("Who?", "You."), ("Who?\nMe?", "You.\nYes.")]
    assert kept == [DIALOGUE]
    assert dropped.by_reason == {"asked twice": [1]}


def test_every_source_gives_the_same(make_preprocessor, tmp_path):
    preprocessor = make_preprocessor(sequence_length=40)
    pairs = [PAIR, {"prompts": "Work\n", "responses": ""}, {"prompts": "Source\n", "responses": "The form."}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(pairs), tmp_path / "pairs.parquet")
    expected = [pairs[0], pairs[2]], {"empty response": [1]}
    for source in (
        pairs,
        {name: [pair[name] for pair in pairs] for name in PAIR},
        iter(pairs),
        grain.MapDataset.source(pairs),
        from_jsonl(tmp_path / "pairs.jsonl"),
        from_parquet(tmp_path / "pairs.parquet"),
    ):
        kept, dropped = tuning_examples(source, preprocessor)
        assert (kept, dropped.by_reason) == expected, source


def test_the_account(make_preprocessor):
    pairs = [PAIR, {"prompts": "Work\n", "responses": ""}, {"prompts": "", "responses": "x"}, {**PAIR, "responses": ""}]
    _, dropped = tuning_examples(pairs, make_preprocessor(sequence_length=40))
    lines = str(dropped).splitlines()
    assert lines[0] == "1 of 4 examples kept"
    assert lines[1] == '  2 dropped: empty response (number 1: {"prompts": "Work\\n", "responses": ""})'
    assert json.loads(json.dumps(dropped.to_json())) == {
        "total": 4,
        "kept": 1,
        "dropped": {
            "empty response": {"count": 2, "examples": [1, 3]},
            "empty prompt": {"count": 1, "examples": [2]},
        },
    }


def test_one_form_a_source(make_preprocessor):
    with pytest.raises(ValueError, match="Received both"):
        tuning_examples([PAIR, DIALOGUE], make_preprocessor(sequence_length=100))
    with pytest.raises(ValueError, match="without end"):
        tuning_examples(grain.MapDataset.source([PAIR]).repeat(), make_preprocessor())
