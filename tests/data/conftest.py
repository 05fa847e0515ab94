"""Real text."""

import sysconfig
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def paragraphs():
    """Paragraphs of Python's own sources: text of real lengths that every machine has."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in ("argparse", "datetime", "inspect", "logging/__init__")]
    return [paragraph for file in files for paragraph in file.read_text("utf-8").split("\n\n") if paragraph.strip()]
