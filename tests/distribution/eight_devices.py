"""Checks on eight devices that XLA makes of one CPU. `conftest.py` runs `python eight_devices.py CHECK...`.

Several checks share a process: starting one takes longer than most checks.
"""

import sys
import tempfile
from pathlib import Path

from keras_gemma import startup

if __name__ == "__main__":
    startup.leave_out_tensorflow()

import jax
import keras
import numpy as np

from keras_gemma.distribution import PodParallel
from keras_gemma.distribution import local_model
from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.planning.program import Program
from keras_gemma.training import AdamW

# Scanned, as on accelerators.
TWO_LAYERS = {"num_layers": 2, "scan_layers": True}
COMMON = {"vocabulary_size": 64, "num_layers": 1, "hidden_dim": 16, "intermediate_dim": 64, "head_dim": 8}
SHAPES = {
    "2b": {**COMMON, "num_query_heads": 8, "num_key_value_heads": 1},
    "7b": {**COMMON, "num_query_heads": 4, "num_key_value_heads": 4},
}
LENGTH = 8


def pods(*shape, **kwargs):
    axes = ("replica", "data", "model") if len(shape) == 3 else ("replica", "data", "context", "model")
    mesh = keras.distribution.DeviceMesh(shape, axes)
    return PodParallel(mesh, **kwargs)


def build(shape="2b", **kwargs):
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM(GemmaBackbone(**{**SHAPES[shape], **kwargs}))
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0.0, 0.3, variable.shape))
    return model


def examples(rows, seed=1):
    """Inputs, targets and weights of which some rows have padding and one has no weight at all."""
    random = np.random.default_rng(seed)
    ids = random.integers(3, 64, (rows, LENGTH + 1)).astype("int32")
    mask = (np.arange(LENGTH) < random.integers(3, LENGTH + 1, (rows, 1))).astype("int32")
    weights = random.uniform(0, 1, (rows, LENGTH)).astype("float32") * mask
    weights[1] = 0.0
    return {"token_ids": ids[:, :-1] * mask, "padding_mask": mask}, ids[:, 1:], weights


def trained(model, rows=11, batch=None, **kwargs):
    """Losses and metrics of three steps with a batch that no mesh divides."""
    # With a small epsilon Adam makes whole steps of gradients that are rounding and nothing else.
    model.compile(AdamW(1e-2, epsilon=1e-3))
    x, y, weights = batch or examples(rows)
    return model.fit(x, y, sample_weight=weights, batch_size=rows, shuffle=False, epochs=3, verbose=0, **kwargs).history


def generated(model):
    random = np.random.default_rng(2)
    ids = random.integers(3, 64, (3, 14)).astype("int32")
    mask = (np.arange(14) < np.array([[3], [6], [1]])).astype("int32")
    outputs = model.generate({"token_ids": ids * mask, "padding_mask": mask}, stop_token_ids=None)
    return outputs["token_ids"]


def shard_of(variable):
    return variable.value.addressable_shards[0].data.shape


def run(shape, batch=None, **kwargs):
    model = build(shape, **TWO_LAYERS, **kwargs)
    return model, trained(model, batch=batch), model.get_weights(), generated(model)


def mixed_meshes_train_and_generate_as_one_device_does():
    assert_equal_to_one_device("2b", (2, 2, 2))
    assert_equal_to_one_device("7b", (1, 2, 4))


def data_and_model_meshes_train_and_generate_as_one_device_does():
    assert_equal_to_one_device("2b", (1, 8, 1), (1, 1, 8))


def assert_equal_to_one_device(shape, *meshes, check=None, **settings):
    _, history, weights, tokens = run(shape, **settings)
    for mesh in meshes:
        with pods(*mesh).scope():
            model, received, weights_received, tokens_received = run(shape, **settings)
            for name in history:
                np.testing.assert_allclose(received[name], history[name], rtol=1e-5, err_msg=f"{name} on {mesh}")
            for weight, expected in zip(weights_received, weights):
                np.testing.assert_allclose(weight, expected, atol=1e-5, err_msg=str(mesh))
            np.testing.assert_array_equal(tokens_received, tokens, err_msg=str(mesh))
            assert_cut_as_the_mesh_says(model, mesh)
            if mesh[0] > 1:
                assert_nothing_but_the_sum_of_gradients_crosses_pods(model, mesh)
            if check:
                check(model)


def gradients_are_those_of_one_device():
    """Adam's steps hide the size of gradients; those of SGD are the gradients."""

    def stepped():
        model = build()
        model.compile(keras.optimizers.SGD(1.0))
        x, y, weights = examples(11)
        model.fit(x, y, sample_weight=weights, batch_size=11, verbose=0)
        return model.get_weights()

    before, expected = build().get_weights(), stepped()
    assert all(np.abs(after - weight).max() > 1e-3 for after, weight in zip(expected, before))
    for mesh in ((2, 2, 2), (1, 8, 1), (1, 1, 8)):
        with pods(*mesh).scope():
            for received, weight in zip(stepped(), expected, strict=True):
                np.testing.assert_allclose(received, weight, atol=1e-5, err_msg=str(mesh))


def what_is_kept_of_blocks_is_cut_along_the_model_axis():
    with pods(1, 2, 4).scope():
        model = build(num_layers=3, scan_layers=True, recompute="block")
        model.compile(AdamW(1e-2))
        model.optimizer.build(model.trainable_variables)
        program = compiled_step(model, examples(8))
    # The inputs of three blocks: 4 of 8 rows, 2 of 8 columns.
    assert "f32[3,4,2,16]" in program
    assert "f32[3,4,8,16]" not in program


def assert_cut_as_the_mesh_says(model, mesh):
    """Weights and both moments have as many parts as a pod has devices, but for the one key-value head and norms."""
    _, *data, model_size = mesh
    moments = {v.path.split("/")[-1]: v for v in model.optimizer.variables}
    for weight in model.trainable_variables:
        if len(weight.shape) < 2:
            continue
        parts = np.prod(data) * (1 if weight.shape[0] == 1 else model_size)
        shard = shard_of(weight)
        assert np.prod(shard) * parts == np.prod(weight.shape), (weight.path, shard)
        for moment in ("momentum", "velocity"):
            assert shard_of(moments[f"{weight.path.replace('/', '_')}_{moment}"]) == shard, weight.path


def assert_nothing_but_the_sum_of_gradients_crosses_pods(model, mesh):
    pods_count = mesh[0]
    pod_of = np.repeat(range(pods_count), np.prod(mesh[1:]))
    crossing = [one for one in Program(compiled_step(model, examples(8))).collectives if one.crosses(pod_of)]
    assert {one.kind for one in crossing} == {"all-reduce"}
    # Of what a device has of each weight; of the embeddings once as they look up, and once as they predict.
    weights = [*model.trainable_variables, model.backbone.token_embedding.embeddings]
    gradients = sum(4 * np.prod(shard_of(weight)) for weight in weights)
    # A sum over more devices than pods goes around within the pods as well.
    sent = sum(one.sent * one.turns * (1 - 1 / pods_count) / (1 - 1 / one.groups.shape[-1]) for one in crossing)
    assert sent <= 1.1 * 2 * (1 - 1 / pods_count) * gradients, (sent, gradients)


def compiled_step(model, batch):
    layout = keras.distribution.distribution().get_data_layout
    batch = jax.tree.map(lambda a: keras.distribution.distribute_tensor(a, layout(a.shape)), batch)
    variables = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
    state = [[variable.value for variable in of_kind] for of_kind in (*variables, model.metrics_variables)]
    return jax.jit(model.train_step).lower(state, batch).compile().as_text()


def batches_of_any_size_are_predicted_and_evaluated():
    x, y, weights = examples(11)
    alone = build()
    alone.compile()
    logits, results = alone.predict(x, batch_size=3, verbose=0), alone.evaluate(x, y, 3, weights, verbose=0)
    unweighted = alone.evaluate(x, y, 11, verbose=0)
    with pods(2, 2, 2).scope():
        model = build()
        model.compile()
        received = model.predict(x, batch_size=3, verbose=0)
        assert received.shape == logits.shape == (11, LENGTH, 64)
        np.testing.assert_allclose(received, logits, atol=1e-5)
        cut = [slice(start, start + 5) for start in range(0, 11, 5)]
        batches = (({name: values[rows] for name, values in x.items()}, y[rows]) for rows in cut)
        np.testing.assert_allclose(model.predict(batches, verbose=0, steps=3), logits, atol=1e-5)
        np.testing.assert_allclose(model.evaluate(x, y, 3, weights, verbose=0), results, rtol=1e-5)
        np.testing.assert_allclose(model.evaluate(x, y, 11, verbose=0), unweighted, rtol=1e-5)


def adapters_and_8_bit_weights_lie_on_the_mesh():
    x, _, _ = examples(8)

    def tuned():
        model = build("7b")
        model.backbone.enable_lora(2, target_layer_names=TARGETS)
        return model, trained(model, rows=8)

    _, history = tuned()
    with pods(2, 2, 2).scope():
        model, received = tuned()
        np.testing.assert_allclose(received["loss"], history["loss"], rtol=1e-5)
        assert shards_by_path(model) == {**SHARDS, **shards_of_heads(query=2, key=2)}
        model = build("2b")
        model.backbone.enable_lora(2, target_layer_names=TARGETS)
        assert shards_by_path(model) == {**SHARDS, **shards_of_heads(query=4, key=1)}
        block = "decoder_block_0"
        model = build("7b")
        model.quantize("int8")
        shards = {v.path: shard_of(v) for v in model.variables}
        assert shards["token_embedding/embeddings"] == (32, 8)
        assert shards[f"{block}/attention/key/kernel"] == (2, 8, 8)
        received = model.predict(x, verbose=0)
    quantized = build("7b")
    quantized.quantize("int8")
    np.testing.assert_allclose(received, quantized.predict(x, verbose=0), atol=2e-2)


TARGETS = [
    "token_embedding", "query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear",
]  # fmt: skip
# Of a mesh 2 × 2 × 2 and adapters of rank 2: a device has half of the vocabulary, the width and the feed-forward.
SHARDS = {
    "token_embedding/embeddings": (32, 8),
    "token_embedding/lora_embeddings_a": (32, 2),
    "token_embedding/lora_embeddings_b": (2, 8),
    "ffw_gating/kernel": (8, 16),
    "ffw_gating/lora_kernel_a": (8, 2),
    "ffw_gating/lora_kernel_b": (2, 16),
    "ffw_gating_2/kernel": (8, 16),
    "ffw_gating_2/lora_kernel_a": (8, 2),
    "ffw_gating_2/lora_kernel_b": (2, 16),
    "ffw_linear/kernel": (16, 8),
    "ffw_linear/lora_kernel_a": (16, 2),
    "ffw_linear/lora_kernel_b": (2, 8),
}


def shards_of_heads(query, key):
    return {
        "attention/query/kernel": (query, 8, 8),
        "attention/query/lora_kernel_a": (query, 8, 2),
        "attention/query/lora_kernel_b": (2, 8),
        "attention/key/kernel": (key, 8, 8),
        "attention/key/lora_kernel_a": (key, 8, 2),
        "attention/key/lora_kernel_b": (2, 8),
        "attention/value/kernel": (key, 8, 8),
        "attention/value/lora_kernel_a": (key, 8, 2),
        "attention/value/lora_kernel_b": (2, 8),
        "attention/attention_output/kernel": (query, 8, 8),
        "attention/attention_output/lora_kernel_a": (query, 8, 2),
        "attention/attention_output/lora_kernel_b": (2, 8),
    }


def shards_by_path(model):
    matrices = [weight for weight in model.backbone.weights if len(weight.shape) > 1]
    return {weight.path.removeprefix("decoder_block_0/"): shard_of(weight) for weight in matrices}


def files_of_one_mesh_load_on_others():
    x, _, _ = examples(8)
    with tempfile.TemporaryDirectory() as folder:
        preset, weights = Path(folder) / "preset", Path(folder) / "model.weights.h5"
        with pods(2, 2, 2).scope():
            model = build()
            logits = model.predict(x, verbose=0)
            model.backbone.save_to_preset(preset)
            model.save_weights(weights)

        def check():
            loaded = GemmaCausalLM(GemmaBackbone.from_preset(str(preset)))
            np.testing.assert_allclose(loaded.predict(x, verbose=0), logits, atol=1e-5)
            loaded = GemmaCausalLM(GemmaBackbone(**SHAPES["2b"]))
            loaded.load_weights(weights)
            np.testing.assert_allclose(loaded.predict(x, verbose=0), logits, atol=1e-5)
            return loaded

        check()
        with local_model().scope():
            assert shard_of(check().backbone.token_embedding.embeddings) == (8, 16)


def a_run_goes_on_on_another_mesh():
    from keras_gemma.training import ExactResume

    with tempfile.TemporaryDirectory() as folder:

        def losses(epochs):
            model = build()
            model.compile(AdamW(1e-2))
            x, y, weights = examples(11)
            settings = {"sample_weight": weights, "batch_size": 6, "epochs": epochs, "verbose": 0}
            return model.fit(x, y, callbacks=[ExactResume(folder, save_every_steps=1)], **settings).history["loss"]

        with pods(1, 4, 2).scope():
            begun = losses(1)
        with pods(2, 2, 2).scope():
            gone_on = losses(2)
    assert gone_on[:1] == begun
    with tempfile.TemporaryDirectory() as folder:
        np.testing.assert_allclose(gone_on, losses(2), rtol=1e-5)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
