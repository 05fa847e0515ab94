"""A text that is longer than a row is learned whole, each token once; what is dropped is counted and said."""

import itertools
import warnings

import grain
import keras
import numpy as np
import pytest

from keras_gemma.data import from_tokens
from keras_gemma.data import long_texts
from keras_gemma.data import tokenize_ahead
from keras_gemma.data import training_batches
from keras_gemma.training import ExactResume
from keras_gemma.training import tune

BOS, EOS = 2, 1
LENGTH = 12
LONG, SHORT = "the License and a work " * 9, "you may"
TEXTS = [LONG, SHORT, LONG[7:90], "12"]
PAIR = {"prompts": "the License ", "responses": "a work " * 40}
DIALOGUE = [{"role": "user", "content": "you may"}, {"role": "model", "content": "a work " * 40}]


@pytest.fixture
def preprocessor(make_preprocessor):
    return make_preprocessor(sequence_length=LENGTH)


def batches_of(preprocessor, how, texts, **kwargs):
    """All batches of a way to train on texts, and the warnings."""
    from keras_gemma.data import packed
    from keras_gemma.data import padded

    if how in ("packed", "padded"):
        call = padded if how == "padded" else packed
        between = (preprocessor,) if how == "padded" else ()
        batches = call(texts, None, None, 2, preprocessor, *between, **kwargs)
        return [batches[i] for i in range(len(batches))]
    return list(
        training_batches(grain.MapDataset.source(texts), preprocessor, 2, pack=how == "stream packed", **kwargs)
    )


WAYS = ("padded", "packed", "stream", "stream packed")


@pytest.mark.parametrize("how", WAYS)
def test_every_token_is_learned_once(preprocessor, how):
    with pytest.warns(UserWarning, match="of them is left out"):
        batches = batches_of(preprocessor, how, TEXTS)
    learned = [target for _, y, w in batches for target in y[w > 0]]
    expected = [i for text in TEXTS for i in [*preprocessor.tokenizer.encode(text), EOS]]
    assert sorted(learned) == sorted(expected)
    assert sum(weights.sum() for *_, weights in batches) == len(expected)
    assert all(y.shape[1] == LENGTH for _, y, _ in batches)


def test_a_document_has_one_end_and_a_start_in_each_row(preprocessor):
    with pytest.warns(UserWarning):
        rows = preprocessor.unpadded(TEXTS[:1], long_texts="split")
    ids = [BOS, *preprocessor.tokenizer.encode(LONG), EOS]
    assert len(rows) == 1 + -(-(len(ids) - 1 - LENGTH) // (LENGTH - 1)) > 3
    read = [rows[0]["token_ids"][0], *rows[0]["targets"]]
    for row in rows[1:]:
        # The token before the first that is learned is the last of the row before.
        assert row["token_ids"][:2].tolist() == [BOS, read[-1]] and row["weights"].tolist()[:2] == [0.0, 1.0]
        read += row["targets"][1:].tolist()
    assert read == ids and EOS not in np.concatenate([row["token_ids"] for row in rows])

    for length, start in itertools.product((1, 2, 3, 7), (True, False)):
        short = type(preprocessor)(preprocessor.tokenizer, length, add_start_token=start)
        with pytest.warns(UserWarning):
            rows = short.unpadded(TEXTS[:1], long_texts="split")
        learned = [target for row in rows for target in row["targets"][row["weights"] > 0]]
        assert learned == ids[1:] if start else ids[2:]
        assert max(len(row["targets"]) for row in rows) == length


def test_what_is_cut_is_counted_and_said_once(preprocessor, recwarn):
    warnings.simplefilter("always")
    tokens = [len(preprocessor.row(text).ids) for text in TEXTS]
    dropped = sum(max(0, count - LENGTH - 1) for count in tokens)
    for how in ("padded", "packed"):
        batches_of(preprocessor, how, TEXTS, long_texts="truncate")
        assert f"of 4 examples: 2 whose last {dropped} tokens are dropped" in str(recwarn.pop(UserWarning).message)
        batches_of(preprocessor, how, [PAIR, DIALOGUE])
        assert "of 2 examples: 2 whose last" in str(recwarn.pop(UserWarning).message)
        # The line of the user's.
        batches_of(preprocessor, how, TEXTS)
        warning = recwarn.pop(UserWarning)
        assert f"the longest has {max(tokens)}), of 4 examples: 2 texts, which are cut into" in str(warning.message)
        assert warning.filename == __file__
    for how in ("stream", "stream packed"):
        batches_of(preprocessor, how, [PAIR, *TEXTS, DIALOGUE])
        assert "so far" in str(recwarn.pop(UserWarning).message)
    for _ in range(2):
        preprocessor(TEXTS)
    assert f"2 whose last {dropped} tokens are dropped" in str(recwarn.pop(UserWarning).message)
    assert (preprocessor.cuts.examples, preprocessor.cuts.truncated) == (8, 4)
    for how in WAYS:
        batches_of(preprocessor, how, TEXTS[1::2])
    assert not recwarn.list


@pytest.mark.parametrize("how", WAYS)
def test_long_texts_can_be_refused(preprocessor, how):
    for examples in (TEXTS[1:], [PAIR], [DIALOGUE]):
        with pytest.raises(ValueError, match=r"fits into a row of 12 tokens.*Received one of \d+"):
            batches_of(preprocessor, how, examples, long_texts="refuse")
    with pytest.raises(ValueError, match=r"'split', 'truncate', 'refuse'\. Received: 'whole'"):
        batches_of(preprocessor, how, TEXTS, long_texts="whole")


def test_pairs_and_dialogues_stay_one_row(preprocessor):
    with pytest.warns(UserWarning):
        split = batches_of(preprocessor, "padded", [PAIR, DIALOGUE])
    with pytest.warns(UserWarning):
        called = preprocessor([PAIR, DIALOGUE])
    keras.tree.map_structure(np.testing.assert_array_equal, split, [called])


def test_rows_share_the_weight_of_their_text(preprocessor):
    from keras_gemma.data import padded

    with pytest.warns(UserWarning):
        batches = padded(TEXTS, None, [2.0, 3.0, 0.0, 1.0], 99, preprocessor, preprocessor)
    tokens = [len(preprocessor.row(text).ids) - 1 for text in TEXTS]
    assert batches[0][2].sum() == np.dot(tokens, [2, 3, 0, 1])
    with pytest.raises(ValueError, match="each column"):
        padded(TEXTS, None, np.ones((4, LENGTH)), 99, preprocessor, preprocessor)


def test_texts_are_tokenised_ahead_whole(preprocessor, tmp_path):
    source = grain.MapDataset.source(TEXTS)
    tokenize_ahead(source, preprocessor, tmp_path / "tokens.array_record")
    tokens = from_tokens(tmp_path / "tokens.array_record")
    assert len(tokens) == len(TEXTS)
    for how in ("split", "truncate"):
        for length in (LENGTH, 5):
            kwargs = {"sequence_length": length, "long_texts": how}
            with pytest.warns(UserWarning):
                expected = list(training_batches(source, preprocessor, 2, **kwargs))
            with pytest.warns(UserWarning):
                received = list(training_batches(tokens, preprocessor, 2, **kwargs))
            keras.tree.map_structure(np.testing.assert_array_equal, received, expected)
    with pytest.raises(ValueError, match="row of 12 tokens"):
        list(training_batches(tokens, preprocessor, 2, long_texts="refuse"))


@pytest.mark.parametrize("pack", [True, False])
def test_a_stream_goes_on_within_a_text(preprocessor, pack):
    with pytest.warns(UserWarning):
        batches = training_batches(grain.MapDataset.source(TEXTS * 3), preprocessor, 2, pack=pack, window=2)
        expected = list(batches)
        for count in range(len(expected)):
            iterator = iter(batches)
            for _ in range(count):
                next(iterator)
            state = iterator.get_state()
            other = iter(batches)
            other.set_state(state)
            received = list(other)
            assert len(received) == len(expected) - count
            keras.tree.map_structure(np.testing.assert_array_equal, received, expected[count:])


def test_fit_learns_whole_texts_in_shuffled_rows(make_model, tmp_path):
    model = make_model(sequence_length=LENGTH)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    with pytest.warns(UserWarning, match="Longer than a row"):
        whole = model.evaluate(TEXTS, batch_size=1, verbose=0, return_dict=True)
        history = model.fit(
            TEXTS, batch_size=1, epochs=2, validation_data=TEXTS, verbose=0,
            callbacks=[ExactResume(tmp_path, save_every_steps=3)],
        )  # fmt: skip
        packed = model.fit(TEXTS, batch_size=1, pack=True, verbose=0)
        tuned = tune(model, TEXTS, batch_size=1, epochs=1, pack=False, verbose=0)
        first_rows = model.evaluate(TEXTS, batch_size=1, verbose=0, return_dict=True, long_texts="truncate")
        assert model.predict(TEXTS, batch_size=1, verbose=0).shape[:2] == (4, LENGTH)
    expected = pytest.approx(whole["loss"], rel=1e-4)
    assert history.history["loss"] == [expected] * 2 == history.history["val_loss"]
    assert packed.history["loss"] == [expected]
    assert first_rows["loss"] != pytest.approx(whole["loss"], rel=1e-6)
    rows = len(model.preprocessor.rows(TEXTS))
    assert history.params["steps"] == rows > 4
    assert tuned.params["steps"] == rows


def test_windows_are_as_long_as_rows():
    for count, length, opened in itertools.product(range(2, 40), range(2, 9), (True, False)):
        found = long_texts.windows(count, length, opened)
        assert found[0][0] == 0 and found[-1][1] == count
        assert all(end - 1 == start for (_, end), (start, _) in itertools.pairwise(found))
        assert all(end - start + opened <= length + 1 for start, end in found[1:])
