import keras
import numpy as np
import pytest

from keras_gemma.rlhf import DPOTrainer

PAIRS = [
    {"prompts": "the", "chosen": " of", "rejected": " and and"},
    {"prompts": "You", "chosen": " any", "rejected": " or"},
    {"prompts": "any", "chosen": " a copy of", "rejected": " License"},
]


def test_its_first_step_is_that_of_the_plain_formula(model):
    """Against the gradient of the loss written out with plain logits."""
    import jax

    model.compile(keras.optimizers.SGD(1.0))
    trainer = DPOTrainer(model, beta=0.5, microbatch_size=2)
    # Away from the reference, where all ratios are 1.
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(variable + random.normal(0, 0.05, variable.shape))
    before = [np.array(variable) for variable in model.trainable_variables]
    rows = [
        model.preprocessor.row({"prompts": pair["prompts"], "responses": pair[side]})
        for side in ("chosen", "rejected")
        for pair in PAIRS
    ]

    def log_probabilities(trained):
        total = []
        with keras.StatelessScope(state_mapping=list(zip(model.trainable_variables, trained))):
            for row in rows:
                ids = np.array([row.ids])
                logps = jax.nn.log_softmax(model({"token_ids": ids, "padding_mask": np.ones_like(ids)})[0, :-1])
                learned = np.array(row.learned[1:])
                total.append((logps[np.arange(ids.shape[1] - 1), ids[0, 1:]] * learned).sum())
        return jax.numpy.stack(total).reshape(2, -1)

    reference = jax.jit(log_probabilities)(trainer.reference)

    def loss(trained):
        gains = log_probabilities(trained) - reference
        return -jax.nn.log_sigmoid(0.5 * (gains[0] - gains[1])).mean()

    expected, gradients = jax.jit(jax.value_and_grad(loss))([v.value for v in model.trainable_variables])
    history = trainer.fit(PAIRS, batch_size=3, verbose=0).history
    np.testing.assert_allclose(history["loss"], [expected], rtol=1e-5)
    for variable, start, gradient in zip(model.trainable_variables, before, gradients):
        np.testing.assert_allclose(np.array(variable), start - np.array(gradient), atol=1e-5, err_msg=variable.path)


def test_it_begins_at_the_reference_and_learns_what_is_better(model):
    history = DPOTrainer(model).fit(PAIRS, batch_size=3, epochs=15, verbose=0).history
    np.testing.assert_allclose(history["loss"][0], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(history["margin"][0], 0.0, atol=1e-6)
    assert history["accuracy"][-1] == 1.0 and history["loss"][-1] < 0.6
    gained = history["chosen_logp"][-1] - history["chosen_logp"][0]
    assert gained > history["rejected_logp"][-1] - history["rejected_logp"][0]


def test_adapters_are_all_that_changes(model):
    model.backbone.enable_lora(2)
    model.compile(keras.optimizers.Adam(1e-2))
    frozen = [np.array(variable) for variable in model.non_trainable_variables]
    trainer = DPOTrainer(model)
    assert len(trainer.reference) == len(model.trainable_variables)
    trainer.fit(PAIRS, batch_size=2, epochs=2, verbose=0)
    for variable, before in zip(model.non_trainable_variables, frozen):
        np.testing.assert_array_equal(variable, before)


def test_a_dialogue_learns_its_last_answer(model):
    dialogue = [
        {"role": "user", "content": "You"},
        {"role": "model", "content": "any"},
        {"role": "user", "content": "or"},
    ]
    trainer = DPOTrainer(model)
    model.preprocessor.sequence_length = 256
    prompt, chosen, rejected = trainer._rows_of(0, {"prompts": dialogue, "chosen": "the", "rejected": "of"})
    assert prompt == model.preprocessor.prompt_ids(dialogue)
    end = [model.preprocessor.tokenizer.end_of_turn_id]
    assert chosen == model.preprocessor.tokenizer.encode("the") + end and rejected[-1:] == end


def said(role, content):
    return {"role": role, "content": content}


def test_messages_and_implicit_prompts_are_the_rows_of_strings(model):
    trainer = DPOTrainer(model)
    model.preprocessor.sequence_length = 64
    asked, yes, no = [said("user", "the")], [said("assistant", "of")], [said("assistant", "or")]
    expected = trainer._rows_of(0, {"prompts": asked, "chosen": "of", "rejected": "or"})
    for pair in (
        {"prompt": asked, "chosen": yes, "rejected": no},
        {"prompts": "the", "chosen": yes, "rejected": no},
        {"chosen": asked + yes, "rejected": asked + no, "source": "x"},
    ):
        assert trainer._rows_of(0, pair) == expected
    assert trainer._rows_of_all({"chosen": [asked + yes], "rejected": [asked + no]}) == [expected]
    texts = {"prompt": "the", "chosen": " of", "rejected": " or"}
    assert trainer._rows_of(0, {"chosen": "the of", "rejected": "the or"}) == trainer._rows_of(0, texts)
    with pytest.raises(ValueError, match=r"begin with the same messages.*number 3"):
        trainer._rows_of(3, {"chosen": yes, "rejected": no})


def test_validation_is_reported_beside_training_and_learns_nothing(model):
    trainer, unseen = DPOTrainer(model, beta=0.5), PAIRS[::-1]
    before = model.get_weights()
    at_first = trainer.evaluate(unseen, batch_size=2)
    np.testing.assert_allclose(at_first["loss"], np.log(2), rtol=1e-6)
    assert at_first["accuracy"] == 0.0 and trainer.step == 0
    for one, other in zip(model.get_weights(), before):
        np.testing.assert_array_equal(one, other)
    columns = {name: [pair[name] for pair in unseen] for name in unseen[0]}
    history = trainer.fit(PAIRS, batch_size=3, epochs=2, verbose=0, validation_data=columns).history
    at_last = trainer.evaluate(unseen, batch_size=2)
    assert at_last.keys() == at_first.keys()
    for name, value in at_last.items():
        np.testing.assert_allclose(history[f"val_{name}"][-1], value, rtol=1e-5, atol=1e-6)
    # What a step reports is what the weights before it said.
    np.testing.assert_allclose(history["loss"][1], history["val_loss"][0], rtol=1e-5)
    with pytest.raises(ValueError, match="at least one pair"):
        trainer.evaluate([])


@pytest.mark.parametrize(
    "settings, expected", [({"label_smoothing": 0.2}, np.log(2)), ({"loss_type": "ipo", "beta": 0.25}, 4.0)]
)
def test_the_first_loss_of_each_kind_is_that_of_equal_answers(model, settings, expected):
    trainer = DPOTrainer(model, **settings)
    history = trainer.fit(PAIRS, batch_size=3, epochs=3, verbose=0).history
    np.testing.assert_allclose(history["loss"][0], expected, rtol=1e-6)
    assert history["loss"][2] < history["loss"][0] and settings.items() <= trainer.settings().items()


@pytest.mark.parametrize(
    "pairs, part",
    [
        ([], "batch_size=1, 0 pairs"),
        ([{"prompts": "the", "chosen": "of"}], "'prompts', 'chosen', 'rejected'.*number 0"),
        ([{"prompts": "the", "chosen": "of " * 40, "rejected": "or"}], r"sequence_length=24.*of \d+ tokens, number 0"),
    ],
)
def test_pairs_that_are_refused(model, pairs, part):
    with pytest.raises(ValueError, match=part):
        DPOTrainer(model).fit(pairs, batch_size=1, verbose=0)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"microbatch_size": 0}])
def test_settings_that_are_refused(model, settings):
    with pytest.raises(ValueError, match="`beta` is above 0"):
        DPOTrainer(model, **settings)


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"loss_type": "hinge"}, "one of 'sigmoid', 'ipo'. Received: 'hinge'"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "alone"),
    ],
)
def test_losses_that_are_refused(model, settings, part):
    with pytest.raises(ValueError, match=part):
        DPOTrainer(model, **settings)
