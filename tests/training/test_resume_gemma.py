"""Text in each form that `fit` takes, in a run that breaks off and goes on."""

import json

import keras
import numpy as np
import pytest

from keras_gemma import data
from keras_gemma import training
from tests.training.crashes import Crash
from tests.training.crashes import CrashAt
from tests.training.crashes import Seen

grain = pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
if keras.backend.backend() != "jax":
    pytest.skip("An exact resume is refused elsewhere.", allow_module_level=True)

TEXTS = [f"{'the License ' * (1 + n % 3)}{n}" for n in range(24)]
PAIRS = {"prompts": TEXTS, "responses": [text[::-1] for text in TEXTS]}
LENGTH = 32
BATCH = 2
EPOCHS = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The texts in files of every format."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("files")
    rows = [{"text": text} for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), folder / "texts.parquet")
    data.write_array_record(rows[::2], folder / "texts.array_record")
    return folder


def mixed(files):
    """Examples of three sources whose shares change in the middle of an epoch."""
    sources = {
        "jsonl": data.from_jsonl(files / "texts.jsonl"),
        "parquet": data.from_parquet(files / "texts.parquet"),
        "records": data.from_array_record(files / "texts.array_record"),
    }
    stages = [data.Stage({"jsonl": 3, "parquet": 1}, examples=12), data.Stage({"parquet": 1, "records": 2})]
    return data.mixture(sources, stages, seed=1)


def batches(files, preprocessor, **settings):
    return data.training_batches(mixed(files), preprocessor, BATCH, window=4, **settings)


def ahead(files, preprocessor):
    data.tokenize_ahead(data.from_jsonl(files / "texts.jsonl"), preprocessor, files / "tokens")
    return data.training_batches(data.from_tokens(files / "tokens").shuffle(seed=1), preprocessor, BATCH, window=4)


LISTED = {"batch_size": BATCH}
ACROSS_EPOCHS = {"steps_per_epoch": 6}
# What `fit` is given: of files and preprocessor; and its other arguments.
FORMS = {
    "strings": (lambda *_: TEXTS, {"steps_per_execution": 4, "validation_split": 0.25, "validation_freq": 2, **LISTED}),
    "packed pairs": (lambda *_: PAIRS, {"pack": True, **LISTED}),
    "batches of a mixture": (batches, ACROSS_EPOCHS),
}
RARER_FORMS = {
    "packed strings": (lambda *_: TEXTS, {"pack": True, **LISTED}),
    "packed mixture": (lambda files, _: mixed(files), {"pack": True, **LISTED, **ACROSS_EPOCHS}),
    "batches of a mixture, a row an example": (lambda *args: batches(*args, pack=False), ACROSS_EPOCHS),
    "batches of tokens, pass by pass": (ahead, {}),
}


@pytest.fixture
def fit(make_model, files):
    """`fit(make_data, folder, seen, seed, crash, **kwargs)`: history without speeds, and bytes of all variables."""

    def fit(make_data, folder, seen, seed=1, crash=None, steps_per_execution=1, **kwargs):
        keras.utils.set_random_seed(seed)
        model = make_model(sequence_length=LENGTH, dropout=0.1)
        schedule = training.WarmUp(1e-2, warmup_steps=3, total_steps=30)
        model.compile(training.AdamW(schedule), gradient_accumulation_steps=2, steps_per_execution=steps_per_execution)
        callbacks = [
            Seen(seen),
            training.TrainingMonitor(),
            training.StopOnNonFiniteLoss(),
            training.ExactResume(folder, save_every_steps=2),
            *([CrashAt(crash)] if crash else []),
        ]
        x = make_data(files, model.preprocessor)
        history = model.fit(x, callbacks=callbacks, **{"epochs": EPOCHS, "verbose": 0, **kwargs}).history
        del history["tokens_per_second"]
        return history, [np.asarray(variable.value).tobytes() for variable in model.variables]

    return fit


def cases():
    for name, form in {**FORMS, **RARER_FORMS}.items():
        yield pytest.param(*form, id=name, marks=[pytest.mark.slow] if name in RARER_FORMS else [])


@pytest.mark.parametrize("make_data, arguments", cases())
def test_every_form_of_text_goes_on_exactly(fit, tmp_path, make_data, arguments):
    expected, found = {}, {}
    unbroken = fit(make_data, tmp_path / "unbroken", expected, **arguments)
    with pytest.raises(Crash):
        fit(make_data, tmp_path / "crashed", found, crash=len(expected) // 2 + 1, **arguments)
    trained_before = len(found)
    # Another seed: nothing but the checkpoint may carry the state on.
    resumed = fit(make_data, tmp_path / "crashed", found, seed=2, **arguments)
    assert len(expected) >= 2 * EPOCHS and 0 < trained_before < len(expected)
    assert found == expected
    assert resumed == unbroken
