import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_quickstart_learns_and_prints_nothing_but_its_own():
    done = subprocess.run(
        [sys.executable, "examples/quickstart.py", "--examples", "160"],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    before, after = map(float, re.search(r"held-out loss: (\S+) before, (\S+) after", done.stdout).groups())
    assert after < before / 2
