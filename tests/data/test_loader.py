"""From sources to the batches that `fit` reads, tokenised on the fly or ahead."""

import json

import grain
import keras
import numpy as np
import pytest

from keras_gemma.data import Stage
from keras_gemma.data import from_jsonl
from keras_gemma.data import from_tokens
from keras_gemma.data import mixture
from keras_gemma.data import tokenize_ahead
from keras_gemma.data import training_batches

LENGTH = 96
STAGES = [Stage({"text": 0.75, "pairs": 0.25}, examples=150), Stage({"text": 0.5, "pairs": 0.5}, examples=150)]


@pytest.fixture(scope="module")
def preprocessor(make_preprocessor):
    return make_preprocessor(sequence_length=LENGTH)


@pytest.fixture(scope="module")
def sources(paragraphs, tmp_path_factory):
    """Two jsonl sources: paragraphs, and prompts with responses."""
    folder = tmp_path_factory.mktemp("sources")
    rows = {
        "text": [{"text": paragraph, "url": "a"} for paragraph in paragraphs[:200]],
        "pairs": [{"prompts": text[:20], "responses": text[20:50]} for text in paragraphs[200:300]],
    }
    for name, examples in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, examples)), "utf-8")
    return {name: from_jsonl(folder / f"{name}.jsonl") for name in rows}


def mixed(sources, **kwargs):
    return mixture(sources, STAGES, **{"host_index": 0, "host_count": 1, **kwargs})


def assert_equal(received, expected):
    assert len(received) == len(expected)
    for leaves in zip(keras.tree.flatten(received), keras.tree.flatten(expected)):
        np.testing.assert_array_equal(*leaves)


def examples_of(batches):
    """The ids of every example in packed or padded batches, last target included."""
    found = []
    for x, y, _ in batches:
        for row in range(len(y)):
            for segment in range(1, x["segment_ids"][row].max() + 1):
                place = x["segment_ids"][row] == segment
                assert x["positions"][row][place].tolist() == list(range(place.sum()))
                found.append((*x["token_ids"][row][place].tolist(), y[row][place][-1]))
    return found


def test_a_mixture_of_text_and_pairs_comes_packed(sources, preprocessor):
    examples = mixed(sources)
    batches = list(training_batches(examples, preprocessor, batch_size=4, long_texts="truncate"))
    expected = [preprocessor.row(example.get("text") or example).ids[: LENGTH + 1] for example in examples]
    assert sorted(examples_of(batches)) == sorted(map(tuple, expected))
    assert {batch[1].shape for batch in batches[:-1]} == {(4, LENGTH)}


def test_weights_of_pairs_survive(sources, preprocessor):
    expected = sum(preprocessor(dict(example))[2].sum() for example in sources["pairs"])
    received = sum(weights.sum() for _, _, weights in training_batches(sources["pairs"], preprocessor, 4))
    assert received == expected > 0


def test_rows_of_a_stream_are_nearly_full(sources, preprocessor):
    examples = mixture(sources, {"text": 1}, host_index=0, host_count=1)[:1000]
    masks = [x["padding_mask"] for x, _, _ in training_batches(examples, preprocessor, 4)]
    assert np.concatenate(masks).mean() > 0.95


def test_without_packing_every_example_has_a_row(sources, preprocessor):
    batches = list(training_batches(sources["pairs"], preprocessor, 8, pack=False))
    examples = [dict(example) for example in sources["pairs"]][:8]
    x, y, weights = keras.tree.map_structure(keras.ops.convert_to_numpy, preprocessor(examples))
    # The last token is no input: nothing follows it.
    np.testing.assert_array_equal(batches[0][0]["padding_mask"].sum(axis=1), x["padding_mask"].sum(axis=1) - 1)
    np.testing.assert_array_equal(batches[0][1], y)
    np.testing.assert_array_equal(batches[0][2], weights)


def test_a_last_smaller_batch_may_be_left_out(sources, preprocessor):
    every = list(training_batches(sources["pairs"], preprocessor, 7))
    assert len(every[-1][1]) < 7
    assert_equal(list(training_batches(sources["pairs"], preprocessor, 7, drop_remainder=True)), every[:-1])


@pytest.mark.parametrize("pack", [True, False])
def test_a_restored_iterator_gives_the_same_batches(sources, preprocessor, pack):
    batches = training_batches(mixed(sources), preprocessor, 2, pack=pack, window=16)
    expected = list(batches)
    for seen in (0, 1, 9, len(expected) - 1):
        iterator = iter(batches)
        for _ in range(seen):
            next(iterator)
        # Through JSON: a state is plain numbers.
        state = json.loads(json.dumps(iterator.get_state()))
        restored = iter(training_batches(mixed(sources), preprocessor, 2, pack=pack, window=16))
        restored.set_state(state)
        assert_equal(list(restored), expected[seen:])


def test_two_hosts_read_disjoint_halves(sources, preprocessor):
    texts = {"text": grain.MapDataset.source([{"text": f"{i}"} for i in range(100)])}
    halves = []
    for host in (0, 1):
        examples = mixture(texts, [Stage({"text": 1}, 100)], host_index=host, host_count=2)
        halves.append(examples_of(training_batches(examples, preprocessor, 4)))
    assert len(halves[0]) == len(halves[1]) == 50
    assert not set(halves[0]) & set(halves[1])


# === Ahead ===


def test_tokenised_ahead_gives_the_batches_of_on_the_fly(sources, preprocessor, tmp_path):
    for name, source in sources.items():
        tokenize_ahead(source, preprocessor, tmp_path / f"{name}.array_record")
    tokens = {name: from_tokens(tmp_path / f"{name}.array_record") for name in sources}
    for kwargs in ({}, {"host_index": 1, "host_count": 2}):
        expected = list(training_batches(mixed(sources, **kwargs), preprocessor, 4))
        assert_equal(list(training_batches(mixed(tokens, **kwargs), preprocessor, 4)), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.array_record", "text.array_record"]


def test_examples_without_a_prediction_keep_their_place(make_preprocessor, tmp_path):
    preprocessor = make_preprocessor(sequence_length=LENGTH, add_end_token=False)
    tokenize_ahead(grain.MapDataset.source(["", "Hi"]), preprocessor, tmp_path / "a")
    source = from_tokens(tmp_path / "a")
    assert [len(source[i]["token_ids"]) for i in range(2)] == [0, len(preprocessor.row("Hi").ids) - 1]
    ((x, _, _),) = training_batches(source, preprocessor, 2)
    assert x["segment_ids"].max() == 1


def test_an_interrupted_run_leaves_no_file(preprocessor, tmp_path):
    with pytest.raises(ValueError, match="'text', or 'prompts'"):
        tokenize_ahead(grain.MapDataset.source([{"text": "a"}, {"body": "b"}]), preprocessor, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="without end"):
        tokenize_ahead(grain.MapDataset.source(["a"]).repeat(), preprocessor, tmp_path / "a")


def test_a_file_that_is_not_of_tokens_is_named(tmp_path):
    from keras_gemma.data import write_array_record

    write_array_record([{"a": 1}, {"b": 22}], tmp_path / "other")
    with pytest.raises(ValueError, match="other, record 0: not an example"):
        from_tokens(tmp_path / "other")


def test_tokens_of_pairs_longer_than_a_row_are_refused(preprocessor, tmp_path):
    pair = {"prompts": "the ", "responses": "License the " * 15}
    tokenize_ahead(grain.MapDataset.source([pair]), preprocessor, tmp_path / "a")
    with pytest.raises(ValueError, match=r"row of 32 tokens\. Received one of \d+"):
        next(iter(training_batches(from_tokens(tmp_path / "a"), preprocessor, 2, sequence_length=32)))


# === fit ===


@pytest.mark.multi_backend
def test_fit_takes_finished_batches_as_they_are(make_model, sources):
    model = make_model(sequence_length=LENGTH)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    # Batches of one shape compile once.
    examples = mixed(sources)[100:160]
    batches = training_batches(examples, model.preprocessor, 4, drop_remainder=True)
    expected = model.evaluate(iter(batches), verbose=0, return_dict=True)["perplexity"]
    history = model.fit(batches, validation_data=batches.map(lambda batch: batch), verbose=0).history
    assert history["perplexity"] == [pytest.approx(expected, rel=1e-4)]
    assert history["val_perplexity"] == [pytest.approx(expected, rel=1e-4)]


def test_finished_batches_are_not_packed_again(make_model, sources):
    model = make_model(sequence_length=LENGTH)
    batches = training_batches(mixed(sources), model.preprocessor, 4)
    with pytest.raises(ValueError, match="Single examples are expected, not batches"):
        model.fit(batches, pack=True, verbose=0)


@pytest.mark.parametrize(
    "example, rule",
    [
        ({"body": "a"}, "Received: 'body'"),
        ({"text": "a", "prompts": "b", "responses": "c"}, "Received: 'text', 'prompts', 'responses'"),
        ({"text": ["a", "b"]}, "not batches"),
        (["a", "b"], "not batches"),
        (np.array(["a", "b"]), "not batches"),
    ],
)
def test_what_is_no_example_is_refused(preprocessor, example, rule):
    with pytest.raises(ValueError, match=rule):
        next(iter(training_batches(grain.MapDataset.source([example]), preprocessor, 2)))
