"""Every argument of `fit`, broken off after every step: what goes on ends as what was never broken off, to the bit."""

import shutil

import keras
import numpy as np
import pytest

from keras_gemma import data
from keras_gemma import training
from tests.training.crashes import Seen

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
if keras.backend.backend() != "jax":
    pytest.skip("An exact resume is refused elsewhere.", allow_module_level=True)

BATCH = 4
# Seven batches, of which the last is smaller.
COUNT = 26
EPOCHS = 3
ROWS = np.random.default_rng(0).normal(size=(COUNT, 5)).astype("float32")
LABELS = (ROWS.sum(axis=1) > 0).astype("int32")
WEIGHTS = np.linspace(0.5, 2, COUNT).astype("float32")


def examples(shuffle=True, weights=None):
    def preprocess(x, y, sample_weight):
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    return data.preprocessed(ROWS, LABELS, weights, BATCH, preprocess, shuffle=shuffle)


def of_batches(batches):
    return data.preprocessed(batches, None, None, None, lambda x, y, w=None: (x, y))


def of_rows(rows):
    return ROWS[rows], LABELS[rows]


class Batches(keras.utils.PyDataset):
    """Batches in an order that changes by itself after each epoch."""

    def __init__(self):
        super().__init__()
        self.orders = 0

    def __len__(self):
        return -(-COUNT // BATCH)

    def __getitem__(self, index):
        order = np.random.default_rng(self.orders).permutation(COUNT)
        return of_rows(order[index * BATCH : (index + 1) * BATCH])

    def on_epoch_begin(self):
        self.orders += 1

    def on_epoch_end(self):
        self.orders += 10

    def get_state(self):
        return self.orders

    def set_state(self, state):
        self.orders = state


def grain_map():
    import grain

    return grain.MapDataset.range(COUNT).seed(1).shuffle().batch(BATCH).map(of_rows)


def grain_iterator():
    import grain

    return grain_map().to_iter_dataset(grain.ReadOptions(num_threads=0))


SIZED = {
    "examples": examples,
    "weighted": lambda: examples(shuffle=False, weights=WEIGHTS),
    "PyDataset": lambda: of_batches(Batches()),
    "grain.MapDataset": lambda: of_batches(grain_map()),
}
FORMS = {**SIZED, "grain.IterDataset": lambda: of_batches(grain_iterator())}


def early_stopping():
    return [
        keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=10.0, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10.0),
    ]


def validating(**arguments):
    return {"validation_data": (ROWS, LABELS), **arguments}


def cases():
    """Form, steps of an execution, arguments of `fit`; and whether it is among the few that always run."""
    for form in FORMS:
        for steps_per_execution in (1, 2, 3, 4, 7, 10):
            yield form, steps_per_execution, {}, steps_per_execution == 3 and form in ("examples", "grain.IterDataset")
        for steps_per_execution in (1, 2, 3):
            for steps_per_epoch in (5, 9):
                arguments = {"steps_per_epoch": steps_per_epoch}
                yield form, steps_per_execution, arguments, form == "PyDataset" and steps_per_execution == 2
    for steps_per_execution in (1, 3):
        for arguments in (
            validating(validation_freq=2),
            validating(validation_freq=[1, 3], initial_epoch=1),
            validating(validation_steps=3, validation_batch_size=5),
            validating(epochs=5, callbacks=early_stopping),
            {"initial_epoch": 1},
            {"initial_epoch": 1, "steps_per_epoch": 5},
            {"class_weight": {0: 1.0, 1: 3.0}},
        ):
            for form in ("examples", "PyDataset"):
                yield form, steps_per_execution, arguments, steps_per_execution == 3 and "callbacks" in arguments


def described(case):
    form, steps_per_execution, arguments, _ = case
    # No addresses: each worker of pytest-xdist would have tests of other names.
    told = [
        f"{name}={getattr(value, '__name__', value)}" for name, value in arguments.items() if name != "validation_data"
    ]
    return ", ".join([form, f"executions of {steps_per_execution}", *told])


@pytest.fixture(scope="module")
def make_model():
    """`make_model(steps_per_execution, seed)`: one model for each, as new."""
    made = {}

    def make(steps_per_execution, seed):
        if steps_per_execution not in made:
            model = keras.Sequential([keras.Input((5,)), keras.layers.Dropout(0.3), keras.layers.Dense(2)])
            model.compile(
                keras.optimizers.AdamW(1e-2, gradient_accumulation_steps=2, ema_momentum=0.9, use_ema=True),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                weighted_metrics=["accuracy"],
                steps_per_execution=steps_per_execution,
            )
            model.optimizer.build(model.trainable_variables)
            model.fit(examples(), shuffle=False, verbose=0)
            variables = [*model.variables, *model.optimizer.variables]
            made[steps_per_execution] = model, variables, [np.array(v.value) for v in variables]
        model, variables, values = made[steps_per_execution]
        for variable, value in zip(variables, values):
            variable.assign(value + seed)
        keras.utils.set_random_seed(seed)
        return model

    return make


def values(model):
    return [np.asarray(variable.value).tobytes() for variable in [*model.variables, *model.optimizer.variables]]


def run(model, make_data, folder, save_every, callbacks=list, **arguments):
    seen = {}
    resume = training.ExactResume(folder, save_every_steps=save_every, keep=1000)
    arguments = {"epochs": EPOCHS, "verbose": 0, **arguments}
    history = resume.fit(model, make_data(), callbacks=[Seen(seen), *callbacks()], **arguments)
    return seen, history.history, history.epoch, values(model)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=described(case), marks=[] if case[3] else [pytest.mark.slow]) for case in cases()]
)
def test_goes_on_exactly_after_any_step(make_model, tmp_path, case):
    form, steps_per_execution, arguments, _ = case
    seen, *expected = run(make_model(steps_per_execution, 0), FORMS[form], tmp_path / "unbroken", 1, **arguments)
    steps = sorted(int(path.name) for path in (tmp_path / "unbroken").iterdir())
    assert len(steps) == len(seen)
    for step in steps:
        folder = tmp_path / f"from {step}"
        shutil.copytree(tmp_path / "unbroken" / str(step), folder / str(step))
        later, *found = run(make_model(steps_per_execution, 9), FORMS[form], folder, 10**6, **arguments)
        assert len(later) == len(seen) - steps.index(step) - 1
        assert later.items() <= seen.items(), f"from step {step}"
        assert found == expected, f"from step {step}"
