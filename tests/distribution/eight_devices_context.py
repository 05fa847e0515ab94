"""Checks of rows whose columns are cut, on eight devices that XLA makes of one CPU. See `eight_devices.py`."""

import re
import sys
from functools import partial

from eight_devices import assert_equal_to_one_device
from eight_devices import build
from eight_devices import compiled_step
from eight_devices import pods
from eight_devices import trained

# isort: split
import jax
import keras
import numpy as np

from keras_gemma.kernels.attention import plain_attention
from keras_gemma.kernels.blockwise_attention import blockwise_attention
from keras_gemma.kernels.sharding import on_own_rows_and_heads
from keras_gemma.kernels.splash_attention import splash_attention
from keras_gemma.planning import plan

# Too long for scores in one tensor, and divided by twice the devices of every context below.
LENGTH = 144


def segments(rows, length, seed=3):
    """Packed rows with padding in front or behind."""
    random = np.random.default_rng(seed)
    ids = np.sort(random.integers(1, 4, (rows, length)), axis=1)
    columns, padding = np.arange(length), random.integers(1, length // 2, (rows, 1))
    behind = np.arange(rows)[:, None] % 2 == 0
    return np.where(np.where(behind, columns < length - padding, columns >= padding), ids, 0).astype("int32")


def long_examples(rows=5, length=LENGTH):
    random = np.random.default_rng(4)
    ids = random.integers(3, 64, (rows, length + 1)).astype("int32")
    segment_ids = segments(rows, length)
    mask = (segment_ids > 0).astype("int32")
    starts = np.argmax(segment_ids[:, None, :] == segment_ids[:, :, None], axis=-1)
    positions = ((np.arange(length) - starts) * mask).astype("int32")
    weights = random.uniform(0, 1, (rows, length)).astype("float32") * mask
    x = {"token_ids": ids[:, :-1] * mask, "padding_mask": mask, "segment_ids": segment_ids, "positions": positions}
    return x, ids[:, 1:], weights


def long_rows_train_and_generate_as_on_one_device():
    assert_equal_with_context("2b", (1, 2, 2, 2))


def long_rows_of_both_shapes_train_and_generate_as_on_one_device():
    assert_equal_with_context("2b", (1, 2, 4, 1), (1, 1, 8, 1), (2, 1, 2, 2), recompute="block")
    assert_equal_with_context("7b", (1, 2, 4, 1), (1, 2, 2, 2), (2, 1, 2, 2), recompute="block")


def long_rows_are_predicted_and_evaluated_as_on_one_device():
    x, y, weights = long_examples()

    def results():
        model = build("7b")
        model.compile()
        return model.predict(x, verbose=0), model.evaluate(x, y, 3, weights, verbose=0)

    logits, sums = results()
    with pods(1, 2, 4, 1).scope():
        received, received_sums = results()
    np.testing.assert_allclose(received, logits, atol=1e-5)
    np.testing.assert_allclose(received_sums, sums, rtol=1e-5)


def assert_equal_with_context(shape, *meshes, **settings):
    check = assert_tokens_stay_where_they_are
    assert_equal_to_one_device(shape, *meshes, check=check, batch=long_examples(), **settings)


def assert_tokens_stay_where_they_are(model):
    """No scores of all queries and keys, and no hidden states but on the devices that compute them."""
    text = compiled_step(model, long_examples(rows=8))
    made = {tuple(int(n) for n in sizes.split(",") if n) for sizes in re.findall(r"\bf32\[([\d,]*)\]", text)}
    assert not [shape for shape in made if shape[-2:] == (LENGTH, LENGTH)]
    gathered = re.findall(r"= \(?f32\[([\d,]+)\].*? all-gather(?:-start)?\(", text)
    # Keys and values of whole rows, and weights.
    axes = keras.distribution.distribution().device_mesh.backend_mesh.shape
    heads = max(1, model.backbone.num_key_value_heads // axes["model"])
    assert any(sizes.endswith(f"{LENGTH},{heads},8") for sizes in gathered), gathered
    assert not [sizes for sizes in gathered if sizes.endswith(f"{LENGTH},16")], gathered
    assert "collective-permute" in text


def kernels_attend_as_without_a_mesh():
    splash = partial(splash_attention, longest_block=128, interpret=True)
    # Parts of a row that fill no block.
    assert_attends_as_without_a_mesh((1, 2, 2, 2), (4, 4), 264, splash)
    assert_attends_as_without_a_mesh((1, 1, 4, 2), (4, 1), 264, splash)


def kernels_attend_to_long_rows_as_without_a_mesh():
    # Parts of a block and a bit.
    splash = partial(splash_attention, longest_block=128, interpret=True)
    for mesh, heads in (((1, 1, 4, 2), (4, 1)), ((1, 1, 8, 1), (4, 2)), ((2, 1, 2, 2), (2, 2))):
        assert_attends_as_without_a_mesh(mesh, heads, 16 * 129, blockwise_attention, splash)


def assert_attends_as_without_a_mesh(mesh, heads, length, *kernels):
    operands = attention_operands(length, *heads)
    expected = with_gradients(plain_attention)(*operands)
    for attend in kernels:
        with pods(*mesh).scope():
            received = with_gradients(partial(on_own_rows_and_heads, attend))(*operands)
        for x, y in zip(received, expected):
            np.testing.assert_allclose(x, y, rtol=0, atol=5e-5, err_msg=f"{attend} on {mesh}")


def attention_operands(length, heads, kv_heads):
    random = np.random.default_rng(0)
    shapes = [(2, length, count, 8) for count in (heads, kv_heads, kv_heads, heads)]
    return [random.normal(size=shape).astype("float32") for shape in shapes] + [segments(2, length)]


def with_gradients(attend):
    def gradients(query, key, value, upstream, segment_ids):
        attended, pull = jax.vjp(lambda *x: attend(*x, segment_ids), query, key, value)
        return attended, *pull(upstream)

    return jax.jit(gradients)


def a_plan_cuts_the_tokens_of_a_row():
    settings = {"devices": jax.devices(), "sequence_length": 256, "batch_size": 8, "dtype": "float32"}
    whole, cut = (plan("gemma_tiny_en", "local_data", context=context, **settings) for context in (1, 4))
    assert cut.mesh == {"replica": 1, "data": 2, "context": 4, "model": 1}
    assert cut.memory["weights"] == whole.memory["weights"] and cut.memory["optimizer"] == whole.memory["optimizer"]
    # Each device has as many tokens as before, the loss even in equal chunks.
    np.testing.assert_allclose(cut.executed_flops, whole.executed_flops, rtol=0.1)
    assert cut.within_pods["collective-permute"] > 0


def rows_that_a_context_does_not_divide():
    """They are predicted whole, and not trained on."""
    x, y, weights = long_examples(3, 7)
    logits = build().predict(x, verbose=0)
    with pods(1, 2, 2, 2).scope():
        model = build()
        np.testing.assert_allclose(model.predict(x, verbose=0), logits, atol=1e-5)
        try:
            trained(model, batch=(x, y, weights))
        except ValueError as error:
            assert "2 devices" in str(error) and "a sequence length of 7" in str(error), error
        else:
            raise AssertionError("Seven columns were cut in four.")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
