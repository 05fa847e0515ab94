"""Recomputation and scan change what training keeps and how it compiles, never its numbers."""

import keras
import numpy as np
import pytest

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM

SHAPES = {
    "2b": {"num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 8},
    "7b": {"num_query_heads": 2, "num_key_value_heads": 2, "hidden_dim": 12},
}
COMMON = {"vocabulary_size": 50, "num_layers": 3, "intermediate_dim": 16, "head_dim": 4}
LENGTH = 6


def make_model(shape="2b", **kwargs):
    keras.utils.set_random_seed(0)
    model = GemmaCausalLM(GemmaBackbone(**COMMON, **SHAPES[shape], **kwargs))
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    return model


@pytest.fixture(scope="module")
def batch():
    ids = np.random.default_rng(0).integers(3, 50, (4, LENGTH + 1)).astype("int32")
    mask = np.ones((4, LENGTH), "int32")
    mask[1, 4:] = 0
    segments, positions = mask.copy(), np.tile(np.arange(LENGTH, dtype="int32"), (4, 1))
    segments[2, 3:], positions[2, 3:] = 2, np.arange(3)
    x = {"token_ids": ids[:, :-1], "padding_mask": mask, "segment_ids": segments, "positions": positions}
    return x, ids[:, 1:], mask.astype("float32")


def trained(model, batch, steps=2):
    losses = [float(model.train_on_batch(*batch, return_dict=True)["gradient_norm"]) for _ in range(steps)]
    return losses, model.get_weights()


@pytest.fixture(scope="module")
def plain(batch):
    return {shape: trained(make_model(shape), batch) for shape in SHAPES}


def assert_same(received, expected):
    np.testing.assert_allclose(received[0], expected[0], rtol=2e-5)
    for weight, wanted in zip(received[1], expected[1]):
        np.testing.assert_allclose(weight, wanted, atol=1e-5)


@pytest.mark.parametrize("recompute", [pytest.param("block", marks=pytest.mark.multi_backend), "dots"])
def test_recomputation_changes_no_number(batch, plain, recompute):
    assert_same(trained(make_model(recompute=recompute), batch), plain["2b"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recompute", ["none", "block", "dots"])
def test_a_scan_changes_no_number(batch, plain, shape, recompute):
    assert_same(trained(make_model(shape, scan_layers=True, recompute=recompute), batch), plain[shape])


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="a policy of JAX")
def test_a_policy_of_ones_own(batch, plain):
    import jax

    policy = jax.checkpoint_policies.save_only_these_names("attended", "gated")
    for scan in (True, False):
        assert_same(trained(make_model(recompute=policy, scan_layers=scan), batch), plain["2b"])


@pytest.mark.parametrize(
    "scope",
    [
        {"mode": "full"},
        {"mode": "activations"},
        {"mode": "larger_than", "output_size_threshold": 64},
        {"mode": "list_of_layers", "layer_names": [f"decoder_block_{i}" for i in range(3)]},
    ],
    ids=lambda scope: scope["mode"],
)
def test_the_scope_of_keras_works_in_fit(batch, plain, scope):
    with keras.RematScope(**scope):
        model = make_model()
        x, y, weights = batch
        model.fit(x, y, sample_weight=weights, batch_size=4, epochs=2, shuffle=False, verbose=0)
    for weight, wanted in zip(model.get_weights(), plain["2b"][1]):
        np.testing.assert_allclose(weight, wanted, atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="others refuse it")
@pytest.mark.parametrize("scan", [False, True])
def test_random_numbers_go_on_from_step_to_step(batch, scan):
    model = make_model(dropout=0.5, recompute="block", scan_layers=scan)
    model.optimizer.learning_rate = 0.0
    norms, _ = trained(model, batch)
    assert len(set(norms)) == 2


@pytest.mark.parametrize("scan", [False, True])
def test_only_adapters_train(batch, scan):
    def model_with_adapters(**kwargs):
        model = make_model(**kwargs)
        model.backbone.enable_lora(2)
        for block in model.backbone.transformer_layers:
            # Not the zeros that adapters begin with.
            adapter = block.attention.query_dense.lora_kernel_b
            adapter.assign(0.1 * np.ones(adapter.shape))
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        return model

    received = trained(model_with_adapters(scan_layers=scan, recompute="block"), batch)
    assert_same(received, trained(model_with_adapters(scan_layers=False), batch))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="lowers with JAX")
def test_a_scanned_program_does_not_grow_with_depth(batch):
    sizes = {(scan, layers): len(lowered(scan, layers, batch)) for scan in (False, True) for layers in (3, 6)}
    assert sizes[False, 6] > 1.5 * sizes[False, 3]
    # One stack of values a variable and layer is all that is added.
    assert sizes[True, 6] < 1.25 * sizes[True, 3]


def lowered(scan, layers, batch):
    import jax

    shape = {**COMMON, **SHAPES["2b"], "num_layers": layers}
    backbone = GemmaBackbone(**shape, scan_layers=scan)

    def hidden(trainable, inputs):
        return backbone.stateless_call(trainable, [], inputs, training=True)[0]

    return jax.jit(hidden).lower([v.value for v in backbone.trainable_variables], batch[0]).as_text()


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="reads XLA's memory plan")
def test_recomputation_saves_memory():
    import jax

    def temporaries(recompute):
        shape = {**COMMON, **SHAPES["2b"], "num_layers": 6}
        backbone = GemmaBackbone(**shape, scan_layers=True, recompute=recompute)
        ids = np.ones((4, 64), "int32")

        def loss(trainable):
            inputs = {"token_ids": ids, "padding_mask": ids}
            return backbone.stateless_call(trainable, [], inputs, training=True)[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower([v.value for v in backbone.trainable_variables]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, block = (temporaries(recompute) for recompute in ("none", "dots", "block"))
    assert block < dots < none


def test_the_settings_are_saved_with_a_model_and_not_in_a_preset(batch, tmp_path):
    backbone = GemmaBackbone(**COMMON, **SHAPES["2b"], recompute="block", scan_layers=True)
    backbone.save(tmp_path / "backbone.keras")
    loaded = keras.saving.load_model(tmp_path / "backbone.keras")
    assert (loaded.recompute, loaded.scan_layers) == ("block", True)
    backbone.save_to_preset(tmp_path / "preset")
    text = (tmp_path / "preset" / "config.json").read_text()
    assert "recompute" not in text and "scan_layers" not in text


@pytest.mark.parametrize("wrong", [{"recompute": "everything"}, {"scan_layers": "yes"}])
def test_other_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is"):
        GemmaBackbone(**COMMON, **SHAPES["2b"], **wrong)


@pytest.mark.multi_backend
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX recomputes with the same random numbers")
def test_dropout_is_refused_where_it_would_differ(batch):
    model = make_model(dropout=0.5, recompute="block")
    with pytest.raises(ValueError, match="without dropout"):
        model.train_on_batch(*batch)
