"""Checks of preference tuning on eight devices that XLA makes of one CPU. See `eight_devices.py`."""

import sys

from eight_devices import SHAPES
from eight_devices import TWO_LAYERS
from eight_devices import assert_cut_as_the_mesh_says
from eight_devices import pods

# isort: split
import keras
import numpy as np

from keras_gemma import distribution
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.models import GemmaCausalLMPreprocessor
from keras_gemma.models import GemmaRewardModel
from keras_gemma.models import GemmaRewardModelPreprocessor
from keras_gemma.models import GemmaTokenizer
from keras_gemma.rlhf import DPOTrainer
from keras_gemma.rlhf import ReinforceTrainer
from keras_gemma.rlhf import ppo_trainer
from keras_gemma.training import AdamW

PROMPTS = ["The sea", "At noon we", "In the night"]
PAIRS = [
    {"prompts": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in zip(PROMPTS, (" was calm", " sailed", " a star"), (" no", " went on board", " it"))
]
# With a small epsilon Adam makes whole steps of gradients that are rounding and nothing else.
OPTIMIZER = {"learning_rate": 1e-2, "epsilon": 1e-3}


def scattered(model):
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0.0, 0.1, variable.shape))
    model.compile(AdamW(**OPTIMIZER))
    return model


def backbone(shape):
    keras.utils.set_random_seed(0)
    return GemmaBackbone(**{**SHAPES[shape], **TWO_LAYERS, "vocabulary_size": 4096})


def policy(shape):
    preprocessor = GemmaCausalLMPreprocessor(GemmaTokenizer.from_preset("gemma_tiny_en"), sequence_length=24)
    return scattered(GemmaCausalLM(backbone(shape), preprocessor))


def reward_model(shape):
    preprocessor = GemmaRewardModelPreprocessor(GemmaTokenizer.from_preset("gemma_tiny_en"), sequence_length=24)
    return scattered(GemmaRewardModel(backbone(shape), preprocessor))


def reinforced(shape, make=ReinforceTrainer):
    """A reward model's rewards; microbatches that no mesh divides."""
    trainer = make(policy(shape), reward_model(shape), max_new_tokens=6, group_size=3, microbatch_size=3)
    history = trainer.fit(PROMPTS, batch_size=3, epochs=2, verbose=0).history
    texts = [sample["response"] for sample in trainer.samples]
    return trainer.policy, history, {"texts": texts, "rewards": [sample["reward"] for sample in trainer.samples]}


def clipped(shape):
    return reinforced(shape, ppo_trainer)


def preferred(shape):
    trainer = DPOTrainer(policy(shape), microbatch_size=1)
    return trainer.policy, trainer.fit(PAIRS, batch_size=3, epochs=2, verbose=0).history, {}


def rated(shape):
    model = reward_model(shape)
    columns = {name: np.array([pair[name] for pair in PAIRS]) for name in PAIRS[0]}
    history = model.fit(columns, batch_size=3, epochs=2, shuffle=False, verbose=0).history
    return model, history, {"scores": list(model.score(PROMPTS, columns["chosen"].tolist()))}


def assert_equal_to_one_device(run, shape, *meshes):
    model, history, found = run(shape)
    expected = model.get_weights()
    texts = found.pop("texts", None)
    for mesh in meshes:
        with pods(*mesh).scope():
            model, received, found_here = run(shape)
            for name in (name for name in history if not name.endswith("_seconds")):
                np.testing.assert_allclose(
                    received[name], history[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} {mesh}"
                )
            for weight, wanted in zip(model.weights, expected, strict=True):
                np.testing.assert_allclose(distribution.whole(weight), wanted, atol=1e-5, err_msg=str(mesh))
            assert found_here.pop("texts", None) == texts
            for name in found:
                np.testing.assert_allclose(
                    found_here[name], found[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} {mesh}"
                )
            # The head of a reward model has a single column.
            if run is not rated:
                assert_cut_as_the_mesh_says(model, mesh)


def reinforce_learns_as_on_one_device():
    assert_equal_to_one_device(reinforced, "2b", (2, 2, 2))


def everything_learns_as_on_one_device_on_other_meshes():
    for run in (reinforced, clipped, preferred, rated):
        assert_equal_to_one_device(run, "7b", (1, 2, 4))
        assert_equal_to_one_device(run, "2b", (1, 8, 1))


def pairs_are_learned_as_on_one_device():
    assert_equal_to_one_device(preferred, "2b", (2, 2, 2))
    assert_equal_to_one_device(rated, "2b", (2, 2, 2))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
