"""A disk without room gives one sentence, ends no process and leaves what was there before."""

import resource
import signal

import h5py
import numpy as np
import pytest

from keras_gemma.checkpoints import convert
from keras_gemma.checkpoints import save_adapters
from keras_gemma.checkpoints.h5_writing import h5_file
from keras_gemma.data.sources import write_array_record
from keras_gemma.models import GemmaCausalLM

ROOM = 20_000


@pytest.fixture
def no_room():
    """`no_room()`: from now on no file can grow beyond `ROOM` bytes, which needs no rights, unlike a small disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def _contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_changes_where_there_is_no_room(tmp_path, make_model, no_room):
    model = make_model(hidden_dim=16)
    model.save_to_preset(tmp_path / "preset")
    model.save_weights(tmp_path / "one.weights.h5")
    model.save_weights(tmp_path / "some.weights.json", max_shard_size=3.2e-5)
    adapted = make_model(hidden_dim=16).backbone
    adapted.enable_lora(100)
    before = _contents(tmp_path)
    no_room()
    calls = {
        "preset": lambda target: model.save_to_preset(target),
        "one.weights.h5": lambda target: model.save_weights(target),
        "some.weights.json": lambda target: model.save_weights(target, max_shard_size=3.2e-5),
        "new.weights.h5": lambda target: model.save_weights(target),
        "new": lambda target: model.save_to_preset(target, max_shard_size=3.2e-5),
        "hf": lambda target: convert(tmp_path / "preset", target, "hugging_face", progress=False),
        "model.gguf": lambda target: convert(tmp_path / "preset", target, progress=False),
        "flax": lambda target: convert(tmp_path / "preset", target, "flax", progress=False),
        "keras": lambda target: convert(tmp_path / "preset", target, "keras", progress=False),
        "adapters": lambda target: save_adapters(adapted, target),
        "texts": lambda target: write_array_record(({"text": str(n) * 99} for n in range(9_000)), target),
        "copy.weights.h5": lambda target: convert(tmp_path / "preset", target, progress=False),
    }
    for name, call in calls.items():
        with pytest.raises(OSError, match="could not be written: no space left on the disk") as raised:
            call(tmp_path / name)
        assert f"`{tmp_path / name}`" in str(raised.value), name
    assert _contents(tmp_path) == before
    assert GemmaCausalLM.from_preset(tmp_path / "preset").count_params() == model.count_params()


def test_hdf5_of_any_size_survives(tmp_path, no_room):
    with h5_file(tmp_path / "whole.h5") as file:
        file["a/b"] = np.arange(3)
    with h5py.File(tmp_path / "whole.h5") as file:
        assert file["a/b"][()].tolist() == [0, 1, 2]
    no_room()
    for size in (ROOM // 10, ROOM // 4, 10 * ROOM):
        with pytest.raises(OSError, match="too large"), h5_file(tmp_path / "half.h5") as file:
            for index in range(20):
                file[f"group/{index}"] = np.ones(size, "uint8")
