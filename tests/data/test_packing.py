"""Packed rows against separate ones: the same logits, gradients and losses, and little padding."""

import keras
import numpy as np
import pytest

from keras_gemma.data import packing
from keras_gemma.data.packed_examples import packed
from tests.numerics.references import gradients
from tests.numerics.references import logits
from tests.numerics.references import ours

TEXTS = ["the License", "a work", "you may", "12 34", "Hi", "any person", "\n\n", "to the extent permitted"]
PAIRS = {"prompts": TEXTS, "responses": [text[::-1] for text in TEXTS]}
DIALOGUES = [[{"role": "user", "content": text}, {"role": "model", "content": "12"}] for text in TEXTS]
KINDS = {"texts": TEXTS, "pairs": PAIRS, "dialogues": DIALOGUES}
LENGTH = 64


@pytest.fixture(scope="module")
def preprocessor(make_preprocessor):
    return make_preprocessor(sequence_length=LENGTH)


def row_batch(preprocessor, examples):
    """All examples as one batch of packed rows, and where each of them lies: the row and its columns."""
    tokens = preprocessor.unpadded(examples)
    rows = packing.best_fit([len(example["token_ids"]) for example in tokens], LENGTH)
    batch = packing.packed_batch([[tokens[i] for i in row] for row in rows], LENGTH)
    places = {}
    for i, row in enumerate(rows):
        ends = np.cumsum([len(tokens[j]["token_ids"]) for j in row])
        places.update({j: (i, slice(end - len(tokens[j]["token_ids"]), end)) for j, end in zip(row, ends)})
    return batch, places


# === Parity ===


@pytest.fixture
def small(shape):
    return {**shape, "num_layers": 1}


@pytest.mark.multi_backend
def test_packed_examples_give_the_logits_and_gradients_of_separate_ones(small, preprocessor):
    examples = [*TEXTS[:3], *({"prompts": text, "responses": text[::-1]} for text in TEXTS[3:6]), *DIALOGUES[6:]]
    (x, y, weights), places = row_batch(preprocessor, examples)
    separate_x, separate_y, separate_weights = keras.tree.map_structure(
        keras.ops.convert_to_numpy, preprocessor(examples)
    )
    assert len(y) < len(separate_y), "nothing is packed"

    model = ours(small)
    received, expected = logits(model, x), logits(model, separate_x)
    for example, place in places.items():
        count = place[1].stop - place[1].start
        np.testing.assert_allclose(received[place], expected[example, :count], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(weights[place], separate_weights[example, :count])
    assert weights.sum() == separate_weights.sum()

    received = gradients(model, x, y, weights)
    expected = gradients(ours(small), separate_x, separate_y, separate_weights)
    for path, gradient in expected.items():
        assert np.abs(gradient).max() > 1e-4, path
        np.testing.assert_allclose(received[path], gradient, rtol=0, atol=1e-5, err_msg=path)


def test_no_example_sees_another(small, preprocessor):
    model = ours(small)
    (x, _, _), places = row_batch(preprocessor, TEXTS)
    before = logits(model, x)
    changed_row, changed_columns = places[0]
    assert sum(row == changed_row for row, _ in places.values()) > 2, "the row needs neighbours on both sides"
    x["token_ids"][changed_row, changed_columns] = 17
    after = logits(model, x)
    for example, place in places.items():
        if example == 0:
            assert np.abs(after[place] - before[place]).max() > 0.01
        else:
            np.testing.assert_array_equal(after[place], before[place])


# === Rows ===


def test_segments_count_from_1_and_positions_from_0(preprocessor):
    tokens = preprocessor.unpadded(["Hi", "a work"])
    first, second = (len(example["token_ids"]) for example in tokens)
    x, y, weights = packing.packed_batch([tokens, tokens[:1]], first + second + 2)
    assert x["segment_ids"].tolist()[0] == [1] * first + [2] * second + [0, 0]
    assert x["positions"].tolist()[0] == [*range(first), *range(second), 0, 0]
    assert x["padding_mask"].tolist() == (x["segment_ids"] > 0).astype(int).tolist()
    assert x["token_ids"][0, first : first + second].tolist() == tokens[1]["token_ids"].tolist()
    assert y[0, first : first + second].tolist() == tokens[1]["targets"].tolist()
    assert weights[1].tolist() == [1.0] * first + [0.0] * (second + 2)
    assert {str(field.dtype) for field in (*x.values(), y)} == {"int32"} and weights.dtype == "float32"


def test_unpadded_examples_are_rows_of_a_call_without_padding(preprocessor):
    long = {"prompts": "the License ", "responses": "a work " * 40}
    examples = [TEXTS[0], "you may " * 40, {"prompts": "Hi", "responses": "Yo"}, long, DIALOGUES[1]]
    x, y, weights = keras.tree.map_structure(
        keras.ops.convert_to_numpy, preprocessor(examples, sample_weight=np.arange(1.0, 6.0))
    )
    tokens = preprocessor.unpadded(examples, sample_weight=np.arange(1.0, 6.0))
    assert [len(example["token_ids"]) for example in tokens][1::2] == [LENGTH, LENGTH]
    for i, example in enumerate(tokens):
        count = len(example["token_ids"])
        np.testing.assert_array_equal(example["token_ids"], x["token_ids"][i, :count])
        np.testing.assert_array_equal(example["targets"], y[i, :count])
        np.testing.assert_array_equal(example["weights"], weights[i, :count])
        assert not weights[i, count:].any()


def test_best_fit_takes_the_tightest_row():
    # First fit would put the 3 into the row of the 5, which leaves no room for the 4 and a row more.
    assert packing.best_fit([5, 6, 4, 3, 2], 10) == [[1, 2], [0, 3, 4]]
    assert packing.best_fit([6, 7, 3], 10) == [[1, 2], [0]]


def test_every_example_lies_in_one_row():
    lengths = np.random.default_rng(0).integers(0, 33, 500)
    rows = packing.best_fit(lengths, 32)
    assert sorted(index for row in rows for index in row) == np.flatnonzero(lengths).tolist()
    assert max(lengths[row].sum() for row in rows) <= 32


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="row of 4 tokens"):
        packing.best_fit([1, 5], 4)


def test_rows_are_nearly_full_on_real_lengths(make_preprocessor, paragraphs):
    preprocessor = make_preprocessor(sequence_length=256)
    batches = packed(paragraphs, None, None, 8, preprocessor, shuffle=True)
    masks = np.concatenate([batches[i][0]["padding_mask"] for i in range(len(batches))])
    real = sum(len(example["token_ids"]) for example in preprocessor.unpadded(paragraphs, long_texts="split"))
    assert masks.sum() == real
    assert masks.mean() > 0.98
    assert preprocessor(paragraphs)[0]["padding_mask"].mean() < 0.7, "these lengths leave nothing to gain"


# === fit ===


# Batches of a single row, so that all of them have one shape and compile once. The perplexity counts tokens, however
# they are spread over batches.


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model(sequence_length=LENGTH)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    return model


def perplexity(model, x, **kwargs):
    return model.evaluate(x, verbose=0, return_dict=True, **{"batch_size": 8, **kwargs})["perplexity"]


def trained(model, x, **kwargs):
    return model.fit(x, batch_size=1, pack=True, verbose=0, **kwargs).history


@pytest.mark.multi_backend
def test_fit_and_evaluate_pack_every_kind_of_example(model):
    for examples in KINDS.values():
        expected = pytest.approx(perplexity(model, examples), rel=1e-4)
        assert perplexity(model, examples, batch_size=1, pack=True) == expected
        history = trained(model, examples, epochs=2, validation_data=examples)
        assert history["perplexity"] == [expected] * 2
        assert history["val_perplexity"] == [expected] * 2


@pytest.mark.multi_backend
def test_grain_data_sets_of_single_examples_are_packed(model):
    import grain

    rows = [dict(zip(PAIRS, row)) for row in zip(*PAIRS.values())]
    for examples in (TEXTS, rows, DIALOGUES):
        dataset = grain.MapDataset.source(examples)
        expected = pytest.approx(perplexity(model, examples), rel=1e-4)
        for form in (dataset, dataset.to_iter_dataset()):
            assert perplexity(model, form, batch_size=1, pack=True) == expected
    history = trained(model, dataset, epochs=2, validation_data=dataset)
    assert history["perplexity"] == [expected] * 2
    assert history["val_perplexity"] == [expected] * 2


def test_batch_size_counts_packed_rows(model, monkeypatch):
    given = {}
    monkeypatch.setattr(keras.Model, "fit", lambda self, x, **kwargs: given.update(kwargs, x=x))
    model.fit(TEXTS * 9, pack=True, batch_size=2, validation_data=TEXTS * 9, validation_batch_size=3)
    first, *_ = given["x"].get_numpy_iterator()
    first_of_validation, *_ = given["validation_data"].get_numpy_iterator()
    assert len(first[1]) == 2 and len(first_of_validation[1]) == 3
    assert (first[0]["segment_ids"].max(axis=1) > 2).all()


def test_validation_split_is_packed_too(model):
    expected = pytest.approx(perplexity(model, TEXTS[4:]), rel=1e-4)
    assert trained(model, TEXTS, validation_split=0.5)["val_perplexity"] == [expected]


def test_weights_of_examples_are_packed_with_them(model):
    weights = np.array([0, 2, 0, 1, 1, 0, 0, 3], "float32")
    expected = perplexity(model, TEXTS, sample_weight=weights)
    assert perplexity(model, TEXTS, sample_weight=weights, batch_size=1, pack=True) == pytest.approx(expected, rel=1e-4)


def epochs_of(preprocessor, shuffle, count=2):
    batches = packed(TEXTS * 20, None, None, 2, preprocessor, shuffle)
    return [np.concatenate([batches[i][0]["token_ids"] for i in range(len(batches))]) for _ in range(count)]


def test_each_epoch_has_the_same_examples_in_a_new_order(preprocessor):
    keras.utils.set_random_seed(0)
    first, second = epochs_of(preprocessor, shuffle=True)
    assert first.shape == second.shape and (first != second).any()
    np.testing.assert_array_equal(np.sort(first, axis=None), np.sort(second, axis=None))
    keras.utils.set_random_seed(0)
    np.testing.assert_array_equal(epochs_of(preprocessor, shuffle=True)[1], second)


def test_without_shuffle_the_order_is_kept(preprocessor):
    first, second = epochs_of(preprocessor, shuffle=False)
    np.testing.assert_array_equal(first, second)


# === Errors ===


def generator():
    yield TEXTS


def tf_data():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(TEXTS).batch(4)


@pytest.mark.parametrize(
    "x, beside, rule",
    [
        (generator(), {}, "packs examples, not batches.*generator"),
        (tf_data(), {}, "packs examples, not batches.*Grain MapDataset"),
        (TEXTS, {"y": TEXTS}, "next tokens"),
        (TEXTS, {"sample_weight": np.ones(3)}, "as many examples"),
        ("Hi", {}, "wrap a single example"),
        (DIALOGUES[0], {}, "single dialogue"),
        ([], {}, "At least one example"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_what_cannot_be_packed_is_refused(model, method, x, beside, rule):
    with pytest.raises(ValueError, match=rule):
        getattr(model, method)(x, pack=True, verbose=0, **beside)


def test_grain_batches_cannot_be_packed(model):
    import grain

    examples = grain.MapDataset.source(TEXTS).batch(2)
    pairs = grain.MapDataset.source([{"prompts": TEXTS[:2], "responses": TEXTS[:2]}])
    for form in (examples, pairs):
        with pytest.raises(ValueError, match="not batches"):
            model.fit(form, pack=True, verbose=0)
    with pytest.raises(ValueError, match="`sample_weight` weighs listed examples"):
        model.fit(grain.MapDataset.source(TEXTS), sample_weight=np.ones(8), pack=True, verbose=0)


def test_packing_needs_a_preprocessor(preprocessor):
    with pytest.raises(ValueError, match="preprocessor=None"):
        packed(TEXTS, None, None, 2, None)
    with pytest.raises(ValueError, match="nothing to predict"):
        packed([""], None, None, 2, type(preprocessor)(preprocessor.tokenizer, 8, add_end_token=False))
