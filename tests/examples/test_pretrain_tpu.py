import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from keras_gemma import GemmaCausalLM

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
    assert re.search(r"2/2 - .* - tokens_per_second", done.stdout), done.stdout
    assert GemmaCausalLM.from_preset(str(tmp_path / "preset")).preprocessor.sequence_length == 16
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=gemma_2b_v5e_512"], "'gemma_2b_v5e_512' is a mesh of 512 devices.*Received: 4 devices"),
        (["--text=web=missing.jsonl"], "No file is or matches 'missing.jsonl'"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = pretrain(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(f"pretrain_tpu.py: error: .*{message}", done.stderr.splitlines()[-1])
