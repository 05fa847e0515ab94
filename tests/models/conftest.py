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
