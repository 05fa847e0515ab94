"""fit, evaluate and predict on everything that they take.

With a learning rate of 0 the perplexity depends on the examples only (not on their order or batches), so every form
of the same examples must give the same perplexity as the plain list.
"""

import keras
import numpy as np
import pytest

TEXTS = ["the License", "a work", "you may", "12 34", "Hi", "any person", "\n\n", "to the extent permitted"]
PAIRS = {"prompts": TEXTS, "responses": [text[::-1] for text in TEXTS]}
DIALOGUES = [[{"role": "user", "content": text}, {"role": "model", "content": "12"}] for text in TEXTS]
BATCH = 4
LENGTH = 40


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model(sequence_length=LENGTH)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    return model


@pytest.fixture(scope="module")
def perplexities(model):
    """The perplexity of each kind of example as a list."""
    for examples in (TEXTS, PAIRS, DIALOGUES):
        weights = keras.ops.convert_to_numpy(model.preprocessor(examples)[2])
        assert (weights.sum(axis=1) > 0).all(), "every row needs something to learn"
    return {
        kind: model.fit(examples, batch_size=BATCH, verbose=0).history["perplexity"][0]
        for kind, examples in {"texts": TEXTS, "pairs": PAIRS, "dialogues": DIALOGUES}.items()
    }


def batches(examples=TEXTS):
    return [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]


class Texts(keras.utils.PyDataset):
    def __len__(self):
        return len(batches())

    def __getitem__(self, index):
        return batches()[index]


def tf_data(examples=TEXTS):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(examples).batch(BATCH)


def grain_map():
    import grain

    return grain.MapDataset.source(TEXTS).batch(BATCH)


def torch_loader(**kwargs):
    import torch

    return torch.utils.data.DataLoader(TEXTS, batch_size=BATCH, **kwargs)


LISTED = {
    "list": lambda: TEXTS,
    "array": lambda: np.array(TEXTS),
    "object array": lambda: np.array(TEXTS, dtype=object),
}
BATCHED = {
    "tf.data": tf_data,
    "grain.MapDataset": grain_map,
    "grain.IterDataset": lambda: grain_map().to_iter_dataset(),
    "PyDataset": Texts,
    "torch DataLoader": torch_loader,
}


# === Forms ===


@pytest.mark.multi_backend
@pytest.mark.parametrize("form", LISTED.values(), ids=LISTED)
def test_listed_examples_train_and_evaluate(model, perplexities, form):
    history = model.fit(form(), batch_size=BATCH, epochs=2, verbose=0).history
    assert history["perplexity"] == pytest.approx([perplexities["texts"]] * 2, rel=1e-4)
    evaluated = model.evaluate(form(), batch_size=BATCH, verbose=0, return_dict=True)
    assert evaluated["perplexity"] == pytest.approx(perplexities["texts"], rel=1e-4)
    assert model.predict(form(), batch_size=BATCH, verbose=0).shape == (8, LENGTH, model.backbone.vocabulary_size)


@pytest.mark.multi_backend
@pytest.mark.parametrize("form", BATCHED.values(), ids=BATCHED)
def test_data_sets_train_and_evaluate_for_several_epochs(model, perplexities, form):
    history = model.fit(form(), epochs=3, validation_data=form(), verbose=0).history
    assert history["perplexity"] == pytest.approx([perplexities["texts"]] * 3, rel=1e-4)
    assert history["val_perplexity"] == pytest.approx([perplexities["texts"]] * 3, rel=1e-4)
    evaluated = model.evaluate(form(), verbose=0, return_dict=True)
    assert evaluated["perplexity"] == pytest.approx(perplexities["texts"], rel=1e-4)
    assert model.predict(form(), verbose=0).shape == (8, LENGTH, model.backbone.vocabulary_size)


@pytest.mark.multi_backend
def test_generators_train_and_evaluate(model, perplexities):
    def forever():
        while True:
            yield from batches()

    history = model.fit(
        forever(), steps_per_epoch=2, epochs=2, validation_data=forever(), validation_steps=2, verbose=0
    ).history
    assert history["perplexity"] == pytest.approx([perplexities["texts"]] * 2, rel=1e-4)
    assert history["val_perplexity"] == pytest.approx([perplexities["texts"]] * 2, rel=1e-4)
    evaluated = model.evaluate((batch for batch in batches()), verbose=0, return_dict=True)
    assert evaluated["perplexity"] == pytest.approx(perplexities["texts"], rel=1e-4)


def test_an_iterator_of_batches_is_as_good_as_a_generator(model, perplexities):
    evaluated = model.evaluate(iter(batches()), verbose=0, return_dict=True)
    assert evaluated["perplexity"] == pytest.approx(perplexities["texts"], rel=1e-4)


def test_pairs_train_in_every_form(model, perplexities):
    rows = [dict(zip(PAIRS, values)) for values in zip(*PAIRS.values())]
    arrays = {name: np.array(values) for name, values in PAIRS.items()}
    for form in (PAIRS, arrays, rows):
        history = model.fit(form, batch_size=BATCH, verbose=0).history
        assert history["perplexity"] == pytest.approx([perplexities["pairs"]], rel=1e-4)
    assert model.fit(tf_data(PAIRS), verbose=0).history["perplexity"] == pytest.approx(
        [perplexities["pairs"]], rel=1e-4
    )


def test_dialogues_train_in_every_form(model, perplexities):
    generator = (batch for batch in batches(DIALOGUES))
    for form, kwargs in [({"messages": DIALOGUES}, {"batch_size": BATCH}), (generator, {})]:
        history = model.fit(form, verbose=0, **kwargs).history
        assert history["perplexity"] == pytest.approx([perplexities["dialogues"]], rel=1e-4)


@pytest.mark.multi_backend
def test_without_a_preprocessor_token_ids_train(make_model, model, perplexities):
    bare = make_model(with_preprocessor=False)
    bare.set_weights(model.get_weights())
    bare.compile(optimizer=keras.optimizers.SGD(0.0))
    x, y, weights = keras.tree.map_structure(keras.ops.convert_to_numpy, model.preprocessor(TEXTS))
    history = bare.fit(x, y, sample_weight=weights, batch_size=BATCH, verbose=0).history
    assert history["perplexity"] == pytest.approx([perplexities["texts"]], rel=1e-4)
    np.testing.assert_allclose(
        bare.predict(x, batch_size=BATCH, verbose=0), model.predict(TEXTS, batch_size=BATCH, verbose=0), atol=1e-5
    )


def test_without_a_preprocessor_batches_of_token_ids_train(make_model, model, perplexities):
    import tensorflow as tf
    import torch

    bare = make_model(with_preprocessor=False)
    bare.set_weights(model.get_weights())
    bare.compile(optimizer=keras.optimizers.SGD(0.0))
    data = keras.tree.map_structure(keras.ops.convert_to_numpy, model.preprocessor(TEXTS))
    rows = [keras.tree.map_structure(lambda array, i=i: array[i], data) for i in range(len(TEXTS))]
    for form in (
        tf.data.Dataset.from_tensor_slices(data).batch(BATCH),
        torch.utils.data.DataLoader(rows, batch_size=BATCH),
        (keras.tree.map_structure(lambda array, i=i: array[i : i + BATCH], data) for i in (0, BATCH)),
    ):
        assert bare.fit(form, verbose=0).history["perplexity"] == pytest.approx([perplexities["texts"]], rel=1e-4)


# === Learning ===


@pytest.mark.multi_backend
def test_fit_lowers_the_loss(make_model):
    model = make_model()
    model.compile(optimizer=keras.optimizers.Adam(0.02))
    history = model.fit(TEXTS, batch_size=BATCH, epochs=12, verbose=0).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert history["perplexity"][-1] < history["perplexity"][0]
    assert set(history) == {"loss", "perplexity", "token_accuracy", "gradient_norm", "tokens"}


def test_the_default_of_compile_trains(make_model):
    model = make_model()
    before = model.get_weights()
    model.fit(TEXTS, batch_size=BATCH, verbose=0)
    assert any((old != new).any() for old, new in zip(before, model.get_weights()))


def test_a_loss_of_ones_own_is_used(make_model):
    model = make_model()
    model.compile(optimizer="sgd", loss=lambda y, logits: 7.0 + 0.0 * keras.ops.mean(logits, axis=-1))
    weights = keras.ops.convert_to_numpy(model.preprocessor(TEXTS)[2])
    # Keras averages over positions unless the loss says otherwise.
    loss = model.evaluate(TEXTS, batch_size=8, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(7.0 * weights.mean(), rel=1e-4)


@pytest.mark.parametrize(
    "policy, optimizer",
    [
        pytest.param("mixed_bfloat16", keras.optimizers.Adam, marks=pytest.mark.multi_backend),
        ("bfloat16", keras.optimizers.Lion),
    ],
)
def test_bfloat16_policies_train(make_model, policy, optimizer):
    model = make_model(dtype=policy)
    model.compile(optimizer=optimizer(0.02))
    losses = model.fit(TEXTS, batch_size=BATCH, epochs=12, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_an_optimizer_that_cannot_move_bfloat16_weights_is_warned_about(make_model, monkeypatch):
    monkeypatch.setattr(keras.Model, "fit", lambda self, *args, **kwargs: None)
    model = make_model(dtype="bfloat16")
    with pytest.warns(UserWarning, match="mixed_bfloat16"):
        model.fit(TEXTS, batch_size=BATCH, verbose=0)


@pytest.mark.parametrize("policy", ["float32", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_accumulation_over_batches_runs_and_is_warned_about(make_model, policy):
    model = make_model(dtype=policy)
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    with pytest.warns(UserWarning, match=r"batches.* `compile\(gradient_accumulation_steps=2\)`") as warned:
        model.compile(optimizer=optimizer)
    assert [warning.filename for warning in warned] == [__file__] and "\n" not in str(warned[0].message)
    before = model.get_weights()
    for changed in (False, True):
        model.fit(TEXTS[:BATCH], batch_size=BATCH, verbose=0)
        assert any((old != new).any() for old, new in zip(before, model.get_weights())) is changed


def test_each_on_batch_method_preprocesses(model):
    for batch in batches():
        perplexity = model.evaluate(batch, verbose=0, return_dict=True)["perplexity"]
        for on_batch in (model.train_on_batch, model.test_on_batch):
            model.reset_metrics()
            assert on_batch(batch, return_dict=True)["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    expected = model.predict(TEXTS[:BATCH], batch_size=BATCH, verbose=0)
    np.testing.assert_allclose(model.predict_on_batch(TEXTS[:BATCH]), expected, atol=1e-5)


def test_a_string_in_a_plain_call_is_refused(model):
    with pytest.raises(ValueError, match="preprocess"):
        model(["Hi"])


# === Validation, callbacks, steps ===


def by_hand(model, examples):
    return model.evaluate(examples, batch_size=BATCH, verbose=0, return_dict=True)["perplexity"]


def test_validation_split_cuts_the_last_examples_off(model):
    train, held_out = by_hand(model, TEXTS[:4]), by_hand(model, TEXTS[4:])
    for form in (TEXTS, np.array(TEXTS)):
        history = model.fit(form, batch_size=BATCH, validation_split=0.5, verbose=0).history
        assert history["perplexity"] == pytest.approx([train], rel=1e-4)
        assert history["val_perplexity"] == pytest.approx([held_out], rel=1e-4)
    last_pairs = {name: values[4:] for name, values in PAIRS.items()}
    history = model.fit(PAIRS, batch_size=BATCH, validation_split=0.5, verbose=0).history
    assert history["val_perplexity"] == pytest.approx([by_hand(model, last_pairs)], rel=1e-4)


def test_validation_split_cuts_sample_weights_too(model):
    weights = np.array([1, 1, 1, 1, 0, 0, 0, 1], "float32")
    history = model.fit(TEXTS, sample_weight=weights, batch_size=BATCH, validation_split=0.5, verbose=0).history
    expected = model.evaluate(TEXTS[4:], sample_weight=weights[4:], batch_size=BATCH, verbose=0, return_dict=True)
    assert history["val_perplexity"] == pytest.approx([expected["perplexity"]], rel=1e-4)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_validation_split_leaves_something_on_both_sides(model, share):
    if share == 0.01:
        assert len(model.fit(TEXTS, batch_size=BATCH, validation_split=share, verbose=0).history["val_perplexity"]) == 1
        return
    with pytest.raises(ValueError, match="both sides"):
        model.fit(TEXTS, batch_size=BATCH, validation_split=share, verbose=0)


def test_validation_split_of_a_data_set_is_refused(model):
    with pytest.raises(ValueError, match="validation_data"):
        model.fit(tf_data(), validation_split=0.5)


def test_validation_data_may_be_listed_examples_or_a_tuple_with_weights(model, perplexities):
    weights = np.ones(8, "float32")
    for form in (TEXTS, (TEXTS,), (TEXTS, None, weights), np.array(TEXTS)):
        history = model.fit(TEXTS[:4], batch_size=BATCH, epochs=2, validation_data=form, verbose=0).history
        assert history["val_perplexity"] == pytest.approx([perplexities["texts"]] * 2, rel=1e-4)


def test_callbacks_run(model):
    seen = []

    class Recorder(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(("batch", batch))

        def on_epoch_end(self, epoch, logs=None):
            seen.append(("epoch", epoch, "val_loss" in logs))

    model.fit(
        TEXTS, batch_size=BATCH, epochs=2, validation_data=TEXTS[:4], callbacks=[Recorder()], initial_epoch=1, verbose=0
    )
    assert seen == [("batch", 0), ("batch", 1), ("epoch", 1, True)]


def test_early_stopping_stops(model):
    stop = keras.callbacks.EarlyStopping(monitor="loss", patience=1)
    history = model.fit(TEXTS, batch_size=BATCH, epochs=20, callbacks=[stop], shuffle=False, verbose=0).history
    assert len(history["loss"]) == 2


def test_steps_per_epoch_shortens_an_epoch(model):
    history = model.fit(TEXTS, batch_size=BATCH, steps_per_epoch=1, shuffle=False, verbose=0).history
    assert history["perplexity"] == pytest.approx([by_hand(model, TEXTS[:4])], rel=1e-4)


# === Order ===


class Rows(keras.callbacks.Callback):
    """Notes the examples of every batch, which its preprocessor sees."""

    def __init__(self, model):
        super().__init__()
        self.seen, self.preprocessor = [], model.preprocessor

    def __call__(self, x, y=None, sample_weight=None):
        self.seen += list(x)
        return self.preprocessor(x, y=y, sample_weight=sample_weight)


@pytest.fixture
def order(make_model, monkeypatch):
    """`order(**kwargs)`: the order of the examples in `fit`, epoch after epoch."""
    model = make_model()
    model.compile(optimizer=keras.optimizers.SGD(0.0))

    def order_of(epochs=2, x=TEXTS, **kwargs):
        rows = Rows(model)
        monkeypatch.setattr(type(model), "preprocess_samples", lambda self, *args: rows(*args))
        # Keras draws one batch before training, to build the model.
        model.fit(x, epochs=epochs, verbose=0, **{"batch_size": BATCH, **kwargs})
        seen = rows.seen[-epochs * len(TEXTS) :]
        return [seen[i : i + len(TEXTS)] for i in range(0, len(seen), len(TEXTS))]

    return order_of


def test_shuffle_draws_a_new_order_each_epoch(order):
    keras.utils.set_random_seed(1)
    first, second = order(shuffle=True)
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert first != second and TEXTS not in (first, second)


def test_shuffle_mixes_examples_across_batches(order):
    keras.utils.set_random_seed(1)
    (epoch,) = order(epochs=1, shuffle=True)
    assert set(map(frozenset, batches(epoch))) != set(map(frozenset, batches()))


def test_shuffle_is_reproducible_under_a_seed(order):
    keras.utils.set_random_seed(3)
    once = order(shuffle=True)
    keras.utils.set_random_seed(3)
    assert order(shuffle=True) == once


def test_without_shuffle_the_order_is_kept(order):
    assert order(shuffle=False) == [TEXTS, TEXTS]


def test_listed_examples_are_shuffled_by_default(order):
    keras.utils.set_random_seed(1)
    assert TEXTS not in order()


def test_validation_and_prediction_keep_the_order(model):
    logits = model.predict(TEXTS, batch_size=BATCH, verbose=0)
    for i in (0, 7):
        np.testing.assert_allclose(logits[i], model.predict([TEXTS[i]] * BATCH, verbose=0)[0], atol=1e-5)


# === Errors ===


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize(
    "x, rule",
    [
        ("Hi", "wrap a single example"),
        (DIALOGUES[0], "single dialogue"),
        ({"prompts": "Hi", "responses": "Yo"}, "wrap a single example"),
        ({"prompts": ["a", "b"], "responses": ["c"]}, "as many examples"),
        (np.array("Hi"), "wrap a single example"),
        (7, "list or array of examples"),
    ],
)
def test_what_is_not_a_collection_of_examples_is_refused(model, method, x, rule):
    with pytest.raises(ValueError, match=rule):
        getattr(model, method)(x, verbose=0)


def test_unequal_lengths_are_refused(model):
    with pytest.raises(ValueError, match="as many examples"):
        model.fit(TEXTS, sample_weight=np.ones(3), verbose=0)


def test_labels_are_refused(model):
    with pytest.raises(ValueError, match="next tokens"):
        model.fit(TEXTS, TEXTS, batch_size=BATCH, verbose=0)


@pytest.mark.parametrize("beside", [{"y": TEXTS}, {"sample_weight": np.ones(8)}, {"batch_size": 4}])
def test_labels_weights_and_a_batch_size_beside_batches_are_refused(model, beside):
    with pytest.raises(ValueError, match=next(iter(beside))):
        model.evaluate(tf_data(), verbose=0, **beside)


def test_no_examples_are_refused(model):
    with pytest.raises(ValueError, match="At least one example"):
        model.fit([], verbose=0)
