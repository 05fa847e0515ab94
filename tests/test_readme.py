"""What README.md and docs/ show, run in their order: each page's Python for itself, shell blocks in a shell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- (?P<mark>\w+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")

# TensorFlow Text's tokenizer says this of every vocabulary without normalisation, and has no switch for it.
TF_TEXT_NOISE = re.compile(r"normalizer\.cc\(\d+\) LOG\(INFO\)")


def blocks(mark=None, language=None, pages=PAGES):
    found = [match.groupdict() for page in pages for match in BLOCK.finditer(page.read_text("utf-8"))]
    return [
        block["code"] for block in found if block["mark"] == mark and (not language or block["language"] == language)
    ]


def test_the_tour_in_python(tmp_path):
    pages = ["\n".join(blocks(language="python", pages=[page])) for page in PAGES]
    code = "\n".join(f"exec({page!r}, {{'__name__': '__main__'}})" for page in pages)
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "<start_of_turn>user" in done.stdout
    # What the page about adapters says that it learned.
    assert "Colour of grass? Green." in done.stdout.splitlines()
    assert "Colour of snow? White." in done.stdout.splitlines(), "the saved model has learned it, too"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = LINK.findall(page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def printed_in_a_shell(command, tmp_path, cwd):
    # `keras-gemma` of this environment, installed or not.
    (tmp_path / "keras-gemma").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m keras_gemma.cli "$@"\n')
    (tmp_path / "keras-gemma").chmod(0o755)
    # A newcomer's shell does not know what this process has set for itself.
    inherited = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment = {**inherited, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(f"set -e\n{command}", shell=True, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if not TF_TEXT_NOISE.match(line)]
    return done.stdout


@pytest.mark.parametrize("command", blocks(mark="shell"))
def test_the_tour_in_the_shell(command, tmp_path):
    assert printed_in_a_shell(command, tmp_path, ROOT).startswith("In the morning")


def test_the_commands_for_checkpoints(tmp_path):
    (command,) = blocks(mark="checkpoints")
    assert "dtypes bfloat16 (38 tensors)" in printed_in_a_shell(command, tmp_path, tmp_path)


def test_the_command_for_tuning(tmp_path):
    (command,) = blocks(mark="tuning")
    assert "6 of 6 examples kept" in printed_in_a_shell(command, tmp_path, tmp_path)
    assert (tmp_path / "tuned" / "preset" / "config.json").exists()


@pytest.mark.parametrize("mark", ["quickstart", "tests"])
def test_the_commands_that_others_extract_are_there(mark):
    (command,) = blocks(mark=mark, pages=PAGES[:1])
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
