"""The reward model: where a reward is read, what it learns from pairs, and how it is kept."""

import keras
import numpy as np
import pytest

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaRewardModel
from keras_gemma.models import GemmaRewardModelPreprocessor
from keras_gemma.training import ExactResume
from keras_gemma.training import bradley_terry_losses

PAIRS = {
    "prompts": ["the License", "You may", "a copy of", "the Work", "any"],
    "chosen": [" grants", " copy", " the License", " is", " Source form"],
    "rejected": [" copy", " is", " grants", " Source form of the Work", " the"],
}


@pytest.fixture
def preprocessor(tokenizer):
    return GemmaRewardModelPreprocessor(tokenizer, sequence_length=16)


@pytest.fixture
def make_reward_model(tokenizer, preprocessor):
    def make(shape=None, seed=0, **kwargs):
        keras.utils.set_random_seed(seed)
        small = {
            "num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 8, "intermediate_dim": 16,
            "head_dim": 4, "vocabulary_size": tokenizer.vocabulary_size(),
        }  # fmt: skip
        return GemmaRewardModel(GemmaBackbone(**{**small, **(shape or {}), **kwargs}), preprocessor)

    return make


# === Rows ===


def test_a_row_ends_with_the_end_of_its_answer(preprocessor, tokenizer):
    row = preprocessor.scored_row("the License", " grants")
    assert row[0] == tokenizer.start_token_id and row[-1] == tokenizer.end_token_id
    assert tokenizer.detokenize(row[1:-1]) == "the License grants"
    dialogue = [{"role": "user", "content": "Who?"}]
    row = preprocessor.scored_row(dialogue, "You.")
    assert row[-1] == tokenizer.end_of_turn_id
    assert tokenizer.detokenize(row) == (
        "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\nYou.<end_of_turn>"
    )


def test_pairs_become_rows_of_both_answers(preprocessor):
    x, margins, weights = preprocessor({**PAIRS, "margins": [0, 1, 2, 3, 4]}, sample_weight=[1, 1, 0, 1, 2])
    assert x["token_ids"].shape == x["padding_mask"].shape == (5, 2, 16)
    for i in range(5):
        for side, name in enumerate(("chosen", "rejected")):
            row = x["token_ids"][i, side][x["padding_mask"][i, side]]
            assert row.tolist() == preprocessor.scored_row(PAIRS["prompts"][i], PAIRS[name][i])
    np.testing.assert_array_equal(margins, np.arange(5, dtype="float32"))
    np.testing.assert_array_equal(weights, [1, 1, 0, 1, 2])


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"rejected": None}, ["'prompts', 'chosen' and 'rejected'", "Received: 'prompts', 'chosen'"]),
        ({"answers": ["a"] * 5}, ["may have 'margins'", "'answers'"]),
        ({"chosen": [" grants"]}, ["both its answers", "[5, 1, 5, 5]"]),
        ({"margins": [0, 1, 2, 3, np.nan]}, ["finite", "nan"]),
        ({"chosen": [" word" * 30] * 5}, ["sequence_length=16", "preference_pairs"]),
        ({"chosen": " grants"}, ["Lists of chosen"]),
    ],
)
def test_pairs_that_are_none(preprocessor, change, parts):
    pairs = {name: value for name, value in {**PAIRS, **change}.items() if value is not None}
    with pytest.raises(ValueError) as raised:
        preprocessor(pairs)
    for part in parts:
        assert part in str(raised.value)


def test_a_preprocessor_without_ends_is_refused(tokenizer):
    with pytest.raises(ValueError, match="add_end_token=False"):
        GemmaRewardModelPreprocessor(tokenizer, add_end_token=False)


# === Rewards ===


def rewards_by_hand(model, rows):
    """Row by row without padding: the last hidden state times the head."""
    rewards = []
    for row in rows:
        ids = np.array([row])
        hidden = keras.ops.convert_to_numpy(model.backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
        rewards.append(float(hidden[0, -1] @ keras.ops.convert_to_numpy(model.reward_head.kernel)[:, 0]))
    return rewards


@pytest.mark.multi_backend
def test_a_reward_is_read_at_the_last_token_whatever_stands_beside_it(make_reward_model, shape):
    model = make_reward_model(shape)
    random = np.random.default_rng(0)
    rows = [random.integers(4, 500, n).tolist() for n in (3, 16, 7)]
    received = model.score_tokens(rows, batch_size=2)
    assert received.dtype == np.float32
    np.testing.assert_allclose(received, rewards_by_hand(model, rows), atol=1e-5)


def test_texts_are_scored_as_their_rows(make_reward_model):
    model = make_reward_model()
    rows = [model.preprocessor.scored_row(*pair) for pair in zip(PAIRS["prompts"], PAIRS["chosen"])]
    np.testing.assert_array_equal(model.score(PAIRS["prompts"], PAIRS["chosen"]), model.score_tokens(rows))


def test_what_cannot_be_scored(make_reward_model):
    model = make_reward_model()
    for call, part in [
        (lambda: model.score(["a"], []), "1 prompts and 0 responses"),
        (lambda: model.score([], []), "one at least"),
        (lambda: model.score(["a"], ["b" * 100]), "sequence_length=16"),
        (lambda: model.score(["a"], [None]), "An answer is a string"),
        (lambda: model.score_tokens([[]]), "at least one token"),
        (lambda: make_reward_model(dropout=0.1), "dropout=0.1"),
        (lambda: model.compile(loss="mse"), "Received: loss"),
        (lambda: model.compile(centring=-1), "Received: -1"),
    ]:
        with pytest.raises(ValueError, match=part):
            call()


# === Learning ===


def test_the_loss_of_pairs():
    chosen, rejected = np.array([2.0, 0.0, 50.0, -50.0]), np.array([0.5, 0.0, -50.0, 50.0])
    plain = -np.log(1 / (1 + np.exp(-np.array([1.5, 0.0, 100.0, -100.0]))))
    np.testing.assert_allclose(bradley_terry_losses(chosen, rejected), plain, rtol=1e-6, atol=1e-6)
    ahead = -np.log(1 / (1 + np.exp(-(1.5 - 1.0))))
    np.testing.assert_allclose(bradley_terry_losses(chosen, rejected, 1.0)[0], ahead, rtol=1e-6)
    np.testing.assert_allclose(bradley_terry_losses(chosen, rejected, 0.0, 0.01)[0], plain[0] + 0.0625, rtol=1e-6)


@pytest.mark.multi_backend
def test_a_step_and_its_report(make_reward_model):
    """Loss and metrics of a batch with weights and margins, in microbatches as well, by plain means."""
    pairs, weights = {**PAIRS, "margins": [0.0, 1.0, 0.0, 0.5, 0.0]}, np.array([1.0, 2.0, 0.0, 1.0, 1.0])
    model = make_reward_model()
    chosen, rejected = (model.score(PAIRS["prompts"], PAIRS[name]) for name in ("chosen", "rejected"))
    losses = np.array(bradley_terry_losses(chosen, rejected, np.array(pairs["margins"]), 0.01))
    counted = weights > 0
    both = np.stack([chosen, rejected])[:, counted]
    expected = {
        "loss": np.average(losses, weights=weights),
        "accuracy": np.average(chosen > rejected, weights=weights),
        "margin": np.average(chosen - rejected, weights=weights),
        "reward_min": both.min(),
        "reward_max": both.max(),
        "reward_mean": np.average([chosen, rejected], weights=np.stack([weights, weights])),
    }
    weights_after = []
    for microbatches in (1, 2):
        model = make_reward_model()
        model.compile(keras.optimizers.SGD(0.1), centring=0.01, gradient_accumulation_steps=microbatches)
        history = model.fit(pairs, batch_size=5, sample_weight=weights, shuffle=False, verbose=0).history
        for name, value in expected.items():
            np.testing.assert_allclose(history[name][0], value, rtol=1e-4, atol=1e-5, err_msg=name)
        weights_after.append([np.array(keras.ops.convert_to_numpy(w)) for w in model.trainable_variables])
    for one, other in zip(*weights_after):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_equal_rewards_are_wrong(make_reward_model):
    model = make_reward_model()
    model.compile()
    same = {**PAIRS, "rejected": PAIRS["chosen"]}
    result = model.evaluate(same, batch_size=2, verbose=0, return_dict=True)
    assert result["accuracy"] == 0.0
    np.testing.assert_allclose(result["loss"], np.log(2), rtol=1e-5)


def test_utilities_of_answers_are_recovered(tokenizer):
    """T4: items of known worth, compared with noise; the rewards are their worth but for a constant."""
    keras.utils.set_random_seed(1)
    items, random = 12, np.random.default_rng(1)
    worth = random.normal(0, 1, items)
    first, second = random.integers(0, items, (2, 80_000))
    first, second = first[first != second], second[first != second]
    first_wins = random.random(len(first)) < 1 / (1 + np.exp(worth[second] - worth[first]))
    better, worse = np.where(first_wins, first, second), np.where(first_wins, second, first)
    token_ids = np.stack([better, worse], axis=1)[:, :, None] + 4
    token_ids = np.concatenate([np.full_like(token_ids, 2), token_ids, np.full_like(token_ids, 1)], axis=2)
    model = GemmaRewardModel(
        GemmaBackbone(
            vocabulary_size=items + 4, num_layers=1, num_query_heads=2, num_key_value_heads=1, hidden_dim=32,
            intermediate_dim=64, head_dim=8,
        )
    )  # fmt: skip
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, 240)
    model.compile(keras.optimizers.Adam(schedule), centring=0.001)
    x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    model.fit(x, np.zeros(len(better), "float32"), batch_size=1024, epochs=3, verbose=0)
    rewards = model.score_tokens([[2, item + 4, 1] for item in range(items)])
    # 80,000 comparisons tell each worth to about 0.02.
    error = (rewards - rewards.mean()) - (worth - worth.mean())
    assert np.abs(error).max() < 0.07, error
    accuracy = model.evaluate(x, np.zeros(len(better), "float32"), batch_size=512, verbose=0, return_dict=True)
    bayes = np.mean(worth[better] > worth[worse])
    assert abs(accuracy["accuracy"] - bayes) < 0.01 and bayes < 0.8


# === Files ===


@pytest.mark.multi_backend
def test_a_preset_keeps_the_head(make_reward_model, tmp_path):
    model = make_reward_model()
    expected = model.score(PAIRS["prompts"], PAIRS["chosen"])
    model.save_to_preset(tmp_path / "preset")
    again = GemmaRewardModel.from_preset(tmp_path / "preset")
    np.testing.assert_allclose(again.score(PAIRS["prompts"], PAIRS["chosen"]), expected, atol=1e-6)
    assert again.preprocessor.sequence_length == 16


def test_a_preset_has_no_state_of_the_optimizer(make_reward_model, tmp_path, recwarn):
    model = make_reward_model()
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(PAIRS, batch_size=5, verbose=0)
    model.save_to_preset(tmp_path / "preset")
    head = model.reward_head.kernel
    assert (tmp_path / "preset" / "task.weights.h5").stat().st_size < 4 * head.shape[0] + 20_000
    again = GemmaRewardModel.from_preset(tmp_path / "preset")
    np.testing.assert_array_equal(again.reward_head.kernel, head)
    assert not [warning for warning in recwarn if "optimizer" in str(warning.message)]


def test_any_preset_becomes_a_reward_model(make_model, tmp_path):
    policy = make_model()
    policy.save_to_preset(tmp_path / "preset")
    model = GemmaRewardModel.from_preset(tmp_path / "preset", sequence_length=24)
    for weight, expected in zip(model.backbone.weights, policy.backbone.weights):
        np.testing.assert_array_equal(weight, expected)
    assert model.preprocessor.sequence_length == 24
    assert len(model.score(PAIRS["prompts"], PAIRS["chosen"])) == 5
    # And the backbone of a reward model is one of a language model.
    model.save_to_preset(tmp_path / "reward")
    language_model = GemmaCausalLM.from_preset(tmp_path / "reward")
    np.testing.assert_array_equal(language_model.backbone.weights[0], policy.backbone.weights[0])


def test_adapters_and_head_train(make_reward_model):
    model = make_reward_model()
    model.backbone.enable_lora(2)
    assert {w.path.split("/")[-1] for w in model.trainable_variables} == {"kernel", "lora_kernel_a", "lora_kernel_b"}
    model.compile(keras.optimizers.Adam(1e-2))
    losses = model.fit(PAIRS, batch_size=5, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_a_run_goes_on_exactly(make_reward_model, tmp_path):
    def fit(epochs, folder):
        model = make_reward_model()
        model.compile(keras.optimizers.Adam(1e-2))
        callbacks = [ExactResume(folder, save_every_steps=2)]
        history = model.fit(PAIRS, batch_size=2, epochs=epochs, callbacks=callbacks, verbose=0).history
        return history, model.get_weights()

    expected, weights = fit(3, tmp_path / "whole")
    fit(1, tmp_path / "parts")
    received, weights_received = fit(3, tmp_path / "parts")
    assert received == expected
    for one, other in zip(weights_received, weights):
        np.testing.assert_array_equal(one, other)
