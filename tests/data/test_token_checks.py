"""Ids, masks and weights that mean nothing are refused before a step, in each way into a model."""

import keras
import numpy as np
import pytest

from keras_gemma import data
from keras_gemma.data.token_checks import TokenRules
from keras_gemma.models import GemmaRewardModel

VOCABULARY = 500
LENGTH = 6


def ids(last=7):
    return np.array([[2, 5, 9, 6, 7, 8], [2, 5, 9, 6, 8, last]])


def batch(last=7, mask=1, label=7, weight=1.0):
    inputs = {"token_ids": ids(last), "padding_mask": np.ones((2, LENGTH), "int32")}
    inputs["padding_mask"][1, 2] = mask
    labels, weights = ids(label), np.ones((2, LENGTH), "float32")
    weights[1, 2] = weight
    return inputs, labels, weights


def of_floats():
    (inputs, labels, weights) = batch()
    return {**inputs, "token_ids": inputs["token_ids"].astype("float32")}, labels, weights


def of_float_labels():
    (inputs, labels, weights) = batch()
    return inputs, labels.astype("float32"), weights


WRONG_INPUTS = {
    "too large": (lambda: batch(last=VOCABULARY), r"from 0 to 499.*Received: 500 at \[1, 5\]"),
    "negative": (lambda: batch(last=-1), r"Received: -1 at \[1, 5\]"),
    "floats": (of_floats, "integers. Received: dtype=float32"),
    "a gap": (lambda: batch(mask=0), r"side by side.*row \[1\]"),
    "no mask": (lambda: batch(mask=3), "1 or true where a token is.*Received: 3"),
}
WRONG = {
    **WRONG_INPUTS,
    "labels": (lambda: batch(label=-100), r"`y` are token ids.*Received: -100 .*`sample_weight`"),
    "float labels": (of_float_labels, "`y` are token ids, which are integers"),
    "weights": (lambda: batch(weight=np.nan), r"finite. Received: nan at \[1, 2\]"),
}


class Batches(keras.utils.PyDataset):
    def __init__(self, *batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


@pytest.fixture(scope="module")
def model(make_model):
    keras.utils.set_random_seed(0)
    model = make_model(with_preprocessor=False)
    model.compile(keras.optimizers.SGD(0.1))
    return model


@pytest.mark.multi_backend
def test_batches_are_refused_in_every_way_in(model):
    import tensorflow as tf

    before = model.get_weights()
    for make, match in WRONG.values():
        ways = [
            lambda make=make: model.fit(*make()[:2], sample_weight=make()[2], batch_size=2, shuffle=False, verbose=0),
            lambda make=make: model.fit(Batches(make()), verbose=0),
            lambda make=make: model.evaluate(iter([make()]), verbose=0),
            lambda make=make: model.fit(tf.data.Dataset.from_tensors(make()), verbose=0),
            lambda make=make: model.train_on_batch(*make()),
        ]
        for way in ways:
            with pytest.raises(Exception, match=match):
                way()
    for make, match in WRONG_INPUTS.values():
        with pytest.raises(Exception, match=match):
            model.predict(make()[0], batch_size=2, verbose=0)
    for weight, other in zip(model.get_weights(), before):
        np.testing.assert_array_equal(weight, other)


def test_what_was_trained_before_a_refused_batch_stays(model):
    with pytest.raises(ValueError, match="vocabulary of the model"):
        model.fit(Batches(batch(), batch(last=VOCABULARY)), shuffle=False, verbose=0)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    with pytest.raises(ValueError, match="vocabulary of the model"):
        model.fit(Batches(batch()), validation_data=Batches(batch(label=VOCABULARY)), verbose=0)
    assert np.isfinite(model.fit(Batches(batch()), verbose=0).history["loss"][0])


def test_padding_on_the_left_and_packed_rows_pass():
    rules = TokenRules(VOCABULARY)
    inputs, labels, weights = batch(mask=0)
    left = {**inputs, "padding_mask": np.tile([0, 0, 1, 1, 1, 0], (2, 1))}
    rules.refuse(left, labels, weights)
    rules.refuse({**inputs, "segment_ids": np.ones((2, LENGTH), "int32")}, labels, weights)
    rules.refuse({**inputs, "padding_mask": np.zeros((2, LENGTH), bool)}, None, None)
    with pytest.raises(ValueError, match="ends with its padding"):
        TokenRules(VOCABULARY, padded_on_the_right=True).refuse(left)


def test_labels_of_another_loss_are_free(make_model):
    model = make_model(with_preprocessor=False)
    model.compile("sgd", loss="mse", weighted_metrics=None)
    assert not model.token_rules.has_labels
    model.token_rules.refuse(batch()[0], np.full((2, LENGTH), -0.5), None)


def test_exact_resume_refuses_as_well(model, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    from keras_gemma.training import ExactResume

    if keras.backend.backend() != "jax":
        pytest.skip("An exact resume is refused elsewhere.")
    with pytest.raises(ValueError, match="vocabulary of the model"):
        model.fit(Batches(batch(last=-1)), callbacks=[ExactResume(tmp_path, 1)], verbose=0)
    with pytest.raises(ValueError, match="begin anew each time"):
        validation = (batch() for _ in range(9))
        model.fit(Batches(batch()), validation_data=validation, callbacks=[ExactResume(tmp_path, 1)], verbose=0)


def test_prompts_and_scores(model):
    mask = np.ones((2, LENGTH), "int32")
    for wrong, match in ((ids(VOCABULARY), "Received: 500"), (ids().astype("float32"), "integers")):
        with pytest.raises(ValueError, match=match):
            model.generate({"token_ids": wrong, "padding_mask": mask}, stop_token_ids=None)
        with pytest.raises(ValueError, match=match):
            model.score(wrong)
    with pytest.raises(ValueError, match="target_ids"):
        model.score(ids(), scoring_mode="loss", target_ids=ids(-100))


def test_reward_models(model):
    rewards = GemmaRewardModel(model.backbone)
    rewards.compile("sgd")
    for wrong in ([[2, VOCABULARY]], [[2, -1]], [[2, 5.5]]):
        with pytest.raises(ValueError, match="from 0 to 499"):
            rewards.score_tokens(wrong)
    pairs = {"token_ids": np.stack([ids(), ids(VOCABULARY)]), "padding_mask": np.ones((2, 2, LENGTH), "int32")}
    with pytest.raises(ValueError, match=r"Received: 500 at \[1, 1, 5\]"):
        rewards.fit(pairs, np.zeros(2), batch_size=2, shuffle=False, verbose=0)
    pairs = {"token_ids": np.stack([ids(), ids()]), "padding_mask": np.tile([0, 1, 1, 1, 1, 1], (2, 2, 1))}
    with pytest.raises(ValueError, match="ends with its padding"):
        rewards.fit(pairs, np.zeros(2), batch_size=2, shuffle=False, verbose=0)


def test_policies(make_model, make_preprocessor):
    if keras.backend.backend() != "jax":
        pytest.skip("Policies are trained on JAX.")
    from keras_gemma.rlhf import DPOTrainer
    from keras_gemma.rlhf import ReinforceTrainer

    # Half of the tokenizer's pieces have no row in the embedding.
    policy = make_model(sequence_length=32, vocabulary_size=250)
    policy.compile("sgd")
    with pytest.raises(ValueError, match=r"from 0 to 249.*in row 0"):
        ReinforceTrainer(policy, lambda prompts, texts: [0.0], max_new_tokens=2).fit(["Licensor"], batch_size=1)
    with pytest.raises(ValueError, match=r"Tokens of pair 0 are integers from 0 to 249"):
        DPOTrainer(policy).fit([{"prompts": "Licensor", "chosen": " a", "rejected": " the"}], batch_size=1)
    with pytest.raises(ValueError, match="from 0 to 249"):
        policy.fit(["Licensor"], pack=True, verbose=0)


def test_rows_of_ids():
    rows = [[1, 2], [3]]
    assert data.refuse_rows_outside(rows, 4) is rows
    with pytest.raises(ValueError, match="Received: 4 in row 1"):
        data.refuse_rows_outside([[1], [4]], 4)
