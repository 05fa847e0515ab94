"""The own backward pass of the feed-forward against the one that JAX derives from the layers."""

import keras
import numpy as np
import pytest

from keras_gemma import kernels
from keras_gemma.kernels import platform
from keras_gemma.models.decoder_block import GemmaDecoderBlock

jax = pytest.importorskip("jax")
pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only"),
    pytest.mark.skipif(jax.default_backend() != "cpu", reason="the path of CPUs"),
]


def random_arguments(batch=3, length=5, width=8, branch=12, scale=1.0):
    random = np.random.default_rng(0)
    shapes = (batch, length, width), (width, branch), (width, branch), (branch, width)
    return [random.normal(0.0, scale, shape).astype("float32") for shape in shapes]


def plain(x, gating, gating_2, linear):
    return (jax.nn.gelu(x @ gating, approximate=True) * (x @ gating_2)) @ linear


@pytest.fixture
def nothing_kept(monkeypatch):
    """Branches are as those of large models."""
    monkeypatch.setattr(platform, "KEPT_BYTES_ON_CPU", 0)


@pytest.fixture(params=[True, False], ids=["kept", "computed again"])
def either_way(request):
    if not request.param:
        request.getfixturevalue("nothing_kept")


# With 4 the gate is far on both sides of what GELU bends.
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_value_and_gradients(scale, either_way):
    arguments = random_arguments(scale=scale)
    of_result = np.random.default_rng(1).normal(size=arguments[0].shape).astype("float32")
    values, gradients = zip(*(_value_and_gradients(one, arguments, of_result) for one in (kernels.geglu, plain)))
    np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5 * np.abs(values[1]).max())
    for ours, expected in zip(*gradients):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def _value_and_gradients(function, arguments, of_result):
    value, gradients_of = jax.vjp(function, *arguments)
    return value, gradients_of(of_result)


@pytest.mark.parametrize("limit, branches", [(3 * 5 * 12 * 4, 2), (3 * 5 * 12 * 4 - 1, 1)])
def test_small_branches_are_kept(limit, branches, monkeypatch):
    monkeypatch.setattr(platform, "KEPT_BYTES_ON_CPU", limit)
    arguments = random_arguments(batch=3, length=5, branch=12)
    _, gradients_of = jax.vjp(kernels.geglu, *arguments)
    kept = sum(x.size for x in jax.tree.leaves(gradients_of))
    assert kept == sum(x.size for x in arguments) + branches * 3 * 5 * 12


def compiled(function, *arguments, **settings):
    return jax.jit(function, **settings).lower(*arguments).compile()


def test_compiled_one_large_branch_of_each_layer_is_kept(nothing_kept):
    # XLA would like to keep the other branch as well, and what GELU makes of it.
    arguments = random_arguments(batch=1, length=256, width=8, branch=1024)
    layers = 16

    def loss(x, *weights):
        for _ in range(layers):
            x = x + kernels.geglu(x, *weights)
        return x.sum()

    memory = compiled(jax.grad(loss, argnums=(0, 1, 2, 3)), *arguments).memory_analysis()
    assert memory.temp_size_in_bytes < (layers + 8) * 256 * 1024 * 4


def test_compiled_a_step_does_not_copy_the_weights():
    x, *weights = random_arguments()

    def step(weights, x):
        def loss(weights, x):
            for of_layer in weights:
                x = x + kernels.geglu(x, *of_layer)
            return x.sum()

        return jax.tree.map(lambda weight, gradient: weight - gradient, weights, jax.grad(loss)(weights, x))

    program = compiled(step, [tuple(weights) for _ in range(3)], x, donate_argnums=0).as_text()
    assert "%weights_" in program
    assert " copy(%weights_" not in program


@pytest.fixture
def block():
    block = GemmaDecoderBlock(16, 48, num_query_heads=2, num_key_value_heads=1, head_dim=8)
    block.build((None, None, 16))
    return block


def test_a_block_trains_through_it(block, monkeypatch):
    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype("float32")
    resting = block.feed_forward(x)
    calls = []
    monkeypatch.setattr(kernels, "geglu", lambda *arguments: calls.append(1) or plain(*arguments))
    np.testing.assert_allclose(block.feed_forward(x, training=True), resting, atol=1e-6)
    assert calls


@pytest.mark.parametrize("change", ["lora", "int8"])
def test_a_changed_block_trains_through_its_layers(block, monkeypatch, change):
    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype("float32")
    if change == "lora":
        block.gating_ffw.enable_lora(2)
        block.gating_ffw.lora_kernel_b.assign(np.ones(block.gating_ffw.lora_kernel_b.shape))
    else:
        block.gating_ffw.quantize("int8")
    monkeypatch.delattr(kernels, "geglu")
    np.testing.assert_allclose(block.feed_forward(x, training=True), block.feed_forward(x), atol=1e-6)


def test_bfloat16_trains_through_the_layers(monkeypatch):
    block = GemmaDecoderBlock(16, 48, 2, 1, 8, dtype="mixed_bfloat16")
    block.build((None, None, 16))
    monkeypatch.delattr(kernels, "geglu")
    assert str(block.feed_forward(np.ones((1, 3, 16), "float32"), training=True).dtype) == "bfloat16"
