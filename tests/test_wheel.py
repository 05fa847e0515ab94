"""What the wheel carries besides code."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGEST_PRESET = 12e6


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


def test_the_wheel_carries_every_preset(wheel):
    names = set(wheel.namelist())
    for config in ROOT.glob("presets/*/config.json"):
        assert f"keras_gemma/presets/{config.parent.name}/config.json" in names
    tiny = "keras_gemma/presets/gemma_tiny_en"
    assert {f"{tiny}/model.weights.h5", f"{tiny}/assets/tokenizer/vocabulary.spm"} <= names


@pytest.mark.parametrize("name", ["gemma_tiny_en", "gemma_tiny_instruct_en"])
def test_the_trained_presets_are_small(wheel, name):
    sizes = [entry.file_size for entry in wheel.infolist() if f"presets/{name}/" in entry.filename]
    assert 1e6 < sum(sizes) <= LARGEST_PRESET
