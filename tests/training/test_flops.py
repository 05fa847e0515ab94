"""Counted operations against those that XLA counts, and against the sums of the papers."""

import keras
import numpy as np
import pytest

from keras_gemma.models import GemmaBackbone
from keras_gemma.models import GemmaCausalLM
from keras_gemma.training import peak_flops
from keras_gemma.training import training_flops_per_token
from keras_gemma.training.flops import device_count

GEMMA_2B = {
    "vocabulary_size": 256_000, "num_layers": 18, "num_query_heads": 8, "num_key_value_heads": 1,
    "hidden_dim": 2048, "intermediate_dim": 32_768, "head_dim": 256,
}  # fmt: skip
GEMMA_7B = {
    "vocabulary_size": 256_000, "num_layers": 28, "num_query_heads": 16, "num_key_value_heads": 16,
    "hidden_dim": 3072, "intermediate_dim": 49_152, "head_dim": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    # All weights of the published models, of which those of the norms multiply no matrix.
    "config, parameters, norms",
    [(GEMMA_2B, 2_506_172_416, 37 * 2048), (GEMMA_7B, 8_537_680_896, 57 * 3072)],
)
def test_six_operations_a_parameter_and_twelve_for_attention(config, parameters, norms):
    length = 8192
    attention = 12 * config["num_layers"] * config["num_query_heads"] * config["head_dim"] * length
    assert training_flops_per_token(config, length) == 6 * (parameters - norms) + attention
    # A token sees those before it and itself.
    mean_seen = np.mean(np.arange(1, length + 1))
    causal = 6 * (parameters - norms) + attention * mean_seen / length
    assert training_flops_per_token(config, length, causal=True) == pytest.approx(causal, rel=1e-12)


def test_frozen_weights_save_the_products_for_their_gradients():
    products = training_flops_per_token(GEMMA_2B, 0)
    assert training_flops_per_token(GEMMA_2B, 0, trainable_share=0.0) == pytest.approx(products * 2 / 3)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA counts")
@pytest.mark.parametrize("heads, kv_heads, inner", [(4, 1, 512), (4, 4, 1536)])
def test_xla_counts_as_many(heads, kv_heads, inner):
    import jax

    # One layer: XLA counts the body of a loop over layers once.
    model = GemmaCausalLM(GemmaBackbone(512, 1, heads, kv_heads, 128, inner, 64), preprocessor=None)
    length, batch = 128, 2
    ones = np.ones((batch, length), "int32")

    def forward(weights):
        state = model.stateless_call(weights, [], {"token_ids": ones, "padding_mask": ones})
        return state[0]

    weights = [variable.value for variable in model.trainable_variables]
    # Before optimisation, since what the CPU's libraries compute XLA does not see.
    counted = jax.jit(forward).lower(weights).cost_analysis()["flops"]
    ours = training_flops_per_token(model.backbone.get_config(), length) / 3 * batch * length
    assert ours == pytest.approx(counted, rel=0.05)
    assert ours < counted, "norms, rotation and softmax come on top"


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind, peak):
    assert peak_flops(kind) == peak


@pytest.mark.multi_backend
def test_the_cpu_has_no_peak():
    assert peak_flops() is None and device_count() == 1
