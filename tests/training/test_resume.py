"""Checkpoints of `fit`, what goes on from them, and what is refused."""

import errno
import random
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_gemma import data
from keras_gemma import training
from keras_gemma.training import checkpoint_folder
from tests.training.crashes import Crash
from tests.training.crashes import CrashAt
from tests.training.crashes import Seen

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
if keras.backend.backend() != "jax":
    pytest.skip("An exact resume is refused elsewhere.", allow_module_level=True)

BATCH = 4
COUNT = 24
EPOCHS = 3
ROWS = np.random.default_rng(0).normal(size=(COUNT, 5)).astype("float32")
LABELS = ROWS.sum(axis=1)


def make_model(width=6, optimizer="adamw", seed=3, **compile_arguments):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(width, activation="tanh"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"], **compile_arguments)
    return model


def preprocess(x, y=None, sample_weight=None):
    return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)


def examples(count=COUNT, batch_size=BATCH, rows=ROWS):
    return data.preprocessed(rows[:count], LABELS[:count], None, batch_size, preprocess, shuffle=True)


def of_batches(batches):
    return data.preprocessed(batches, None, None, None, preprocess)


def of_rows(rows):
    return ROWS[rows], LABELS[rows]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return COUNT // BATCH

    def __getitem__(self, index):
        return of_rows(np.arange(index * BATCH, (index + 1) * BATCH))


class Turning(Batches):
    """Draws a new order by itself after each epoch, from a generator of its own."""

    def __init__(self):
        super().__init__()
        self._generator = np.random.default_rng(1)
        self._order = np.arange(COUNT)

    def __getitem__(self, index):
        return of_rows(self._order[index * BATCH : (index + 1) * BATCH])

    def on_epoch_begin(self):
        self._order = self._generator.permutation(self._order)

    def get_state(self):
        return {"generator": self._generator.bit_generator.state, "order": self._order.tolist()}

    def set_state(self, state):
        self._generator.bit_generator.state = state["generator"]
        self._order = np.array(state["order"])


def grain_rows(repeat=False):
    import grain

    rows = grain.MapDataset.range(COUNT).seed(1).shuffle()
    return (rows.repeat() if repeat else rows).batch(BATCH)


def grain_iterator(repeat=False):
    import grain

    return grain_rows(repeat).to_iter_dataset(grain.ReadOptions(num_threads=0)).map(of_rows)


def resume(folder, **settings):
    return training.ExactResume(folder, **{"save_every_steps": 2, **settings})


def fit(model, folder, make_data=examples, callbacks=(), settings=None, **arguments):
    return resume(folder, **(settings or {})).fit(
        model, make_data(), callbacks=list(callbacks), **{"epochs": EPOCHS, "verbose": 0, **arguments}
    )


def weights(model):
    return [keras.ops.convert_to_numpy(variable.value).tobytes() for variable in model.variables]


def steps(folder):
    return training.ExactResume(folder, 1).folder.steps()


def assert_resumes_exactly(folder, crashes=(5, 6), make_callbacks=list, compile_arguments=None, **arguments):
    """Compares a run that crashed before some steps (counted from where it went on) with one that did not."""
    compile_arguments = compile_arguments or {}
    expected, found = {}, {}
    unbroken = make_model(**compile_arguments)
    history = fit(unbroken, folder / "unbroken", callbacks=[Seen(expected), *make_callbacks()], **arguments)
    for number, crash in enumerate(crashes):
        callbacks = [Seen(found), *make_callbacks(), CrashAt(crash)]
        with pytest.raises(Crash):
            # From the second time on nothing but the checkpoint may carry the state on.
            model = make_model(seed=3 + number, **compile_arguments)
            fit(model, folder / "crashed", callbacks=callbacks, **arguments)
    resumed = make_model(seed=99, **compile_arguments)
    again = fit(resumed, folder / "crashed", callbacks=[Seen(found), *make_callbacks()], **arguments)
    assert found == expected
    assert again.history == history.history and again.epoch == history.epoch
    assert weights(resumed) == weights(unbroken)


# === Going on ===


def test_examples_go_on_in_their_order(tmp_path):
    assert_resumes_exactly(tmp_path)


@pytest.mark.parametrize("crash", [6, 7, *(pytest.param(crash, marks=pytest.mark.slow) for crash in (2, 17))])
def test_at_the_beginning_and_the_end_of_epochs(tmp_path, crash):
    assert_resumes_exactly(tmp_path, crashes=[crash])


FORMS = {
    "PyDataset": (lambda: of_batches(Batches()), {"shuffle": True}),
    "PyDataset with a state": (lambda: of_batches(Turning()), {}),
    "grain.MapDataset": (lambda: of_batches(grain_rows().map(of_rows)), {}),
    "grain.IterDataset": (lambda: of_batches(grain_iterator(repeat=True)), {"steps_per_epoch": 5}),
    "a finite grain.IterDataset": (lambda: of_batches(grain_iterator()), {"epochs": 2}),
}
RARER_FORMS = {
    "examples across epochs": (examples, {"steps_per_epoch": 4}),
    "a grain.MapDataset that repeats": (lambda: of_batches(grain_rows(True).map(of_rows)), {"steps_per_epoch": 5}),
    "a finite grain.IterDataset across epochs": (lambda: of_batches(grain_iterator()), {"steps_per_epoch": 4}),
}


@pytest.mark.parametrize("make_data, arguments", FORMS.values(), ids=FORMS)
def test_every_form_of_data_goes_on(tmp_path, make_data, arguments):
    assert_resumes_exactly(tmp_path, crashes=[8], make_data=make_data, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("make_data, arguments", {**FORMS, **RARER_FORMS}.values(), ids={**FORMS, **RARER_FORMS})
def test_every_form_of_data_goes_on_from_two_crashes(tmp_path, make_data, arguments):
    assert_resumes_exactly(tmp_path, make_data=make_data, **arguments)


def test_several_steps_per_execution(tmp_path):
    assert_resumes_exactly(tmp_path, crashes=[2, 2], compile_arguments={"steps_per_execution": 4})


def test_validation_and_callbacks_that_remember(tmp_path):
    def callbacks():
        return [
            keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=10.0, restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, min_delta=10.0),
        ]

    arguments = {"validation_data": (ROWS, LABELS), "epochs": 5}
    assert_resumes_exactly(tmp_path, crashes=[8], make_callbacks=callbacks, **arguments)


def test_global_generators_go_on(tmp_path):
    class Draw(Seen):
        def on_train_batch_end(self, batch, logs=None):
            drawn = random.random(), np.random.normal(), float(keras.random.normal(()))
            self._add((self._epoch, batch), drawn)

    expected, found = {}, {}
    fit(make_model(), tmp_path / "unbroken", callbacks=[Draw(expected)])
    with pytest.raises(Crash):
        fit(make_model(), tmp_path / "crashed", callbacks=[Draw(found), CrashAt(9)])
    fit(make_model(), tmp_path / "crashed", callbacks=[Draw(found)])
    assert found == expected


def test_a_finished_run_trains_nothing_and_returns_its_history(tmp_path):
    first = make_model()
    history = fit(first, tmp_path)
    again, seen = make_model(), {}
    assert fit(again, tmp_path, callbacks=[Seen(seen)]).history == history.history
    assert seen == {} and weights(again) == weights(first)


def test_a_finished_run_can_be_given_more_epochs(tmp_path):
    expected, found = {}, {}
    fit(make_model(), tmp_path / "at once", callbacks=[Seen(expected)], epochs=3)
    for epochs in (2, 3):
        fit(make_model(), tmp_path / "later", callbacks=[Seen(found)], epochs=epochs)
    assert found == expected


def test_a_run_that_was_stopped_stays_stopped(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    fit(make_model(), tmp_path, callbacks=[Stop()])
    seen = {}
    assert len(fit(make_model(), tmp_path, callbacks=[Seen(seen)]).epoch) == 1
    assert seen == {}


def test_checkpoints_do_not_change_training(tmp_path):
    expected, found = {}, {}
    keras.Model.fit(make_model(), examples(), epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[Seen(expected)])
    fit(make_model(), tmp_path, callbacks=[Seen(found)])
    assert found == expected


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_newest_are_kept(tmp_path, asynchronous):
    fit(make_model(), tmp_path, settings={"keep": 3, "save_every_steps": 4, "asynchronous": asynchronous})
    assert steps(tmp_path) == [12, 16, 18]


def test_saving_by_time(tmp_path):
    fit(make_model(), tmp_path, epochs=1, settings={"save_every_steps": None, "save_every_seconds": 1e-9, "keep": 100})
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_what_an_interrupted_save_left_is_removed(tmp_path):
    fit(make_model(), tmp_path, epochs=1)
    shutil.copytree(tmp_path / "6", tmp_path / "8.orbax-checkpoint-tmp")
    fit(make_model(), tmp_path, epochs=1)
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


# === Refusing ===


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    fit(make_model(), folder, epochs=1)
    assert steps(folder) == [4, 6]
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {"flipped": flip, "truncated": truncate, "missing": lambda path: path.unlink()}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_by_name(finished, tmp_path, damage):
    model = make_model()
    for number, name in enumerate(files_of(finished / "6")):
        if name.name in checkpoint_folder.WRITTEN_LATER:
            continue
        folder = shutil.copytree(finished, tmp_path / str(number))
        damage(folder / "6" / name)
        with pytest.raises(training.DamagedCheckpointError, match="step 4 is whole") as error:
            fit(model, folder)
        assert str(folder / "6") in str(error.value)
        assert name.name in str(error.value) or name.name == checkpoint_folder.DIGESTS
        assert steps(folder) == [4, 6], "nothing is removed without being told"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", checkpoint_folder.WRITTEN_LATER)
def test_files_of_orbax_that_carry_no_state_do_not_matter_or_are_refused(copy, damage, name):
    damage(copy / "6" / name)
    seen = {}
    try:
        fit(make_model(), copy, callbacks=[Seen(seen)], epochs=2)
    except training.DamagedCheckpointError:
        return
    assert [place for place in seen] == [(1, batch) for batch in range(6)]


def test_after_removing_the_damaged_one_the_run_goes_on_from_the_one_before(copy):
    flip(copy / "6" / "run" / "run.json")
    shutil.rmtree(copy / "6")
    seen = {}
    fit(make_model(), copy, callbacks=[Seen(seen)], epochs=1)
    assert list(seen) == [(0, 4), (0, 5)]


def test_nothing_whole_is_told(copy):
    shutil.rmtree(copy / "4")
    flip(copy / "6" / "run" / "run.json")
    with pytest.raises(training.DamagedCheckpointError, match="No other checkpoint"):
        fit(make_model(), copy)


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"model": {"width": 7}}, r"'sequential dense kernel' float32\[5, 6\] there"),
        ({"model": {"optimizer": "sgd"}}, "optimizer is 'AdamW' there and 'SGD' here"),
        ({"model": {"steps_per_execution": 2}}, "steps_per_execution is 1 there and 2 here"),
        ({"fit": {"steps_per_epoch": 2}}, "steps_per_epoch is None there and 2 here"),
        ({"fit": {"class_weight": {0: 2}}}, r"class_weight is None there and \[\[0, 2.0\]\] here"),
        ({"data": {"count": 20}}, "batches in a pass is 6 there and 5 here"),
        ({"data": {"batch_size": 8}}, "batches in a pass"),
        ({"data": {"rows": ROWS + 1}}, "another batch"),
    ],
)
def test_a_foreign_checkpoint_is_refused_by_name(copy, changed, match):
    shutil.rmtree(copy / "6")
    seen = {}
    with pytest.raises(training.ForeignCheckpointError, match=match) as error:
        fit(
            make_model(**changed.get("model", {})),
            copy,
            lambda: examples(**changed.get("data", {})),
            callbacks=[Seen(seen)],
            **changed.get("fit", {}),
        )
    assert str(copy / "4") in str(error.value)
    assert seen == {} and steps(copy) == [4]


@pytest.mark.parametrize("form", ["grain.MapDataset", "a finite grain.IterDataset"])
def test_other_data_between_epochs_are_refused(tmp_path, monkeypatch, form):
    make_data, _ = FORMS[form]
    fit(make_model(), tmp_path, make_data, epochs=1, settings={"save_every_steps": 5})
    monkeypatch.setitem(globals(), "ROWS", ROWS + 1)
    with pytest.raises(training.ForeignCheckpointError, match=r"another batch .* 0 batches into epoch 1"):
        fit(make_model(), tmp_path, make_data)


def shorter_iterator():
    return grain_iterator().filter(lambda batch: False)


def iterator_of_another_kind():
    import grain

    return grain.IterDataset.mix([grain_iterator(), grain_iterator()])


@pytest.mark.parametrize("other", [shorter_iterator, iterator_of_another_kind])
def test_an_iterator_over_other_data_is_refused(tmp_path, other):
    fit(make_model(), tmp_path, lambda: of_batches(grain_iterator()), epochs=1)
    with pytest.raises(training.ForeignCheckpointError, match="another batch"):
        fit(make_model(), tmp_path, lambda: of_batches(other()))


def test_another_writers_folder_is_refused(tmp_path):
    (tmp_path / "100").mkdir()
    with pytest.raises(training.DamagedCheckpointError, match="not written by ExactResume"):
        fit(make_model(), tmp_path)


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return of_rows(np.arange(BATCH))


class TurningInSecret(Batches):
    def on_epoch_end(self):
        pass


@pytest.mark.parametrize(
    "make_data, match",
    [
        (lambda: of_batches(iter([of_rows(np.arange(BATCH))])), "Received: generator"),
        (lambda: of_batches(Endless()), "known length"),
        (lambda: of_batches(Batches(workers=2)), "workers=2"),
        (lambda: of_batches(TurningInSecret()), "get_state"),
    ],
)
def test_data_that_cannot_begin_in_the_middle_are_refused_at_once(tmp_path, make_data, match):
    with pytest.raises(ValueError, match=match):
        fit(make_model(), tmp_path, make_data)


def test_validation_data_whose_place_is_lost_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"begin anew each time.*Received: generator"):
        fit(make_model(), tmp_path / "run", validation_data=(of_rows(np.arange(BATCH)) for _ in range(9)))
    assert not (tmp_path / "run").exists()


def test_another_callback_that_restores_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"leave `BackupAndRestore` out"):
        fit(make_model(), tmp_path / "run", callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "other")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"save_every_steps": None}, {"save_every_steps": 0}, {"keep": 0}])
def test_settings_are_checked(tmp_path, settings):
    with pytest.raises(ValueError, match=r"save_every_steps|keep"):
        resume(tmp_path, **settings)


def test_a_fit_that_cannot_resume_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="hands it the data"):
        make_model().fit(ROWS, LABELS, callbacks=[resume(tmp_path)], verbose=0)


def test_without_orbax_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"keras_gemma\[train\]"):
        resume(tmp_path)


# === Errors while it runs ===


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("Mounting a small disk needs root.")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk, tmp_path):
    with pytest.raises(training.CheckpointNotSavedError, match=r"step \d+ .* disk is full") as error:
        fit(make_model(), small_disk / "run")
    # The disk has room for a few; only whole ones are left, the last two of them.
    *_, former, last = sorted(int(path.name) for path in (small_disk / "run").iterdir())
    assert (last, len(list((small_disk / "run").iterdir()))) == (former + 2, 2), "what was half written stays"
    assert f"step {last + 2} " in str(error.value) and str(small_disk / "run" / str(last)) in str(error.value)
    expected, found = {}, {}
    fit(make_model(), tmp_path / "unbroken", callbacks=[Seen(expected)])
    moved = shutil.copytree(small_disk / "run", tmp_path / "run")
    fit(make_model(), moved, callbacks=[Seen(found)])
    assert found.items() <= expected.items() and min(found) == divmod(last, len(expected) // 3)


def test_an_error_of_the_background_stops_training_and_loses_nothing(tmp_path, monkeypatch):
    digests = checkpoint_folder._digests

    def full_at_step_6(folder, names=None):
        if folder.name.startswith("6."):
            raise OSError(errno.ENOSPC, "No space left on device")
        return digests(folder, names)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "_digests", full_at_step_6)
        with pytest.raises(training.CheckpointNotSavedError, match=r"step 6 .* disk is full") as error:
            fit(make_model(), tmp_path)
    assert str(tmp_path / "4") in str(error.value)
    assert steps(tmp_path) == [2, 4]
    fit(make_model(), tmp_path)
    assert steps(tmp_path) == [16, 18]


# === Losses that are not finite ===


def broken_rows(batch, value):
    rows = ROWS.copy()
    rows[batch * BATCH : (batch + 1) * BATCH] = value
    return data.preprocessed(rows, LABELS, None, BATCH, preprocess)


class Poisoned(Batches):
    """Gives NaN or infinity at one batch of one epoch."""

    def __init__(self, epoch, batch, value):
        super().__init__()
        self._begun = 0
        self._place = epoch, batch
        self._value = value

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x, y * self._value) if (self._begun, index) == self._place else (x, y)

    def on_epoch_begin(self):
        self._begun += 1

    def get_state(self):
        return self._begun

    def set_state(self, state):
        self._begun = state


def test_steps_are_counted_over_the_whole_run_and_the_last_good_checkpoint_is_named(tmp_path):
    def make_data():
        return of_batches(Poisoned(epoch=4, batch=3, value=np.inf))

    arguments = {"make_data": make_data, "callbacks": [training.StopOnNonFiniteLoss()], "settings": {"keep": 9}}
    for _ in range(2):
        with pytest.raises(training.NonFiniteLossError) as error:
            fit(make_model(), tmp_path, **arguments)
        assert (error.value.step, error.value.epoch, error.value.batch) == (16, 2, 3)
        assert str(error.value.checkpoint) == str(tmp_path / "14") and str(tmp_path / "14") in str(error.value)
        assert max(steps(tmp_path)) == 14


def test_nothing_is_saved_from_a_state_that_is_not_finite(tmp_path):
    with pytest.raises(training.NonFiniteLossError, match="step 4"):
        fit(make_model(), tmp_path, lambda: broken_rows(2, np.nan))
    assert steps(tmp_path) == [2]


def test_nothing_is_saved_from_weights_that_are_not_finite(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.layers[0].bias.assign(np.full(6, np.nan))

    with pytest.raises(training.NonFiniteLossError, match="a weight"):
        fit(make_model(), tmp_path, callbacks=[Break()])
    assert steps(tmp_path) == [2, 4]
