import json
import os
import re
import subprocess
import sys
from pathlib import Path

from keras_gemma import GemmaCausalLM

ROOT = Path(__file__).parent.parent.parent


def finetune(*arguments):
    return subprocess.run(
        [sys.executable, "examples/finetune_lora.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )


def test_adapters_learn_the_responses_and_are_saved_apart_and_merged(tmp_path):
    pairs = [{"prompts": f"Captain number {n}", "responses": "To the north."} for n in range(300)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    size = ["--sequence-length=32", "--epochs=6", "--rank=4"]
    done = finetune("--pairs", tmp_path / "pairs.jsonl", "--output", tmp_path / "tuned", *size)
    assert (done.returncode, done.stderr) == (0, "")
    before, after = map(float, re.search(r"responses: (\S+) before, (\S+) after", done.stdout).groups())
    assert after < before / 10
    merged = GemmaCausalLM.from_preset(tmp_path / "tuned" / "preset")
    adapted = GemmaCausalLM.from_preset("gemma_tiny_en")
    adapted.backbone.load_lora_weights(str(tmp_path / "tuned" / "adapters.lora.h5"))
    for model in (merged, adapted):
        answer = model.generate("Captain number 12\n", max_new_tokens=8, strip_prompt=True, temperature=0)
        assert answer == "To the north."


def test_errors_are_one_line(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"question": "Who?", "answer": "I."}\n')
    done = finetune("--pairs", tmp_path / "pairs.jsonl")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "line 1: 'prompts', 'responses' is missing or null" in done.stderr
