import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from keras_gemma import GemmaCausalLM

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "--learning-rate=0.02",
    "--layers=1",
    "--width=32",
    "--sequence-length=64",
    "--batch-size=4",
    "--steps-per-epoch=20",
    "--save-every=20",
]


def pretrain(*arguments):
    return subprocess.run(
        [sys.executable, "examples/pretrain.py", *SMALL, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two sources that are easy to learn, as options."""
    folder = tmp_path_factory.mktemp("texts")
    options = []
    for name, text in {"sea": "The ship sails on day {}.", "farm": "The cow has {} calves."}.items():
        lines = [json.dumps({"text": text.format(n)}) for n in range(200)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        options += ["--text", f"{name}={folder / name}.jsonl"]
    return options


def test_a_second_start_goes_on_from_the_checkpoint_of_the_first(tmp_path, texts):
    arguments = [*texts, "--weight=sea=3", "--weight=farm=1", "--late-weight=farm=1", "--late-after=100"]
    first = pretrain(*arguments, "--output", tmp_path, "--epochs=1")
    assert first.returncode == 0, first.stderr
    second = pretrain(*arguments, "--output", tmp_path, "--epochs=2")
    assert second.returncode == 0, second.stderr
    # A run from the beginning would say "Epoch 1/2" first.
    assert re.findall(r"Epoch \S+", second.stdout) == ["Epoch 2/2"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["20", "40"]
    for name in ("sea", "farm"):
        before, after = map(float, re.search(rf"held-out {name}: (\S+) bits\D+(\S+) after", second.stdout).groups())
        assert after < before / 2
    assert GemmaCausalLM.from_preset(str(tmp_path / "preset")).backbone.num_layers == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--weight", "poetry=1"], 2, "unknown sources: poetry"),
        (["--text", "web=missing.jsonl"], 1, "pretrain.py: error: No file is or matches 'missing.jsonl'."),
    ],
)
def test_errors_are_one_line(arguments, code, message):
    done = pretrain(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr.splitlines()[-1]
