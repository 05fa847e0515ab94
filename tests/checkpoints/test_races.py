"""Several threads save to one place: whoever loses is told, or what is there is that of one of them."""

import os
import threading

import keras
import numpy as np

from keras_gemma.checkpoints import convert
from keras_gemma.checkpoints import converting
from keras_gemma.checkpoints import inspect
from keras_gemma.checkpoints import saving
from keras_gemma.locking import InUseError
from keras_gemma.models import GemmaCausalLM
from keras_gemma.training.checkpoint_folder import CheckpointFolder


def _outcomes(*calls):
    """What each call returned or raised, all of them made at the same time."""
    outcomes, start = {}, threading.Barrier(len(calls))

    def run(index, call):
        start.wait()
        try:
            outcomes[index] = call()
        except Exception as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[index] for index in range(len(calls))]


def test_models_saved_to_one_preset_at_once_leave_one_of_them(tmp_path, make_model):
    models = [make_model() for _ in range(3)]
    for value, model in enumerate(models):
        for weight in model.weights:
            weight.assign(keras.ops.full(weight.shape, float(value)))
    (tmp_path / "preset" / f"{saving.STAGING_PREFIX}left").mkdir(parents=True)
    outcomes = _outcomes(*(lambda m=model: m.save_to_preset(tmp_path / "preset") for model in models))
    assert outcomes == [None] * 3
    loaded = {float(np.unique(weight.numpy())[0]) for weight in GemmaCausalLM.from_preset(tmp_path / "preset").weights}
    assert len(loaded) == 1
    assert not [name for name in os.listdir(tmp_path / "preset") if name.startswith(".")]


def test_of_conversions_to_one_target_at_once_one_succeeds(tmp_path, make_model, monkeypatch):
    make_model().save_to_preset(tmp_path / "source")
    began = threading.Event()
    write = converting.hugging_face.write

    def slowly(*args, **kwargs):
        began.wait(20)
        write(*args, **kwargs)

    def late():
        try:
            return convert(tmp_path / "source", tmp_path / "target", format="hugging_face", progress=False)
        finally:
            began.set()

    monkeypatch.setattr(converting.hugging_face, "write", slowly)
    won, lost = sorted(_outcomes(late, late), key=lambda outcome: isinstance(outcome, Exception))
    assert won.format == "keras" and isinstance(lost, InUseError)
    assert str(lost) == f"`{tmp_path / 'target'}` is being written by another process or thread. " + (
        "Wait until it has finished."
    )
    assert inspect(tmp_path / "target").doubts == [] and set(os.listdir(tmp_path)) == {"source", "target"}


def test_a_folder_of_checkpoints_serves_one_run_at_a_time(tmp_path):
    first, second = (CheckpointFolder(tmp_path, keep=2) for _ in range(2))
    first.open()
    (refused,) = _outcomes(second.open)
    assert isinstance(refused, InUseError) and str(tmp_path) in str(refused)
    second.close()
    (refused,) = _outcomes(second.open)
    assert isinstance(refused, InUseError)
    # The same thread begins anew after a run that could not close its folder.
    second.open()
    second.close()
    (opened,) = _outcomes(first.open)
    assert opened is None
    first.close()
    assert not list(tmp_path.iterdir())
