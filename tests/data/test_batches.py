import itertools

import keras
import numpy as np
import pytest

from keras_gemma import data

TEXTS = ["a", "b", "c", "d", "e"]


def noted(x, y=None, sample_weight=None):
    """A preprocessing function that returns what it was given."""
    return x, y, sample_weight


def of_examples(x, y=None, sample_weight=None, batch_size=2, shuffle=False):
    return data.preprocessed(x, y, sample_weight, batch_size, noted, shuffle)


def of_batches(x):
    return data.preprocessed(x, None, None, None, noted)


class Pairs(keras.utils.PyDataset):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.epochs = []

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return [TEXTS[index]], None, np.array([float(index)])

    def on_epoch_begin(self):
        self.epochs.append("begin")

    def on_epoch_end(self):
        self.epochs.append("end")


def test_examples_come_in_batches_and_the_last_may_be_short():
    batches = of_examples(TEXTS)
    assert [batches[i][0] for i in range(len(batches))] == [["a", "b"], ["c", "d"], ["e"]]


def test_32_examples_make_a_batch_by_default():
    assert len(data.preprocessed(["a"] * 65, None, None, None, noted)) == 3


def test_labels_weights_and_fields_are_cut_alike():
    x = {"prompts": TEXTS, "responses": np.array(TEXTS), "nothing": None}
    x, y, weights = of_examples(x, list(range(5)), np.arange(5.0))[1]
    assert x["prompts"] == ["c", "d"] and x["responses"].tolist() == ["c", "d"] and "nothing" not in x
    assert y == [2, 3] and weights.tolist() == [2.0, 3.0]


def test_a_shuffled_epoch_keeps_examples_and_their_weights_together():
    keras.utils.set_random_seed(0)
    batches = of_examples(TEXTS, sample_weight=np.arange(5), shuffle=True)
    orders = []
    for _ in range(3):
        pairs = [pair for i in range(len(batches)) for pair in zip(batches[i][0], batches[i][2])]
        assert sorted(pairs) == list(zip(TEXTS, range(5)))
        orders.append(pairs)
    assert orders[0] != orders[1] != orders[2]


def test_an_epoch_that_ends_within_a_pass_keeps_its_order():
    batches = of_examples(TEXTS, shuffle=True)
    seen = [example for i in (0, 1) for example in batches[i][0]]
    batches.on_epoch_end()
    assert sorted(seen + batches[2][0]) == TEXTS


def test_a_series_is_taken_by_place_and_not_by_label():
    labelled = type("Series", (), {"__len__": lambda self: 2, "__array__": lambda self, *_, **__: np.array(["a", "b"])})
    assert data.batches.take(labelled(), [1, 0]).tolist() == ["b", "a"]


def test_a_tuple_is_not_a_list_of_examples():
    with pytest.raises(ValueError, match="pass a list"):
        of_examples((["a"], ["b"]))


def test_a_py_dataset_keeps_its_workers_and_its_epoch_hooks():
    pairs = Pairs(workers=3, max_queue_size=7)
    wrapped = of_batches(pairs)
    assert (len(wrapped), wrapped.workers, wrapped.max_queue_size, wrapped.num_batches) == (2, 3, 7, 2)
    assert wrapped[1] == (["b"], None, np.array([1.0]))
    wrapped.on_epoch_begin()
    wrapped.on_epoch_end()
    assert pairs.epochs == ["begin", "end"]


def test_a_list_is_a_batch_of_examples_and_a_tuple_has_parts():
    lists = list(of_batches(iter([["a", "b"], (["c", "d"],), (["e"], None, [1.0])])))
    assert lists == [(["a", "b"], None, None), (["c", "d"], None, None), (["e"], None, [1.0])]


def test_an_iterator_is_read_as_it_is_asked():
    first = next(of_batches(["a"] for _ in itertools.count()))
    assert first == (["a"], None, None)


def test_a_torch_loader_starts_anew_each_epoch():
    import torch

    class Loader(torch.utils.data.DataLoader):
        """As a user derives one."""

    wrapped = of_batches(Loader([{"token_ids": np.full(3, i)} for i in range(5)], batch_size=2))
    assert len(wrapped) == 3
    for _ in range(2):
        ids = [batch[0]["token_ids"][:, 0].tolist() for batch in wrapped]
        assert ids == [[0, 1], [2, 3], [4]]


def test_a_torch_loader_of_parts_is_unpacked():
    import torch

    rows = [({"token_ids": np.full(3, i)}, np.full(3, i + 1), np.ones(3)) for i in range(2)]
    ((x, y, weights),) = of_batches(torch.utils.data.DataLoader(rows, batch_size=2))
    assert (x["token_ids"].shape, y.shape, weights.shape) == ((2, 3), (2, 3), (2, 3))


def test_a_torch_loader_of_unknown_length_is_read():
    import torch

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(np.arange(4))

    wrapped = of_batches(torch.utils.data.DataLoader(Stream(), batch_size=2))
    assert [batch[0].tolist() for batch in wrapped] == [[0, 1], [2, 3]]


def test_a_grain_data_set_is_read_from_its_beginning_each_epoch():
    import grain

    wrapped = of_batches(grain.MapDataset.source(TEXTS).batch(2))
    for _ in range(2):
        assert [wrapped[i][0].tolist() for i in range(len(wrapped))] == [["a", "b"], ["c", "d"], ["e"]]


def test_a_grain_data_set_without_end_stays_one():
    import grain

    wrapped = of_batches(grain.MapDataset.source(TEXTS).batch(2).repeat())
    assert [batch[0].tolist() for batch in itertools.islice(wrapped, 4)] == [["a", "b"], ["c", "d"], ["e"], ["a", "b"]]


def test_finished_batches_pass_as_they_are():
    import grain
    import tensorflow as tf

    finished = {"token_ids": np.ones((2, 3), "int32")}, np.zeros((2, 3), "int32"), np.ones((2, 3), "float32")

    def refuse(*parts):
        raise AssertionError("preprocessed again")

    source = grain.MapDataset.source([finished])
    for form in (source, source.to_iter_dataset(), iter([finished]), tf.data.Dataset.from_tensors(finished)):
        batches = data.preprocessed(form, None, None, None, refuse)
        ((x, y, weights),) = itertools.islice(batches, 1)
        np.testing.assert_array_equal(x["token_ids"], finished[0]["token_ids"])
        np.testing.assert_array_equal(y, finished[1])
        np.testing.assert_array_equal(weights, finished[2])


@pytest.mark.parametrize("share, sizes", [(0.2, (4, 1)), (0.5, (2, 3)), (0.01, (4, 1))])
def test_validation_takes_the_last_examples(share, sizes):
    (x, y, weights), (x_last, y_last, weights_last) = data.split_off_validation(
        {"prompts": TEXTS}, None, np.arange(5), share
    )
    assert (len(x["prompts"]), len(x_last["prompts"])) == sizes
    assert x["prompts"] + x_last["prompts"] == TEXTS
    assert [*weights, *weights_last] == [0, 1, 2, 3, 4]
    assert y is None and y_last is None


@pytest.mark.parametrize(
    "x, weights, rule",
    [
        ("abc", None, "wrap a single example"),
        (b"abc", None, "wrap a single example"),
        (None, None, "as many examples|list or array"),
        ({"prompts": ["a"], "responses": ["b", "c"]}, None, "as many examples"),
        (TEXTS, np.ones(4), "as many examples"),
        ([], None, "At least one"),
        ([{"role": "user", "content": "a"}], None, "single dialogue"),
    ],
)
def test_what_is_not_a_collection_of_examples_is_refused(x, weights, rule):
    with pytest.raises(ValueError, match=rule):
        of_examples(x, sample_weight=weights)
