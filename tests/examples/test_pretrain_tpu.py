import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from keras_gemma import GemmaCausalLM
from keras_gemma import startup
from keras_gemma.distribution import CONFIGURATIONS

ROOT = Path(__file__).parent.parent.parent


def pretrain(*arguments):
    # Compiled fast and not for speed: it runs a few steps.
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    return subprocess.run(
        [sys.executable, "examples/pretrain_tpu.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )


def test_a_mesh_of_four_devices_trains_and_saves(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    lines = [json.dumps({"text": f"The ship sails on day {n}."}) for n in range(200)]
    (tmp_path / "sea.jsonl").write_text("\n".join(lines))
    small = ["--sequence-length=16", "--batch-size=4", "--steps-per-epoch=2", "--save-every=2"]
    folders = ["--checkpoints", tmp_path / "checkpoints", "--save-preset", tmp_path / "preset"]
    text = ["--text", f"sea={tmp_path / 'sea.jsonl'}", "--weight=sea=1"]
    done = pretrain(*small, *folders, *text, "--epochs=1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"2/2 - .* - tokens/s", done.stdout), done.stdout
    assert GemmaCausalLM.from_preset(str(tmp_path / "preset")).preprocessor.sequence_length == 16
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]


def commands_of(header):
    """The arguments of each command of the header, whether it stands in a line of a shell or in a list of YAML."""
    for listed in re.findall(r"command: \[python, examples/pretrain_tpu.py, (.*?)\]", header, re.S):
        yield [word.strip().strip('"') for word in listed.split(",")]
    for line in re.findall(r"python examples/pretrain_tpu.py(.*(?:\n *--.*)*)", header):
        yield shlex.split(line.split("&")[0].replace("$i", "0").rstrip("'"))


def test_the_commands_of_the_header_fit_their_configurations(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(startup, "leave_out_tensorflow", lambda: None)
    example = importlib.import_module("pretrain_tpu")
    commands = list(commands_of(example.__doc__))
    assert len(commands) == example.__doc__.count("examples/pretrain_tpu.py") == 4
    for command in commands:
        options = example.parsed_options(command)
        configuration = CONFIGURATIONS[options.config]
        replica, data, *_ = configuration.shape(8, options.context, options.model)
        assert options.batch_size % (replica * data * options.accumulate) == 0, command
        if configuration.topology:
            assert options.preset in ("gemma_2b_en", "gemma_7b_en") and options.text, command
            assert options.sequence_length == 8192, command


def test_each_source_is_given_once():
    done = pretrain("--text=web=a.jsonl", "--text=web=b.jsonl")
    assert done.returncode == 2
    assert "argument --text: each NAME is given once. Received: 'web' twice" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=gemma_2b_v5e_512"], "'gemma_2b_v5e_512' is a mesh of 512 devices.*Received: 4 devices"),
        (["--text=web=missing.jsonl"], "No file is or matches 'missing.jsonl'"),
        (["--model=3"], "model axis divides the devices of a pod.*Received: model=3"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = pretrain(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(f"pretrain_tpu.py: error: .*{message}", done.stderr.splitlines()[-1])
