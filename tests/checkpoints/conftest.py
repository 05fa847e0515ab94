import keras
import keras_hub
import numpy as np
import pytest

TOKENS = {"token_ids": np.arange(1, 13).reshape(2, 6), "padding_mask": np.ones((2, 6), "int32")}


@pytest.fixture(scope="session")
def logits():
    """`logits(model)`: its output on a fixed batch, as a NumPy array."""
    return lambda model: keras.ops.convert_to_numpy(model(TOKENS)).astype("float32")


@pytest.fixture(scope="session")
def reference_model(vocabulary):
    """`reference_model(shape)`: keras-hub's model, with a setting that is not its preprocessor's default."""

    def make(shape):
        tokenizer = keras_hub.models.GemmaTokenizer(vocabulary)
        preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=24, add_end_token=False)
        model = keras_hub.models.GemmaCausalLM(keras_hub.models.GemmaBackbone(**shape), preprocessor)
        # Norms start at zero, which would hide that they are lost.
        for variable in model.backbone.variables:
            if variable.path.endswith("/scale"):
                variable.assign(np.linspace(-0.5, 0.5, variable.shape[0]))
        return model

    return make


@pytest.fixture
def preset(tmp_path, shape, reference_model):
    """A folder saved by keras-hub, once in the shape of 2B and once in that of 7B."""
    folder = tmp_path / "preset"
    reference_model(shape).save_to_preset(folder)
    return folder
