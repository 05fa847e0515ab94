"""Every example says at once how it is used, and by default writes into folders of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_help_and_wrong_options_need_no_keras(example, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(example.parent)!r})\n"
        "for option, status in (('--help', 0), ('--nonsense', 2)):\n"
        "    sys.argv = ['example', option]\n"
        f"    try: runpy.run_path({str(example)!r}, run_name='__main__')\n"
        "    except SystemExit as exit: assert exit.code == status\n"
        "assert not {'keras', 'jax', 'numpy', 'tensorflow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(default: " in done.stdout and str(example.parents[1] / "presets") not in done.stdout
