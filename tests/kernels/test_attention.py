"""Every path of `causal_attention` beside the plain one, values and gradients."""

import os
import re
import subprocess
import sys
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.kernels import attention
from tests.numerics.precision import rounding

# Of the largest number.
ROUNDING = rounding(1, units=128)
ROOT = Path(__file__).parents[2]
BACKEND = keras.backend.backend()
on_jax_only = pytest.mark.skipif(BACKEND != "jax", reason="a path of JAX")

# Query heads, key-value heads, head dim: in proportion to 2B, to 7B, and between them.
HEADS = {"2b": (4, 1, 8), "7b": (4, 4, 6), "grouped": (4, 2, 8)}


def operands(length, heads, kv_heads, head_dim, seed=0, rows=2):
    """Query, key, value, and a gradient of the result."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def segments(length):
    """Packed rows of two tokens and more, with padding in front, behind, and behind a single segment."""
    packed = np.sort(np.random.default_rng(1).integers(1, 5, size=length))
    packed[: length // 8] = 0
    padded = np.ones(length)
    padded[length - length // 3 :] = 0
    return np.stack([packed, padded]).astype("int32")


def results(attend, arrays, segment_ids, dtype="float32"):
    """What was attended and the gradients of query, key and value, all as float32."""
    *inputs, upstream = [ops.cast(ops.convert_to_tensor(x), dtype) for x in arrays]
    segment_ids = ops.convert_to_tensor(segment_ids)
    outputs = _differentiate(lambda *x: attend(*x, segment_ids), inputs, upstream)
    return [np.asarray(ops.convert_to_numpy(ops.cast(x, "float32"))) for x in outputs]


def _differentiate(function, inputs, upstream):
    if BACKEND == "jax":
        import jax

        def value_and_gradients(inputs, upstream):
            value, pull = jax.vjp(function, *inputs)
            return value, *pull(upstream)

        return jax.jit(value_and_gradients)(inputs, upstream)
    if BACKEND == "torch":
        import torch

        inputs = [x.detach().requires_grad_() for x in inputs]
        value = function(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs, upstream)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = function(*inputs)
    return value, *tape.gradient(value, inputs, upstream)


def assert_close(received, expected, tolerance=ROUNDING):
    """The tolerance is a share of the largest number."""
    for name, x, y in zip(("attended", "query", "key", "value"), received, expected):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=name)


def assert_as_plain(attend, arrays, segment_ids, dtype="float32", tolerance=ROUNDING):
    expected = results(attention.plain_attention, arrays, segment_ids, dtype)
    assert min(np.abs(x).max() for x in expected) > 0.1
    assert_close(results(attend, arrays, segment_ids, dtype), expected, tolerance)


# === All backends ===


def test_plain_attention_equals_its_definition():
    query, key, value, _ = arrays = operands(7, 4, 2, 5)
    segment_ids = np.array([[0, 0, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0]], "int32")
    received, *_ = results(attention.plain_attention, arrays, segment_ids)
    for b, t, n in np.ndindex(2, 7, 4):
        seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
        weights = np.exp([query[b, t, n].astype("float64") @ key[b, s, n // 2] for s in seen])
        np.testing.assert_allclose(received[b, t, n], weights / weights.sum() @ value[b, seen, n // 2], atol=1e-5)


@pytest.mark.multi_backend
@pytest.mark.parametrize("heads", ["2b", "7b"])
def test_recomputed_attention(heads):
    attend = partial(attention.recomputed_attention, block=8)
    assert_as_plain(attend, operands(21, *HEADS[heads]), segments(21))


@pytest.mark.multi_backend
@pytest.mark.skipif(BACKEND != "torch", reason="only torch shows what it keeps")
def test_recomputed_attention_keeps_no_weights():
    import torch

    inputs = [torch.tensor(x, requires_grad=True) for x in operands(64, 2, 1, 4)[:3]]
    kept = []

    def largest_kept(attend):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            attend(*inputs, torch.ones((2, 64), dtype=torch.int32))
        return max(kept)

    assert largest_kept(attention.plain_attention) >= 64**2
    assert largest_kept(partial(attention.recomputed_attention, block=8)) <= inputs[0].numel()


@pytest.mark.multi_backend
@pytest.mark.parametrize("length", [1, attention.WHOLE_SCORES + 1])
def test_causal_attention(length):
    from keras_gemma.kernels import causal_attention

    arrays, segment_ids = operands(length, *HEADS["2b"]), segments(length)
    expected = results(attention.plain_attention, arrays, segment_ids)
    # Of a single token the gradients of query and key are zero.
    for x, y in zip(results(causal_attention, arrays, segment_ids), expected):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-5)


@pytest.mark.multi_backend
def test_dropout_reaches_the_weights_of_long_rows():
    from keras_gemma.kernels import causal_attention

    query, key, value, _ = map(ops.convert_to_tensor, operands(attention.WHOLE_SCORES + 1, *HEADS["2b"]))
    segment_ids = ops.ones(query.shape[:2], "int32")
    dropped = causal_attention(query, key, value, segment_ids, dropout=ops.zeros_like)
    assert np.abs(ops.convert_to_numpy(dropped)).max() == 0


# === In blocks ===


def in_blocks(*args, **kwargs):
    from keras_gemma.kernels.blockwise_attention import Blocks
    from keras_gemma.kernels.blockwise_attention import blockwise_attention

    return partial(blockwise_attention, blocks=Blocks(*args, **kwargs))


@on_jax_only
@pytest.mark.parametrize("heads, blocks, length", [("2b", (16, 8), 50), ("7b", (8, 16), 48), ("grouped", (16, 16), 33)])
def test_blockwise_attention(heads, blocks, length):
    assert_as_plain(in_blocks(*blocks), operands(length, *HEADS[heads]), segments(length))


@on_jax_only
def test_blockwise_attention_of_all_heads_at_once():
    attend = in_blocks(16, 8, heads_at_once=True)
    assert_as_plain(attend, operands(50, *HEADS["grouped"]), segments(50))


@on_jax_only
def test_blocks_are_no_longer_than_rows(monkeypatch):
    from keras_gemma.kernels import blockwise_attention

    monkeypatch.setattr(blockwise_attention, "on_jax_cpu", lambda: False)
    assert blockwise_attention.default_blocks(200, group=8) == (256, 256, True)
    assert blockwise_attention.default_blocks(5000, group=8) == (256, 512, True)


@on_jax_only
def test_blockwise_attention_skips_tiles_of_other_segments():
    from keras_gemma.kernels.blockwise_attention import Blocks
    from keras_gemma.kernels.blockwise_attention import _first_tiles

    ids = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    # The last block of the first row holds segment 3 and padding, and so may meet anything between.
    assert _first_tiles(Blocks(4, 2), ids, ids).tolist() == [[0, 2, 2, 0], [0, 1, 1, 0]]


@on_jax_only
def test_blockwise_attention_in_bfloat16():
    # Within two roundings of the largest number, as the plain one.
    arrays, segment_ids = operands(50, *HEADS["2b"]), segments(50)
    arrays = [np.asarray(ops.cast(ops.cast(x, "bfloat16"), "float32")) for x in arrays]
    expected = results(attention.plain_attention, arrays, segment_ids)
    assert_close(results(in_blocks(16, 8), arrays, segment_ids, "bfloat16"), expected, tolerance=2**-7)


@on_jax_only
def test_blockwise_attention_scores_in_float32():
    # The scores 256 and 257 are one number in bfloat16.
    query, key = np.array([[[0, 0]], [[16, 1]]]), np.array([[[16, 0]], [[16, 1]]])
    value = np.array([[[0, 0]], [[1, 1]]])
    tensors = [ops.cast(x[None], "bfloat16") for x in (query, key, value)]
    attended = in_blocks(2, 1)(*tensors, ops.ones((1, 2), "int32"))
    assert float(attended[0, 1, 0, 0]) == pytest.approx(1 / (1 + np.exp(-1)), rel=4e-3)


@on_jax_only
def test_blockwise_attention_in_a_scan_over_recomputed_layers():
    import jax

    arrays, segment_ids = operands(50, *HEADS["2b"]), segments(50)

    def layers(attend, query, key, value, segment_ids):
        layer = jax.checkpoint(lambda x, scale: (attend(x, key * scale, value, segment_ids), None))
        return jax.lax.scan(layer, query, np.array([1.0, 0.5], "float32"))[0]

    expected = results(partial(layers, attention.plain_attention), arrays, segment_ids)
    assert_close(results(partial(layers, in_blocks(16, 8)), arrays, segment_ids), expected)


def largest_tensor(attend, length):
    """Elements of the largest tensor in the compiled program of value and gradients."""
    import jax

    def program(query, key, value, upstream, segment_ids):
        value, pull = jax.vjp(lambda *x: attend(*x, segment_ids), query, key, value)
        return value, pull(upstream)

    compiled = jax.jit(program).lower(*operands(length, 2, 1, 8, rows=1), np.ones((1, length), "int32")).compile()
    shapes = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", compiled.as_text())
    assert shapes
    return max(prod(map(int, shape.split(","))) for shape in shapes)


@on_jax_only
def test_long_rows_have_no_tensor_of_length_by_length():
    from keras_gemma.kernels import causal_attention

    assert largest_tensor(attention.plain_attention, 1024) >= 1024**2
    assert largest_tensor(causal_attention, 1024) < 1024**2 / 8


# === On a mesh ===

SHARDED = """
import jax, keras, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from kernels.test_attention import HEADS, operands, segments
from keras_gemma.kernels import causal_attention
from keras_gemma.kernels.attention import plain_attention

def program(attend):
    def gradients(query, key, value, upstream, segment_ids):
        attended, pull = jax.vjp(lambda *x: attend(*x, segment_ids), query, key, value)
        return attended, *pull(upstream)
    return jax.jit(gradients)

mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"])
rows = NamedSharding(mesh.backend_mesh, PartitionSpec("batch"))
distribution = keras.distribution.ModelParallel(
    layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name="batch"
)
for name, count in (("2b", 2), ("7b", 1)):
    inputs = [x[:count] for x in (*operands(140, *HEADS[name]), segments(140))]
    expected = program(plain_attention)(*inputs)
    if count == 2:
        inputs = [jax.device_put(x, rows) for x in inputs]
    with distribution.scope():
        compiled = program(causal_attention).lower(*inputs).compile()
    assert "all-gather(" not in compiled.as_text() or count == 1
    for x, y in zip(compiled(*inputs), expected):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
"""


@on_jax_only
def test_every_device_computes_its_own_rows_and_heads():
    # Rows that the mesh divides and rows that it does not.
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# === The kernels of TPU and GPU ===


@on_jax_only
@pytest.mark.parametrize("heads, length", [("2b", 150), ("7b", 130)])
def test_splash_attention_interpreted(heads, length):
    from keras_gemma.kernels.splash_attention import splash_attention

    attend = partial(splash_attention, longest_block=128, interpret=True)
    arrays, segment_ids = [x[:1] for x in operands(length, *HEADS[heads])], segments(length)[:1]
    assert_as_plain(attend, arrays, segment_ids)


@on_jax_only
@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 5e-6), ("bfloat16", 2**-6)])
def test_splash_attention_interpreted_with_many_rows_and_heads(dtype, tolerance):
    from keras_gemma.kernels.splash_attention import splash_attention

    attend = partial(splash_attention, longest_block=128, interpret=True)
    assert_as_plain(attend, operands(300, *HEADS["grouped"]), segments(300), dtype, tolerance)


@on_jax_only
@pytest.mark.parametrize(
    "length, block, padded", [(129, 256, 256), (512, 512, 512), (513, 384, 768), (2049, 512, 2560), (8192, 512, 8192)]
)
def test_splash_blocks_pad_little(length, block, padded):
    from keras_gemma.kernels.splash_attention import block_and_padded_length

    assert block_and_padded_length(length, 512) == (block, padded)


@on_jax_only
@pytest.mark.parametrize(
    "dtype, head_dim, capability, platform, serves",
    [
        ("bfloat16", 256, "9.0", "cuda 13000", True),
        ("float16", 128, "8.0", "cuda 12080", True),
        ("bfloat16", 256, "8.0", "cuda 12080", False),
        ("float32", 128, "9.0", "cuda 13000", False),
        ("bfloat16", 128, "7.5", "cuda 12080", False),
        ("bfloat16", 100, "9.0", "cuda 13000", False),
        ("bfloat16", 128, "gfx942", "rocm 70000", False),
    ],
)
def test_what_cudnn_serves(dtype, head_dim, capability, platform, serves):
    from keras_gemma.kernels.cudnn_attention import cudnn_serves

    device = SimpleNamespace(compute_capability=capability, client=SimpleNamespace(platform_version=platform))
    assert cudnn_serves(ops.zeros((1, 2, 1, head_dim), dtype), device) is serves


@on_jax_only
def test_rows_that_need_a_causal_mask_only():
    from keras_gemma.kernels.cudnn_attention import only_causal

    assert only_causal(np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert not only_causal(np.array([[1, 1, 1, 0], [1, 1, 2, 2]]))
    assert not only_causal(np.array([[0, 1, 1, 1]]))


@on_jax_only
def test_the_kernel_of_each_platform(monkeypatch):
    from keras_gemma.kernels import cudnn_attention
    from keras_gemma.kernels import jax_attention

    def names(*dtypes):
        return [jax_attention.kernel_for(ops.zeros((1, 2, 1, 8), dtype)).__name__ for dtype in dtypes]

    assert names("float32", "bfloat16") == ["blockwise_attention"] * 2
    monkeypatch.setattr(jax_attention, "jax_platform", lambda: "tpu")
    assert names("float32", "bfloat16", "float16") == ["splash_attention"] * 2 + ["blockwise_attention"]
    monkeypatch.setattr(jax_attention, "jax_platform", lambda: "gpu")
    monkeypatch.setattr(cudnn_attention, "cudnn_serves", lambda query: query.dtype == "bfloat16")
    assert names("float32", "bfloat16") == ["blockwise_attention", "cudnn_attention"]


COMPILED_FOR_TPU = """
import jax, keras, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from keras_gemma.kernels import causal_attention

devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"], devices=devices)
distribution = keras.distribution.ModelParallel(
    layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name="batch", auto_shard_dataset=False
)

def shape(dtype, dims, *axes):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh.backend_mesh, PartitionSpec(*axes)))

def gradients(query, key, value, upstream, segment_ids):
    attended, pull = jax.vjp(lambda *x: causal_attention(*x, segment_ids), query, key, value)
    return pull(upstream)

length = 4096
query = shape("bfloat16", (2, length, 8, 256), "batch", None, "model")
key = shape("bfloat16", (2, length, 1, 256), "batch")
with distribution.scope():
    traced = jax.jit(gradients).trace(query, key, key, query, shape("int32", (2, length), "batch"))
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
text = compiled.as_text()
assert "splash_mqa_dkv_segmented" in text and "all-gather(" not in text
# Four query heads and one row a chip.
assert compiled.memory_analysis().temp_size_in_bytes < 4 * length**2
"""


@on_jax_only
@pytest.mark.slow
def test_splash_attention_compiles_for_a_tpu_mesh():
    pytest.importorskip("libtpu", reason="pip install libtpu")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    done = subprocess.run([sys.executable, "-c", COMPILED_FOR_TPU], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@on_jax_only
@pytest.mark.tpu
@pytest.mark.parametrize("heads", [(8, 1, 256), (16, 16, 256)])
def test_splash_attention_on_a_tpu(heads):
    from keras_gemma.kernels import causal_attention

    assert_as_plain(causal_attention, operands(1100, *heads), segments(1100), "bfloat16", tolerance=2**-6)


@on_jax_only
@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [(8, 1, 128), (16, 16, 128)])
def test_cudnn_attention_on_a_gpu(heads, packed):
    from keras_gemma.kernels import causal_attention

    segment_ids = segments(1100) if packed else np.tile(segments(1100)[1], (2, 1))
    *inputs, upstream = operands(1100, *heads)
    # A padded position counts in no loss.
    arrays = [*inputs, upstream * (segment_ids > 0)[:, :, None, None]]
    expected = results(attention.plain_attention, arrays, segment_ids, "bfloat16")
    received = results(causal_attention, arrays, segment_ids, "bfloat16")
    real = segment_ids > 0
    assert_close([x[real] for x in received], [x[real] for x in expected], tolerance=2**-6)
