"""What the monitor adds to logs, and where it arrives."""

import csv
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.training import TokenCount
from keras_gemma.training import TrainingMonitor
from keras_gemma.training import WarmUp
from keras_gemma.training import monitor
from keras_gemma.training import training_flops_per_token

SHAPE = {
    "vocabulary_size": 32, "num_layers": 1, "num_query_heads": 2, "num_key_value_heads": 1,
    "hidden_dim": 8, "intermediate_dim": 16, "head_dim": 4,
}  # fmt: skip
ROWS, LENGTH, REAL = 8, 6, 4
TOKENS = ROWS * REAL
SCHEDULE = WarmUp(0.1, warmup_steps=4, total_steps=8, decay="linear")
ADDED = {"learning_rate", "tokens_per_second", "model_flop_utilization"}


def batch():
    ids = np.random.default_rng(0).integers(3, SHAPE["vocabulary_size"], (ROWS, LENGTH + 1)).astype("int32")
    mask = np.zeros((ROWS, LENGTH), "int32")
    mask[:, :REAL] = 1
    return {"token_ids": ids[:, :-1], "padding_mask": mask}, ids[:, 1:], mask


def new_model(learning_rate=SCHEDULE, **kwargs):
    model = GemmaCausalLM(GemmaBackbone(**SHAPE), preprocessor=None)
    optimizer = keras.optimizers.SGD(learning_rate)
    model.compile(optimizer=optimizer, weighted_metrics=[], **kwargs)
    return model


@pytest.fixture(scope="module")
def compiled_once():
    return new_model()


@pytest.fixture
def model(compiled_once):
    """A model at the start of its schedule."""
    compiled_once.optimizer.iterations.assign(0)
    return compiled_once


def fit(model, *callbacks, epochs=2, validate=False, **kwargs):
    """Four steps of two rows an epoch."""
    x, y, mask = batch()
    validation = {"validation_data": (x, y, mask)} if validate else {}
    kwargs = {"verbose": 0, "batch_size": 2, **validation, **kwargs}
    return model.fit(x, y, sample_weight=mask, callbacks=list(callbacks), epochs=epochs, **kwargs).history


class Recorder(keras.callbacks.Callback):
    async_safe = True

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append((self.epoch, batch, dict(logs)))

    def logs(self):
        return [logs for *_, logs in sorted(self.steps, key=lambda step: step[:2])]


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# === In fit ===


@pytest.mark.multi_backend
def test_speed_and_learning_rate_reach_history_files_and_progress_bar(model, tmp_path, capsys):
    recorder = Recorder()
    history = fit(
        model,
        TrainingMonitor(tmp_path / "events", peak_flops=1e12, sequence_length=LENGTH),
        recorder,
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        validate=True,
        verbose=2,
        shuffle=False,
    )
    # The rates of the last steps of the epochs, the fourth and the eighth.
    assert history["learning_rate"] == pytest.approx([0.075, 0.025])
    assert history["tokens"] == [TOKENS, TOKENS]
    per_token = training_flops_per_token(model.backbone.get_config(), LENGTH)
    speed, utilization = np.array(history["tokens_per_second"]), np.array(history["model_flop_utilization"])
    # The few milliseconds of the first epoch may pass before a thread looks at the clock.
    assert speed[1] > 0
    np.testing.assert_allclose(utilization, speed * per_token / 1e12, rtol=1e-6)

    *_, last_line = capsys.readouterr().out.strip().splitlines()
    assert "val_loss:" in last_line and "gradient_norm" not in last_line
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["tokens_per_second"]) for row in rows] == pytest.approx(history["tokens_per_second"], nan_ok=True)

    train, validation = scalars(tmp_path / "events" / "train"), scalars(tmp_path / "events" / "validation")
    assert {*ADDED, "loss", "gradient_norm"} <= set(train)
    assert sorted(step for step, _ in train["learning_rate"]) == list(range(1, 9))
    assert all(value == pytest.approx(float(SCHEDULE(step - 1))) for step, value in train["learning_rate"])
    assert [step for step, _ in validation["loss"]] == [4, 8]
    assert [value for _, value in validation["loss"]] == pytest.approx(history["val_loss"], rel=1e-6)
    assert all(set(logs) >= ADDED for logs in recorder.logs()[4:])


def test_without_token_counts_the_learning_rate_is_left_and_followed():
    class Halve(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 0.5**epoch

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.25), loss="mse")
    callbacks = [TrainingMonitor(), Halve()]
    history = model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, callbacks=callbacks, verbose=0).history
    assert set(history) == {"loss", "learning_rate"} and history["learning_rate"] == [1.0, 0.5]


def test_the_progress_bar_shows_what_one_watches(model, capsys):
    fit(model, TrainingMonitor(peak_flops=1e12, sequence_length=LENGTH), verbose=1)
    shown = capsys.readouterr().out
    assert not [name for name in ("loss", "tokens/s") if f"{name}:" not in shown], shown
    assert not any(f"{name}:" in shown for name in {*ADDED, "gradient_norm", "tokens"})


def test_an_epoch_that_only_compiles_has_no_speed(model):
    history = fit(model, TrainingMonitor(), epochs=3, steps_per_epoch=1)
    assert np.isnan(history["tokens_per_second"][0]) and np.all(np.array(history["tokens_per_second"][1:]) > 0)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch executes one step at a time")
def test_several_steps_in_one_execution():
    recorder = Recorder()
    history = fit(new_model(steps_per_execution=3), TrainingMonitor(), recorder)
    rates = [logs["learning_rate"] for logs in recorder.logs()]
    assert rates == pytest.approx([0.05, 0.075, 0.05, 0.025])  # of the steps 3, 4, 7 and 8
    assert history["learning_rate"] == pytest.approx([0.075, 0.025])
    assert history["tokens"] == [TOKENS, TOKENS]


def test_tensorboard_of_keras_sees_them_too(model, tmp_path):
    board = keras.callbacks.TensorBoard(str(tmp_path), update_freq=1, write_graph=False)
    fit(model, TrainingMonitor(), board)
    import tensorflow as tf

    tags = {
        value.tag
        for file in (tmp_path / "train").iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }
    assert {"batch_learning_rate", "batch_tokens_per_second", "epoch_tokens_per_second"} <= tags


def test_events_are_as_far_apart_as_asked(model, tmp_path):
    fit(model, TrainingMonitor(tmp_path, every=2))
    assert sorted(step for step, _ in scalars(tmp_path / "train")["learning_rate"]) == [2, 4, 6, 8]


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Keras dispatches steps ahead on JAX")
def test_the_training_loop_does_not_wait_for_the_logs(model):
    threads = set()

    class Watch(keras.callbacks.Callback):
        async_safe = True

        def on_train_batch_end(self, batch, logs=None):
            threads.add(threading.current_thread())

    fit(model, TrainingMonitor(), Watch())
    assert threading.main_thread() not in threads


# === By the clock ===


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told: `clock.now += 1.0`."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

        time = staticmethod(time.time)

    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)
    return clock


class Run:
    """Calls a monitor as `fit` does."""

    def __init__(self, clock, steps, **kwargs):
        self.clock = clock
        self.monitor = TrainingMonitor(**kwargs)
        self.monitor.set_params({"steps": steps})
        self.monitor.set_model(keras.Sequential([keras.layers.Dense(1)]))
        self.monitor.model.compile(optimizer=keras.optimizers.SGD(SCHEDULE))
        self.monitor.on_train_begin()
        self.epoch = -1

    def begin_epoch(self):
        self.epoch += 1
        self.tokens = 0
        self.monitor.on_epoch_begin(self.epoch)

    def step(self, batch, seconds, tokens):
        self.monitor.on_train_batch_begin(batch)
        self.clock.now += seconds
        self.tokens += tokens
        logs = {"loss": 1.0, "tokens": float(self.tokens)}
        self.monitor.on_train_batch_end(batch, logs)
        return logs.get("tokens_per_second")

    def end_epoch(self, validation_seconds=0.0):
        self.clock.now += validation_seconds
        logs = {"loss": 1.0, "tokens": float(self.tokens)}
        self.monitor.on_epoch_end(self.epoch, logs)
        return logs["tokens_per_second"]


def test_neither_compilation_nor_validation_counts(clock):
    run = Run(clock, steps=3)
    run.begin_epoch()
    assert run.step(0, seconds=60.0, tokens=100) is None
    assert run.step(1, seconds=2.0, tokens=100) == pytest.approx(50)
    assert run.step(2, seconds=1.0, tokens=80) == pytest.approx(80)
    assert run.end_epoch(validation_seconds=30.0) == pytest.approx(180 / 3)
    clock.now += 5.0
    run.begin_epoch()
    assert run.step(0, seconds=2.0, tokens=100) == pytest.approx(50)
    assert run.step(1, seconds=4.0, tokens=100) == pytest.approx(25)
    assert run.end_epoch() == pytest.approx(200 / 6)


def test_speed_is_measured_over_every_few_steps(clock):
    run = Run(clock, steps=6, every=2)
    run.begin_epoch()
    shown = [run.step(batch, seconds, 100) for batch, seconds in enumerate([60.0, 1.0, 1.0, 3.0, 4.0, 4.0])]
    # Measured at the steps 2, 4 and 6.
    assert shown == [None, 100.0, 100.0, 50.0, 50.0, 25.0]
    assert run.end_epoch() == pytest.approx(500 / 13)


def test_logs_that_come_out_of_order_do_no_harm(clock):
    run = Run(clock, steps=4)
    run.begin_epoch()
    run.step(0, 60.0, 100)
    clock.now += 2.0
    late, early = {"tokens": 300.0}, {"tokens": 200.0}
    run.monitor.on_train_batch_end(2, late)
    run.monitor.on_train_batch_end(1, early)
    assert late["tokens_per_second"] == early["tokens_per_second"] == 100.0
    assert run.monitor.on_train_batch_end(3, same := {"tokens": 400.0}) is None and same["tokens_per_second"] == 100.0


# === Tokens, utilization and refusals ===


@pytest.mark.multi_backend
def test_tokens_are_counted_exactly_where_float32_and_int32_fail():
    count = TokenCount()
    count.carried.assign(2**21)  # 2⁴¹ tokens
    ids, mask = np.ones((2, 3), "int32"), np.array([[1, 1, 0], [1, 0, 0]])
    for _ in range(5):
        count.update_state(ids, sample_weight=mask)
    assert (int(count.carried.numpy()), int(count.rest.numpy())) == (2**21, 15)
    count.rest.assign(2**20 - 1)
    count.update_state(ids)
    assert (int(count.carried.numpy()), int(count.rest.numpy())) == (2**21 + 1, 5)
    assert float(ops.convert_to_numpy(count.result())) == pytest.approx(2**41 + 2**20 + 5, rel=1e-7)


def test_an_unknown_device_has_no_utilization(model):
    assert "model_flop_utilization" not in fit(model, TrainingMonitor(sequence_length=LENGTH))


def test_a_known_device_is_found_and_all_devices_count(model, monkeypatch):
    monkeypatch.setattr(monitor.flops, "device_kind", lambda: "TPU v4")
    monkeypatch.setattr(monitor.flops, "device_count", lambda: 4)
    history = fit(model, TrainingMonitor(sequence_length=LENGTH))
    per_token = training_flops_per_token(model.backbone.get_config(), LENGTH)
    expected = np.array(history["tokens_per_second"]) * per_token / (4 * 275e12)
    np.testing.assert_allclose(history["model_flop_utilization"], expected, rtol=1e-6)


def test_refuses_before_training(model):
    with pytest.raises(ValueError, match=r"at least 1. Received: 0"):
        TrainingMonitor(every=0)
    with pytest.raises(ValueError, match=r"TrainingMonitor\(sequence_length=...\)"):
        fit(model, TrainingMonitor(peak_flops=1e12))
    other = keras.Sequential([keras.layers.Dense(1)])
    other.compile(loss="mse")
    with pytest.raises(ValueError, match=r"Gemma `backbone`. Received: None"):
        other.fit(np.ones((2, 1)), np.ones(2), callbacks=[TrainingMonitor(peak_flops=1e12)], verbose=0)


@pytest.mark.slow  # starts a Python of its own
def test_event_files_need_no_tensorflow(tmp_path):
    program = f"""
import sys
sys.modules["tensorflow"] = None
from keras_gemma.training.event_files import EventFiles
files = EventFiles({str(tmp_path)!r})
files.write("train", 3, {{"loss": 2.0}})
files.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert scalars(tmp_path / "train") == {"loss": [(3, 2.0)]}
