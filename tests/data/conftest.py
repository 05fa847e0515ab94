"""Real text, and what turns it into tokens."""

import sysconfig
from pathlib import Path

import pytest

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor
from keras_gemma.models import GemmaTokenizer


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    return GemmaTokenizer(proto=vocabulary)


@pytest.fixture(scope="session")
def make_preprocessor(tokenizer):
    """`make_preprocessor(**kwargs)`: rows of 64 tokens unless told."""

    def make(**kwargs):
        return GemmaCausalLMPreprocessor(tokenizer, **{"sequence_length": 64, **kwargs})

    return make


@pytest.fixture(scope="session")
def make_model(tokenizer, make_preprocessor):
    """`make_model(**kwargs)`: a model that compiles as quickly as one can, with other arguments of its preprocessor."""

    def make(**kwargs):
        backbone = GemmaBackbone(
            vocabulary_size=tokenizer.vocabulary_size(), num_layers=1, num_query_heads=2, num_key_value_heads=1,
            hidden_dim=8, intermediate_dim=16, head_dim=4,
        )  # fmt: skip
        return GemmaCausalLM(backbone, make_preprocessor(**kwargs))

    return make


@pytest.fixture(scope="session")
def paragraphs():
    """Paragraphs of Python's own sources: text of real lengths that every machine has."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in ("argparse", "datetime", "inspect", "logging/__init__")]
    return [paragraph for file in files for paragraph in file.read_text("utf-8").split("\n\n") if paragraph.strip()]
