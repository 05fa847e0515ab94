"""Whatever raises in `fit`, `evaluate` and `predict`: the model is as it was after its last whole step, and goes on."""

import functools
import signal

import keras
import numpy as np
import pytest

from keras_gemma import data
from keras_gemma import training
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaRewardModel
from keras_gemma.rlhf import DPOTrainer
from tests.training.crashes import Crash


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """A shell that starts tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


if keras.backend.backend() != "jax":
    pytest.skip("Elsewhere the values stay in the model while it trains.", allow_module_level=True)

LENGTH = 12
BATCH = 2
STEPS = 5


class Batches(keras.utils.PyDataset):
    """Batches of token ids, one of which is another, or an error."""

    def __init__(self, broken=None, bad=None):
        super().__init__()
        self._broken, self._bad = broken, bad

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        if index == self._broken:
            return self._bad()
        ids = np.random.default_rng(index).integers(1, 500, (BATCH, LENGTH + 1))
        return {"token_ids": ids[:, :-1], "padding_mask": np.ones((BATCH, LENGTH), "int32")}, ids[:, 1:]


def fails():
    raise Crash


def interrupts():
    signal.raise_signal(signal.SIGINT)


def frame():
    import pandas

    return pandas.DataFrame({"texts": ["the License"]})


def of_other_lengths():
    (x, y) = Batches()[0]
    return {**x, "padding_mask": x["padding_mask"][:, :-1]}, y


BAD = {
    "an error": fails,
    "Ctrl-C": interrupts,
    "a wrong field": lambda: {"sentences": ["the License"]},
    "a data frame": frame,
    "lists of lists": lambda: [["the", "License"]],
    "None": lambda: None,
    # Refused by the program of the step, when Keras has taken the values out of the model.
    "other lengths": of_other_lengths,
}


class At(keras.callbacks.Callback):
    """Fails in one of its methods, the `number`th time that it is called."""

    def __init__(self, method, number, bad=fails):
        super().__init__()
        self._left = iter(range(number))

        def called(*args, **kwargs):
            if next(self._left, None) is None:
                bad()

        setattr(self, method, called)


def values(model):
    return [np.array(variable.value) for variable in [*model.trainable_variables, *model.optimizer.variables]]


@pytest.fixture(scope="module")
def model(make_model):
    keras.utils.set_random_seed(0)
    model = make_model(sequence_length=LENGTH)
    model.compile(keras.optimizers.Adam(1e-2), gradient_accumulation_steps=2)
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def begin(model):
    at_first = values(model)

    def begin(steps_per_execution=1):
        for variable, value in zip([*model.trainable_variables, *model.optimizer.variables], at_first):
            variable.assign(value)
        if model.steps_per_execution != steps_per_execution:
            model.steps_per_execution = steps_per_execution
            model.train_function = model.test_function = model.predict_function = None

    return begin


@pytest.fixture(scope="module")
def after(model, begin):
    """The values after each number of steps."""
    begin()
    listed = [values(model)]

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            listed.append(values(self.model))

    model.fit(Batches(), callbacks=[Note()], shuffle=False, verbose=0)
    return listed


def assert_is_as_after(model, expected):
    for value, other in zip(values(model), expected, strict=True):
        np.testing.assert_array_equal(value, other)


def assert_goes_on(model, tmp_path):
    assert model.generate("the License", max_length=LENGTH).startswith("the License")
    model.save_to_preset(tmp_path / "preset")
    again = GemmaCausalLM.from_preset(tmp_path / "preset")
    assert again.generate("the License", max_length=LENGTH) == model.generate("the License", max_length=LENGTH)
    steps = int(model.optimizer.iterations)
    model.fit(Batches(), verbose=0)
    assert int(model.optimizer.iterations) == steps + STEPS


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_refused_batch_leaves_the_last_whole_step(model, begin, after, bad):
    for broken in (0, 3):
        begin()
        with pytest.raises((Exception, KeyboardInterrupt)):
            model.fit(Batches(broken, bad), shuffle=False, verbose=0)
        assert_is_as_after(model, after[broken])
        for entry in (model.evaluate, model.predict):
            with pytest.raises((Exception, KeyboardInterrupt)):
                entry(Batches(broken, bad), verbose=0)
            assert_is_as_after(model, after[broken])
    with pytest.raises((Exception, KeyboardInterrupt)):
        model.fit(Batches(), validation_data=Batches(1, bad), shuffle=False, verbose=0)
    assert np.isfinite(model.evaluate(Batches(), verbose=0)[0])
    assert len(model.generate(["the License"], max_length=LENGTH)) == 1


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_a_callback_that_fails_leaves_the_last_whole_step(model, begin, after, steps_per_execution):
    trained_by = {
        "on_train_begin": lambda number: 0,
        "on_epoch_begin": lambda number: 0,
        "on_train_batch_begin": lambda number: number * steps_per_execution,
        "on_train_batch_end": lambda number: min((number + 1) * steps_per_execution, STEPS),
        "on_epoch_end": lambda number: STEPS,
        "on_train_end": lambda number: STEPS,
    }
    for method, trained in trained_by.items():
        for number in (0, 1) if "batch" in method else (0,):
            for bad in (fails, interrupts):
                begin(steps_per_execution)
                with pytest.raises((Crash, KeyboardInterrupt)):
                    model.fit(Batches(), callbacks=[At(method, number, bad)], shuffle=False, verbose=0)
                assert_is_as_after(model, after[trained(number)])
    for entry, kind in ((model.evaluate, "test"), (model.predict, "predict")):
        for method in (f"on_{kind}_batch_begin", f"on_{kind}_batch_end"):
            for number in (0, 1):
                with pytest.raises(Crash):
                    entry(Batches(), callbacks=[At(method, number)], verbose=0)
                assert_is_as_after(model, after[STEPS])
    assert np.isfinite(model.evaluate(Batches(), verbose=0)[0])


def test_what_is_refused_in_the_midst_of_an_execution_leaves_the_step_before_it(model, begin, after):
    begin(steps_per_execution=3)
    with pytest.raises(Exception, match="shape"):
        model.fit(Batches(4, of_other_lengths), shuffle=False, verbose=0)
    assert_is_as_after(model, after[4])


def test_ctrl_c_in_the_midst_of_a_step_waits_for_its_end(model, begin, after, monkeypatch, tmp_path):
    begin()
    outcome_of, left = type(model).outcome_of, iter(range(1))

    def interrupted(model, *args, **kwargs):
        if next(left, None) is not None:
            interrupts()
        return outcome_of(model, *args, **kwargs)

    monkeypatch.setattr(type(model), "outcome_of", interrupted)
    model.train_function = None
    with pytest.raises(KeyboardInterrupt):
        model.fit(Batches(), shuffle=False, verbose=0)
    assert_is_as_after(model, after[1])
    assert_goes_on(model, tmp_path)


def test_a_callback_may_evaluate_and_go_on_after_an_error(model, begin, after):
    class Evaluates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # Another name for it than that which Keras watches.
            for bad in (of_other_lengths, fails):
                with pytest.raises((Crash, TypeError, ValueError)):
                    model.evaluate(Batches(batch % 2, bad), verbose=0)

    begin()
    model.fit(Batches(), callbacks=[Evaluates()], shuffle=False, verbose=0)
    assert_is_as_after(model, after[STEPS])


def test_single_batches(model, begin, after, monkeypatch):
    monkeypatch.setattr(model, "preprocessor", None)
    begin()
    model.train_on_batch(*Batches()[0])
    for entry in (model.train_on_batch, model.test_on_batch, lambda x, y: model.predict_on_batch(x)):
        with pytest.raises(Exception, match="shape"):
            entry(*of_other_lengths())
        begin()
        # What Keras remembers of the step before does not come back.
        model.jax_state_sync()
        assert_is_as_after(model, after[0])


def test_exact_resume(model, begin, after, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    for bad, trained in ((At("on_train_batch_end", 3), 4), (At("on_train_batch_begin", 1, interrupts), 3)):
        begin()
        resume = training.ExactResume(tmp_path, save_every_steps=2)
        with pytest.raises((Crash, KeyboardInterrupt)):
            model.fit(Batches(), callbacks=[bad, resume], shuffle=False, verbose=0)
        assert_is_as_after(model, after[trained])
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    plain.compile("sgd", "mse")
    # Its train function is there before.
    plain.fit(np.ones((6, 3)), np.ones(6), batch_size=2, verbose=0)
    batches = data.preprocessed(np.ones((6, 3)), np.ones(6), None, 2, lambda x, y, w: (x, y))
    with pytest.raises(Crash):
        resume = training.ExactResume(tmp_path / "plain", save_every_steps=9)
        resume.fit(plain, batches, callbacks=[At("on_test_batch_begin", 0)], validation_data=batches, verbose=0)
    assert plain.optimizer.iterations == 6 and np.isfinite(plain.get_weights()[0]).all()


def test_under_a_distribution(make_model, begin, after):
    mesh = keras.distribution.DeviceMesh((1,), ["batch"], keras.distribution.list_devices()[:1])
    keras.distribution.set_distribution(keras.distribution.DataParallel(mesh))
    try:
        model = make_model(sequence_length=LENGTH)
        model.compile(keras.optimizers.Adam(1e-2))
        model.fit(Batches(), shuffle=False, verbose=0)
        before = values(model)
        for bad in (of_other_lengths, fails):
            with pytest.raises((Crash, TypeError, ValueError)):
                model.evaluate(Batches(1, bad), verbose=0)
            assert_is_as_after(model, before)
    finally:
        keras.distribution.set_distribution(None)


def test_a_reward_model(model):
    keras.utils.set_random_seed(0)
    rewards = GemmaRewardModel(model.backbone)
    rewards.compile(keras.optimizers.Adam(1e-2))

    class Pairs(Batches):
        def __getitem__(self, index):
            x, _ = super().__getitem__(index)
            return {name: np.stack([value, value[::-1]], axis=1) for name, value in x.items()}, np.zeros(BATCH)

    rewards.fit(Pairs(), verbose=0)
    before = values(rewards)
    for bad in (lambda: {"prompts": ["the"]}, fails, interrupts):
        for entry in (functools.partial(rewards.fit, shuffle=False), rewards.evaluate, rewards.predict):
            with pytest.raises((Exception, KeyboardInterrupt)):
                entry(Pairs(0, bad), verbose=0)
            assert_is_as_after(rewards, before)
    assert np.isfinite(rewards.score_tokens([[2, 5, 1]])).all()
    rewards.fit(Pairs(), verbose=0)


def test_a_policy(model, begin, monkeypatch):
    begin()
    trainer = DPOTrainer(model, microbatch_size=2)
    pairs = [{"prompts": prompt, "chosen": " the", "rejected": " of of"} for prompt in ("the", "You")]
    step = trainer.update._step

    def interrupted(*args):
        interrupts()
        results = step(*args)
        interrupts()
        return results

    with monkeypatch.context() as patch:
        patch.setattr(trainer.update, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(pairs, batch_size=1, verbose=0)
    assert int(model.optimizer.iterations) == 1
    before = values(model)
    for bad in (fails, interrupts):
        with pytest.raises((Crash, KeyboardInterrupt)):
            trainer.fit(pairs, batch_size=1, callbacks=[At("on_train_batch_begin", 0, bad)], verbose=0)
        with pytest.raises((Crash, KeyboardInterrupt)), trainer.update.as_reference():
            bad()
        assert_is_as_after(model, before)
    trainer.fit(pairs, batch_size=1, verbose=0)
    assert int(model.optimizer.iterations) == 3
    assert model.generate("the", max_length=LENGTH).startswith("the")
