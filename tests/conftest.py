"""What several tests share: a small real vocabulary and the shapes of Gemma in miniature."""

import io
import os
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Keras reads it once, when it is first imported.
os.environ.setdefault("KERAS_BACKEND", "jax")
# Tests make small models anew all the time: what one of them compiled, the others and their processes find again.
# Most of the time goes into compiling programs that run once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest
import sentencepiece

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor
from keras_gemma.models import GemmaTokenizer

LICENSE = ROOT / "LICENSE"

# For tests that start a Python of their own, wherever it runs and whether or not the package is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

_MINIATURE = {"vocabulary_size": 500, "num_layers": 4, "num_query_heads": 4, "head_dim": 8}

# As Gemma 2B: one key-value head. As Gemma 7B: as many as query heads, and heads × head_dim ≠ width.
SHAPES = {
    "2b": {**_MINIATURE, "num_key_value_heads": 1, "hidden_dim": 32, "intermediate_dim": 128},
    "7b": {**_MINIATURE, "num_key_value_heads": 4, "hidden_dim": 24, "intermediate_dim": 96},
}


@pytest.fixture(scope="session")
def vocabulary():
    """Bytes of a SentencePiece vocabulary of 500 pieces, trained on the licence text as Gemma's was trained."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LICENSE.read_text().split("\n\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=_MINIATURE["vocabulary_size"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", "\n"],
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    return GemmaTokenizer(proto=vocabulary)


@pytest.fixture(scope="session")
def make_preprocessor(tokenizer):
    """`make_preprocessor(**kwargs)`: rows of 12 tokens unless told."""

    def make(**kwargs):
        return GemmaCausalLMPreprocessor(tokenizer, **{"sequence_length": 12, **kwargs})

    return make


@pytest.fixture(scope="session")
def make_model(tokenizer, make_preprocessor):
    """`make_model(**kwargs)`: a model that compiles as quickly as one can, with other arguments of its backbone."""

    def make(with_preprocessor=True, sequence_length=12, **kwargs):
        shape = {
            "vocabulary_size": tokenizer.vocabulary_size(), "num_layers": 1, "num_query_heads": 2,
            "num_key_value_heads": 1, "hidden_dim": 8, "intermediate_dim": 16, "head_dim": 4,
        }  # fmt: skip
        preprocessor = make_preprocessor(sequence_length=sequence_length) if with_preprocessor else None
        return GemmaCausalLM(GemmaBackbone(**{**shape, **kwargs}), preprocessor)

    return make


@pytest.fixture(params=SHAPES)
def shape(request):
    """Constructor arguments of a miniature backbone, once in the shape of 2B and once in that of 7B."""
    return dict(SHAPES[request.param])


def pytest_collection_modifyitems(items):
    """With several workers: each file on one of them, and first what takes longest, each backend by itself."""
    for item in items:
        by_itself = item.path.name == "test_backends.py"
        item.add_marker(pytest.mark.xdist_group(item.nodeid if by_itself else str(item.path)))
    items.sort(key=lambda item: item.path.name != "test_backends.py")
