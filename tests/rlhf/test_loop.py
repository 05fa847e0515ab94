"""Runs that break off and go on, reports, and judges."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_gemma.models import GemmaRewardModel
from keras_gemma.models import GemmaRewardModelPreprocessor
from keras_gemma.rlhf import AdaptiveCoefficient
from keras_gemma.rlhf import DPOTrainer
from keras_gemma.rlhf import ReinforceTrainer
from keras_gemma.rlhf import RunReport
from keras_gemma.rlhf import SideBySide
from keras_gemma.rlhf.run_report import table
from keras_gemma.training import ForeignCheckpointError
from keras_gemma.training import NonFiniteLossError
from tests.rlhf import run
from tests.training.crashes import Crash
from tests.training.crashes import CrashAt

PROMPTS = ["the", "You", "any", "Source", "or"]
PAIRS = [{"prompts": prompt, "chosen": " the", "rejected": " of of"} for prompt in PROMPTS]


def letters(prompts, texts):
    return [text.count("e") for text in texts]


def without_times(history):
    return {name: values for name, values in history.items() if not name.endswith("_seconds")}


def assert_same_run(one, other, history, expected):
    assert without_times(history) == without_times(expected)
    assert one.step == other.step and one.state() == other.state()
    variables = [trainer.policy.variables + trainer.policy.optimizer.variables for trainer in (one, other)]
    for here, there in zip(*variables):
        np.testing.assert_array_equal(here, there, err_msg=here.path)
    for here, there in zip(one.reference, other.reference):
        np.testing.assert_array_equal(here, there)


# === Going on ===


@pytest.fixture
def make_trainer(make_model):
    def make(kind=ReinforceTrainer):
        keras.utils.set_random_seed(0)
        policy = make_model(sequence_length=24)
        policy.compile(keras.optimizers.Adam(1e-2))
        if kind is DPOTrainer:
            return DPOTrainer(policy)
        return ReinforceTrainer(
            policy, letters, group_size=2, max_new_tokens=4, baseline="moving_average", updates=2, clip=0.2,
            kl_coefficient=AdaptiveCoefficient(0.1, target=1.0),
        )  # fmt: skip

    return make


@pytest.mark.parametrize("kind, data", [(ReinforceTrainer, PROMPTS), (DPOTrainer, PAIRS)])
def test_a_run_that_broke_off_goes_on_to_the_bit(make_trainer, tmp_path, kind, data):
    whole = make_trainer(kind)
    expected = whole.fit(data, batch_size=2, epochs=4, verbose=0).history
    for crash in (2, 4):
        with pytest.raises(Crash):
            make_trainer(kind).fit(
                data, batch_size=2, epochs=4, verbose=0, checkpoints=tmp_path, save_every_steps=3,
                callbacks=[CrashAt(crash)],
            )  # fmt: skip
    trainer = make_trainer(kind)
    # The checkpoint has the reference, whatever the policy is now.
    trainer.policy.trainable_variables[0].assign(trainer.policy.trainable_variables[0] + 1.0)
    history = trainer.fit(data, batch_size=2, epochs=4, verbose=0, checkpoints=tmp_path, save_every_steps=3).history
    assert_same_run(trainer, whole, history, expected)
    if kind is ReinforceTrainer:
        assert trainer.samples == whole.samples
    # What has ended trains nothing.
    again = make_trainer(kind)
    history = again.fit(data, batch_size=2, epochs=4, verbose=0, checkpoints=tmp_path, save_every_steps=3).history
    assert_same_run(again, whole, history, expected)


def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    def started(killed_before):
        command = [sys.executable, run.__file__, str(tmp_path), str(killed_before)]
        return subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300).returncode

    assert started(4) == -signal.SIGKILL
    assert not (tmp_path / "end.npz").exists()
    assert started(-1) == 0
    resumed = np.load(tmp_path / "end.npz")
    expected = run.run()
    assert expected["kl"][1] != 0
    for name, here in zip(expected, resumed.values()):
        np.testing.assert_array_equal(expected[name], here, err_msg=name)


def test_another_run_is_refused(make_trainer, tmp_path):
    make_trainer().fit(PROMPTS, batch_size=2, verbose=0, checkpoints=tmp_path)
    with pytest.raises(ForeignCheckpointError, match="data is"):
        make_trainer().fit(PROMPTS[::-1], batch_size=2, verbose=0, checkpoints=tmp_path)
    trainer = make_trainer()
    trainer._settings["group_size"] = 3
    with pytest.raises(ForeignCheckpointError, match="group_size is 2 there and 3 here"):
        trainer.fit(PROMPTS, batch_size=2, verbose=0, checkpoints=tmp_path)


def test_a_reward_that_fails_loses_nothing(model, tmp_path):
    calls = iter(range(3))

    def failing(prompts, texts):
        if next(calls) == 2:
            raise OSError("the service is down")
        return letters(prompts, texts)

    def trainer_with(reward):
        return ReinforceTrainer(model, reward, group_size=2, max_new_tokens=4)

    first = trainer_with(failing)
    with pytest.raises(ValueError, match=r"from `failing` for 2 responses: OSError: the service is down"):
        first.fit(PROMPTS, batch_size=1, verbose=0, checkpoints=tmp_path, save_every_steps=100)
    assert first.step == 2
    second = trainer_with(letters)
    second.fit(PROMPTS, batch_size=1, verbose=0, checkpoints=tmp_path, save_every_steps=100)
    assert second.step == 5


def test_a_weight_that_is_not_finite_stops_the_run(model, tmp_path):
    model.compile(keras.optimizers.SGD(np.inf))
    trainer = ReinforceTrainer(model, letters, group_size=2, max_new_tokens=4)
    with pytest.raises(NonFiniteLossError, match="There is no checkpoint"):
        trainer.fit(PROMPTS, batch_size=2, epochs=3, verbose=0, checkpoints=tmp_path, save_every_steps=1)


def test_a_callback_ends_a_run(model):
    stop = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: setattr(model, "stop_training", True))
    trainer = ReinforceTrainer(model, letters, group_size=2, max_new_tokens=4)
    history = trainer.fit(PROMPTS, batch_size=1, epochs=3, callbacks=[stop], verbose=0)
    assert trainer.step == 1 and len(history.history["kl"]) == 1


def test_the_progress_bar_is_short(model, capsys):
    ReinforceTrainer(model, letters, group_size=2, max_new_tokens=4).fit(PROMPTS, batch_size=5, verbose=2)
    shown = capsys.readouterr().out
    assert "reward: " in shown and "kl: 0.0" in shown and "seconds" not in shown


# === What it was like ===


def test_a_report(model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = ReinforceTrainer(model, letters, group_size=2, max_new_tokens=4)
    report = RunReport(trainer, tmp_path / "run", samples_every=2)
    history = trainer.fit(PROMPTS, batch_size=1, callbacks=[report], verbose=0).history
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(events.Tags()["scalars"]) == set(history)
    rewards = [point.value for point in events.Scalars("reward")]
    np.testing.assert_allclose(np.mean(rewards), history["reward"][0], rtol=1e-6)
    assert [point.step for point in events.Scalars("reward")] == [1, 2, 3, 4, 5]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [one["step"] for one in samples] == [1, 1, 3, 3, 5, 5]
    assert {name: value for name, value in samples[-1].items() if name != "step"} == trainer.samples[-1]
    text = events.Tensors("samples")[-1].tensor_proto.string_val[0].decode()
    assert text == table(trainer.samples) and f"{trainer.samples[0]['reward']:.3f}" in text
    assert (tmp_path / "run" / "reward_against_kl.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path(tmp_path).rglob("*.partial"))


def test_a_table_holds_what_tables_are_made_of():
    sample = {"prompt": "a|b", "response": "one\ntwo", "reward": 1.0, "kl": 0.0, "ended": False}
    assert table([sample]).splitlines()[-1] == "| a\\|b | one<br>two | 1.000 | 0.000 | cut off |"


# === A second rater ===


def judged(model, rater, **kwargs):
    trainer = ReinforceTrainer(model, letters, group_size=2, max_new_tokens=4)
    judge = SideBySide(trainer, rater, PROMPTS, every=1, **kwargs)
    return trainer, judge


def of_opinions(win_rates):
    """A rater that is asked both ways round, and prefers the policy as told, one judgement after the other."""
    ratings = iter([rating for rate in win_rates for rating in (rate, 1 - rate)])
    return lambda prompts, firsts, seconds: [next(ratings)] * len(prompts)


def test_a_judge_sees_both_places_and_the_reference(model):
    seen = []

    def rater(prompts, firsts, seconds):
        seen.append((prompts, firsts, seconds))
        return [1.0] * len(prompts)

    trainer, judge = judged(model, rater)
    reference = trainer.sample(PROMPTS, 0)
    history = trainer.fit(PROMPTS, batch_size=5, epochs=3, callbacks=[judge], verbose=0).history
    # It likes whatever comes first.
    assert history["judge_win_rate"] == [0.5, 0.5, 0.5] and not judge.hacked
    (_, firsts, seconds), (_, others, again) = seen[-2:]
    assert firsts == again and seconds == others == reference
    assert firsts == trainer.sample(PROMPTS, 0) and trainer.sample(PROMPTS, 0, of_reference=True) == reference


def test_a_reward_that_rises_while_the_judge_turns_away_ends_the_run(model):
    """The rewards of the run, and how a rater of another opinion sees them."""
    asked = iter(range(100))
    weights = []

    def rising(prompts, texts):
        return [next(asked) + text.count("e") / 10 for text in texts]

    trainer = ReinforceTrainer(model, rising, group_size=2, max_new_tokens=4)
    judge = SideBySide(trainer, of_opinions([0.6, 0.8, 0.7, 0.7, 0.7]), PROMPTS, every=1, patience=2)
    kept = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: weights.append(model.get_weights()))
    trainer.fit(PROMPTS, batch_size=5, epochs=9, callbacks=[judge, kept], verbose=0)
    assert judge.hacked and trainer.step == 4
    np.testing.assert_allclose([one["win_rate"] for one in judge.judgements], [0.6, 0.8, 0.7, 0.7], atol=1e-6)
    assert all(one["low"] < one["win_rate"] < one["high"] for one in judge.judgements)
    for here, best in zip(model.get_weights(), weights[1]):
        np.testing.assert_array_equal(here, best)
    assert any((best != last).any() for best, last in zip(weights[1], weights[3]))


def test_a_falling_reward_is_no_hacking(model):
    asked = iter(range(100))
    trainer = ReinforceTrainer(
        model, lambda prompts, texts: [-next(asked) for _ in texts], group_size=2, max_new_tokens=4
    )

    judge = SideBySide(trainer, of_opinions([0.8, 0.7, 0.6, 0.5]), PROMPTS, every=1, patience=1)
    trainer.fit(PROMPTS, batch_size=5, epochs=4, callbacks=[judge], verbose=0)
    assert not judge.hacked and len(judge.judgements) == 4


def test_a_judge_goes_on_with_its_run(make_model, tmp_path):
    def fitted(crash, folder):
        keras.utils.set_random_seed(0)
        policy = make_model(sequence_length=24)
        policy.compile(keras.optimizers.Adam(1e-2))
        rater = lambda prompts, firsts, seconds: [len(a) > len(b) for a, b in zip(firsts, seconds)]  # noqa: E731
        trainer, judge = judged(policy, rater)
        try:
            trainer.fit(
                PROMPTS, batch_size=1, callbacks=[judge, CrashAt(crash)], verbose=0, checkpoints=folder,
                save_every_steps=1,
            )  # fmt: skip
        except Crash:
            return None
        return judge

    expected = fitted(100, tmp_path / "whole").judgements
    assert fitted(3, tmp_path / "broken") is None
    judge = fitted(100, tmp_path / "broken")
    assert judge.judgements == expected and len(expected) == 5
    assert len(judge._best_weights) == len(judge.trainer.policy.trainable_variables)


class Counted:
    """Rates a response by its tokens, as a reward model does."""

    preprocessor = None

    def __init__(self):
        self.rows = []

    def score_tokens(self, rows, batch_size):
        self.rows.append(rows)
        return np.array([sum(row) for row in rows], "float32")


def test_a_reward_model_that_judges_reads_the_very_tokens(model):
    rater = Counted()
    trainer = ReinforceTrainer(model, lambda prompts, texts: [*map(len, texts)], group_size=2, max_new_tokens=4)
    judge = SideBySide(trainer, rater, PROMPTS, every=1)
    trainer.fit(PROMPTS, batch_size=5, epochs=4, callbacks=[judge], verbose=0)
    ours, theirs = rater.rows[-2:]
    written = trainer.rollouts(PROMPTS, 0)
    end = [model.preprocessor.tokenizer.end_token_id]
    assert ours == [p + r + end * (not e) for p, r, e in zip(written.prompts, written.responses, written.ended)]
    assert [row[: len(prompt)] for row, prompt in zip(theirs, written.prompts)] == written.prompts
    expected = [0.5 + 0.5 * np.sign(sum(a) - sum(b)) for a, b in zip(ours, theirs)]
    np.testing.assert_allclose(judge.judgements[-1]["win_rate"], np.mean(expected), rtol=1e-6)
    assert ours != theirs


def test_a_reward_model_that_judges_by_no_number_is_told(model):
    rater = Counted()
    rater.score_tokens = lambda rows, batch_size: np.full(len(rows), np.nan, "float32")
    trainer, judge = judged(model, rater)
    with pytest.raises(ValueError, match=r"Rewards are finite. Received: nan"):
        trainer.fit(PROMPTS, batch_size=5, callbacks=[judge], verbose=0)


def test_a_judge_compares_with_the_reference_of_the_checkpoint(make_trainer, tmp_path):
    seen = []

    def fitted(epochs, moved=0.0):
        trainer = make_trainer()
        reference = trainer.sample(PROMPTS, 0, of_reference=True)
        trainer.update.reference = [value + moved for value in trainer.reference]
        judge = SideBySide(trainer, lambda p, a, b: seen.append(b) or [0.5] * len(p), PROMPTS, every=2)
        trainer.fit(PROMPTS, batch_size=2, epochs=epochs, callbacks=[judge], verbose=0, checkpoints=tmp_path)
        return reference

    reference = fitted(1)
    fitted(2, moved=1.0)
    assert seen[0] == seen[2] == reference and len(seen) == 4


def test_a_judge_without_room_is_told_before_anything_is_trained(model, tokenizer):
    preprocessor = GemmaRewardModelPreprocessor(tokenizer, sequence_length=6)
    trainer, judge = judged(model, GemmaRewardModel(model.backbone, preprocessor))
    with pytest.raises(ValueError, match="policy, reward model and rater: it has at most 1 tokens"):
        trainer.fit(PROMPTS, batch_size=5, callbacks=[judge], verbose=0)
    assert trainer.step == 0
    judge.prompts = []
    with pytest.raises(ValueError, match="one at least"):
        trainer.fit(PROMPTS, batch_size=5, callbacks=[judge], verbose=0)
    other = GemmaRewardModel.from_preset("gemma_tiny_en", load_weights=False)
    with pytest.raises(ValueError, match="one vocabulary"):
        SideBySide(trainer, other, PROMPTS)


@pytest.mark.parametrize(
    "settings, part",
    [({"every": 0}, "at least 1"), ({"tolerance": -1}, "at least 0"), ({"rater": "good"}, "or a callable")],
)
def test_judges_that_are_refused(model, settings, part):
    trainer = ReinforceTrainer(model, letters)
    with pytest.raises(ValueError, match=part):
        SideBySide(trainer, **{"rater": letters, "prompts": PROMPTS, **settings})


@pytest.mark.parametrize("ratings", [[2.0] * 5, [0.5], [np.nan] * 5])
def test_ratings_that_are_refused(model, ratings):
    trainer, judge = judged(model, lambda *_: ratings)
    with pytest.raises(ValueError, match="one number from 0 to 1 for each of 5 pairs"):
        trainer.fit(PROMPTS, batch_size=5, callbacks=[judge], verbose=0)
