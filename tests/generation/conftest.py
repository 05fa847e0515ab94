"""Small models whose next tokens differ clearly in likelihood, and what full forward passes say of their output."""

import keras
import numpy as np
import pytest
from conftest import SHAPES

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor
from keras_gemma.models import GemmaTokenizer

LAYERS = 2
# Rows and width of the forward passes that outputs are compared with: one shape, compiled once a model.
FORWARD = (4, 512)


def build(shape="2b", preprocessor=None, seed=0, **kwargs):
    backbone = GemmaBackbone(**{**SHAPES[shape], "num_layers": LAYERS, **kwargs})
    set_weights(backbone, seed)
    return GemmaCausalLM(backbone, preprocessor)


def set_weights(backbone, seed):
    random = np.random.default_rng(seed)
    for variable in backbone.trainable_variables:
        variable.assign(random.normal(0.0, 0.3, variable.shape))


@pytest.fixture(scope="session")
def models():
    """Models without a preprocessor, by shape, built once."""
    built = {}

    def model(shape="2b"):
        if shape not in built:
            built[shape] = build(shape)
        return built[shape]

    return model


@pytest.fixture(scope="session")
def text_model(vocabulary):
    return build(preprocessor=GemmaCausalLMPreprocessor(GemmaTokenizer(vocabulary), sequence_length=64))


@pytest.fixture(params=SHAPES)
def shape_name(request):
    return request.param


@pytest.fixture
def prompts():
    return random_prompts(5, 1, 33)


def random_prompts(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(4, 500, length).tolist() for length in lengths]


def tokens_of(prompts, width):
    """`{"token_ids", "padding_mask"}` of prompts, with room up to `width`."""
    mask = np.arange(width)[None, :] < np.array([len(prompt) for prompt in prompts])[:, None]
    token_ids = np.zeros(mask.shape, "int32")
    token_ids[mask] = np.concatenate(prompts)
    return {"token_ids": token_ids, "padding_mask": mask}


def rows_of(outputs):
    return [row[mask].tolist() for row, mask in zip(outputs["token_ids"], outputs["padding_mask"])]


def assert_greedy(model, prompts, rows, margin=1e-4):
    """Every token of `rows` after its prompt has the largest logit of one full forward pass, but for `margin`.

    The margin is what rounding can do: a sequence and a cache are computed in different orders.
    """
    batch, width = FORWARD
    inputs = tokens_of([*rows, *[rows[0]] * (batch - len(rows))], width)
    inputs["padding_mask"] = inputs["padding_mask"].astype("int32")
    logits = np.asarray(keras.ops.convert_to_numpy(model.predict_on_batch(inputs)))
    for prompt, row, scores in zip(prompts, rows, logits):
        assert row[: len(prompt)] == prompt
        of_new = scores[len(prompt) - 1 : len(row) - 1]
        chosen = np.take_along_axis(of_new, np.array(row[len(prompt) :])[:, None], axis=-1)[:, 0]
        assert (chosen >= of_new.max(-1) - margin).all()
