"""`tune`: what it reaches, what it keeps, and what it refuses."""

import keras
import numpy as np
import pytest

from keras_gemma.training import KeepBest
from keras_gemma.training import tune

# How often each answer follows each prompt.
ANSWERS = {"the": {"Work": 4, "Source": 3, "You": 1}, "any": {"Work": 1, "You": 7}, "a": {"Source": 8}}
PAIRS = [
    {"prompts": prompt, "responses": answer}
    for prompt, counts in ANSWERS.items()
    for answer, count in counts.items()
    for _ in range(count)
]


def entropy():
    """Nats of an answer, given its prompt."""
    shares = [np.array(list(counts.values())) / sum(counts.values()) for counts in ANSWERS.values()]
    return float(np.mean([-np.sum(share * np.log(share)) for share in shares]))


def nats_of_an_answer(model, pack):
    """Of its tokens and its end together."""
    tokens = sum(int(np.sum(example["weights"])) for example in model.preprocessor.unpadded(PAIRS)) / len(PAIRS)
    return tokens * np.log(model.evaluate(PAIRS, batch_size=4, pack=pack, verbose=0, return_dict=True)["perplexity"])


@pytest.mark.parametrize("pack", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tuning_reaches_the_entropy_of_the_answers(make_model, pack):
    keras.utils.set_random_seed(0)
    model = make_model(hidden_dim=16, intermediate_dim=32)
    before = nats_of_an_answer(model, pack)
    tune(model, PAIRS, epochs=60, batch_size=24 if not pack else 8, learning_rate=3e-2, pack=pack, verbose=0)
    after = nats_of_an_answer(model, pack)
    # Nothing that answers these prompts can be below.
    assert before > 3 and entropy() - 1e-3 < after < entropy() + 0.03


def test_adapters_alone_train(make_model):
    model = make_model()
    before = {weight.path: np.array(weight) for weight in model.backbone.weights}
    history = tune(model, PAIRS, lora_rank=2, epochs=2, verbose=0)
    changed = {w.path for w in model.backbone.weights if w.path in before and np.any(before[w.path] != np.array(w))}
    assert not changed
    assert model.trainable_variables and all("lora" in weight.path for weight in model.trainable_variables)
    assert max(history.history["learning_rate"]) <= 2e-4
    with pytest.raises(ValueError, match="Adapters are given to a backbone without"):
        tune(model, PAIRS, lora_rank=2, epochs=1, verbose=0)


class LossOfOnesOwn(keras.callbacks.Callback):
    """Says what the loss on validation data was, and remembers the weights of each epoch."""

    def __init__(self, losses):
        super().__init__()
        self.losses, self.weights = losses, []

    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = self.losses[epoch]
        self.weights.append([np.array(weight) for weight in self.model.trainable_variables])


def test_the_best_epoch_is_kept(make_model):
    told, best = LossOfOnesOwn([3.0, 1.0, 2.0, 1.5]), KeepBest()
    model = make_model()
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(PAIRS, epochs=4, batch_size=8, callbacks=[told, best], verbose=0)
    assert (best.best, best.best_epoch, len(told.weights)) == (1.0, 1, 4)
    for weight, kept, last in zip(model.trainable_variables, told.weights[1], told.weights[3]):
        np.testing.assert_array_equal(weight, kept)
        assert np.any(kept != last)


def test_training_ends_once_nothing_gets_better(make_model):
    told = LossOfOnesOwn([3.0, 1.0, 2.0, 1.5, 1.2, 1.1])
    model = make_model()
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(PAIRS, epochs=6, batch_size=8, callbacks=[told, KeepBest(patience=2)], verbose=0)
    assert len(told.weights) == 4


def test_validation_data_end_the_training_of_tune(make_model):
    keras.utils.set_random_seed(0)
    # Answers that contradict those of the training.
    others = [{"prompts": prompt, "responses": "You may not"} for prompt in ANSWERS]
    model = make_model(hidden_dim=16, intermediate_dim=32)
    history = tune(model, PAIRS, others, epochs=40, learning_rate=3e-2, patience=2, verbose=0).history
    losses = history["val_loss"]
    assert len(losses) < 40
    final = model.evaluate(others, batch_size=8, pack=True, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(final, min(losses), rtol=1e-4)
    assert min(losses) < losses[-1]


def test_a_finished_run_returns_what_it_kept(make_model, tmp_path):
    def run():
        keras.utils.set_random_seed(0)
        model = make_model()
        history = tune(model, PAIRS, PAIRS[:3], epochs=3, learning_rate=1e-2, checkpoints=tmp_path / "run", verbose=0)
        return model.get_weights(), history.history["val_loss"]

    weights, losses = run()
    again, losses_again = run()
    assert losses == losses_again
    for one, other in zip(weights, again):
        np.testing.assert_array_equal(one, other)


def test_what_tune_refuses(make_model):
    model = make_model()
    with pytest.raises(ValueError, match=r"`patience` is about.*patience=1"):
        tune(model, PAIRS, patience=1)
    with pytest.raises(ValueError, match=r"list, such as `data.tuning_examples` gives.*generator"):
        tune(model, (pair for pair in PAIRS))
