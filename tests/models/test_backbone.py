import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_gemma.models import GemmaBackbone

SHAPE = {
    "vocabulary_size": 64, "num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 1,
    "hidden_dim": 16, "intermediate_dim": 64, "head_dim": 8,
}  # fmt: skip

needs_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="distribution runs on JAX")


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"num_key_value_heads": 3}, "must divide"),
        ({"head_dim": 7}, "even"),
        ({"intermediate_dim": 63}, "even"),
        ({"attention_logit_soft_cap": 50.0}, "Gemma 2"),
        ({"use_sliding_window_attention": True}, "Gemma 2"),
        ({"use_post_ffw_norm": True}, "Gemma 2"),
    ],
)
def test_what_gemma_1_is_not_is_refused(change, rule):
    with pytest.raises(ValueError, match=rule):
        GemmaBackbone(**{**SHAPE, **change})


def test_the_configuration_rebuilds_the_backbone():
    backbone = GemmaBackbone(**SHAPE, dropout=0.1, layer_norm_epsilon=1e-5, dtype="mixed_bfloat16")
    rebuilt = GemmaBackbone.from_config(backbone.get_config())
    assert rebuilt.get_config() == backbone.get_config()
    assert [(w.path, w.shape) for w in rebuilt.weights] == [(w.path, w.shape) for w in backbone.weights]


def test_a_model_has_as_many_parameters_as_its_shapes_say():
    kernels = 16 * 8 * (2 * 4 + 2 * 1) + 3 * 16 * 32
    assert GemmaBackbone(**SHAPE).count_params() == 64 * 16 + 2 * (kernels + 2 * 16) + 16


def mesh(shape=(2, 4), names=("batch", "model")):
    return keras.distribution.DeviceMesh(shape, names, devices=[f"cpu:{i}" for i in range(np.prod(shape))])


def axes(layout_map, path):
    return tuple(layout_map[path].axes)


@needs_jax
def test_a_head_axis_that_the_model_axis_does_not_divide_stays_whole():
    layouts = GemmaBackbone.get_layout_map(mesh())
    assert axes(layouts, "decoder_block_0/attention/query/kernel") == ("model", "batch", None)
    assert axes(layouts, "decoder_block_0/attention/key/kernel") == (None, "batch", None)
    assert axes(layouts, "decoder_block_1/attention/value/kernel") == (None, "batch", None)
    layouts = GemmaBackbone.get_layout_map(mesh(), num_query_heads=6, num_key_value_heads=16)
    assert axes(layouts, "decoder_block_0/attention/query/kernel") == (None, "batch", None)
    assert axes(layouts, "decoder_block_0/attention/attention_output/kernel") == (None, None, "batch")
    assert axes(layouts, "decoder_block_0/attention/key/kernel") == ("model", "batch", None)


@needs_jax
def test_every_matrix_has_a_layout_and_every_scale_is_whole():
    layouts = GemmaBackbone.get_layout_map(mesh((2, 4), ("data", "tensor")), "tensor", "data")
    for weight in GemmaBackbone(**SHAPE).weights:
        layout = layouts[weight.path]
        if len(weight.shape) == 1:
            assert layout is None
        else:
            assert len(layout.axes) == len(weight.shape) and "data" in layout.axes, weight.path


@needs_jax
@pytest.mark.parametrize("names", [("batch", "tensor"), ("data", "model")])
def test_a_mesh_without_the_axes_is_refused(names):
    with pytest.raises(ValueError, match="axes"):
        GemmaBackbone.get_layout_map(mesh(names=names))


@needs_jax
def test_what_is_not_a_mesh_is_refused():
    with pytest.raises(ValueError, match="DeviceMesh"):
        GemmaBackbone.get_layout_map("mesh")


ONE_STEP = """
import keras, numpy as np
from keras_gemma.models import GemmaBackbone, GemmaCausalLM
devices = keras.distribution.list_devices()
assert len(devices) == 8

def losses(distribution):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM(GemmaBackbone(**{shape}))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(0, 0.2, weight.shape))
    model.compile(optimizer=keras.optimizers.Adam(0.01), weighted_metrics=None)
    ids = rng.integers(0, 64, (4, 9))
    x = {{"token_ids": ids[:, :-1], "padding_mask": np.ones((4, 8))}}
    weights = rng.uniform(0, 1, (4, 8))
    history = model.fit(x, ids[:, 1:], sample_weight=weights, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return history.history["loss"], model

mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
layout_map = GemmaBackbone.get_layout_map(mesh)
sharded, model = losses(keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch"))
shards = {{w.path: w.value.addressable_shards[0].data.shape for w in model.backbone.weights}}
assert shards["decoder_block_0/attention/query/kernel"] == (1, 8, 8), shards
assert shards["decoder_block_0/attention/key/kernel"] == (1, 8, 8), shards
assert shards["decoder_block_0/ffw_gating/kernel"] == (8, 8), shards
assert shards["token_embedding/embeddings"] == (16, 8), shards
alone, _ = losses(None)
np.testing.assert_allclose(sharded, alone, rtol=1e-5)
assert alone[1] < alone[0]
"""


@needs_jax
def test_a_mesh_of_eight_devices_trains_one_kv_head_as_one_device_does():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", ONE_STEP.format(shape={**SHAPE, "num_layers": 1})],
        env={**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_head_upon_the_backbone_takes_the_inputs_of_keras_hub():
    backbone = GemmaBackbone(50, 1, 2, 1, 16, 32, 8)
    head = keras.Model(backbone.input, keras.layers.Dense(2)(backbone(backbone.input)[:, 0]))
    ones = np.ones((2, 5), "int32")
    assert tuple(head({"token_ids": ones, "padding_mask": ones}).shape) == (2, 2)


def test_the_settings_that_only_later_gemmas_vary_can_be_read():
    backbone = GemmaBackbone(50, 1, 2, 1, 16, 32, 8)
    assert backbone.query_head_dim_normalize is True and backbone.final_logit_soft_cap is None
