"""What tests of foreign formats share: known tensors, and Gemma in plain NumPy on the tensors of a file as they are.

B batch, T length, D width, N query heads, K key-value heads, H head dim, F feed-forward, V vocabulary.
"""

import functools
import json
import math
import struct

import keras
import ml_dtypes
import numpy as np
import pytest

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import hugging_face
from keras_gemma.checkpoints.filling import without_values
from keras_gemma.checkpoints.keras_preset import fill_from
from keras_gemma.checkpoints.tensor_files import StoredTensor
from keras_gemma.models import GemmaBackbone

# As Gemma 2B: one key-value head. As Gemma 7B: as many as query heads, and heads × head_dim ≠ width.
SIZES = {
    "2b": canonical.Sizes(50, 2, 4, 1, 16, 48, 4),
    "7b": canonical.Sizes(50, 2, 4, 4, 12, 40, 4),
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def canonical_arrays(sizes, dtype=np.float32):
    """Gemma's tensors under the names of `canonical`."""
    random = np.random.default_rng(7)
    shapes = canonical.shapes(sizes)
    return {name: (0.3 * random.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def zeros(folder, sizes):
    """A Hugging Face folder of zeros, which take no room on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hugging_face.config_of(sizes, "bfloat16")))
    header, end = {}, 0
    for entry in hugging_face.table_of(sizes):
        begin, end = end, end + 2 * math.prod(entry.shape)
        header[entry.name] = {"dtype": "BF16", "shape": entry.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return end


def refuses(call, *parts, error=ValueError):
    """That a call raises an error with all of these in its message."""
    with pytest.raises(error) as raised:
        call()
    for part in parts:
        assert str(part) in str(raised.value)


def stored_in_memory(arrays):
    """`StoredTensor`s, each read of which is a new array."""
    return {
        name: StoredTensor("memory", name, array.shape, array.dtype, functools.partial(np.copy, array))
        for name, array in arrays.items()
    }


def assert_same(tensors, arrays):
    """That `StoredTensor`s say and hold these arrays, to the bit."""
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        read = tensors[name].read()
        assert tensors[name].shape == read.shape == array.shape
        assert tensors[name].dtype == read.dtype == array.dtype
        assert read.tobytes() == array.tobytes(), name


# === Gemma in plain NumPy ===


def assert_logits(checkpoint, embedding, blocks, final_norm):
    """That our backbone, with the values of a `Checkpoint`, has the logits of `plain_logits` of the file's tensors."""
    with without_values():
        backbone = GemmaBackbone(**checkpoint.sizes._asdict(), dtype="float32")
    fill_from(checkpoint, backbone)
    token_ids = np.arange(1, 13).reshape(2, 6)
    hidden = backbone({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)})
    received = keras.ops.convert_to_numpy(backbone.token_embedding(hidden, reverse=True))
    np.testing.assert_allclose(received, plain_logits(token_ids, embedding, blocks, final_norm), atol=1e-4)


def plain_logits(token_ids, embedding, blocks, final_norm):
    """Logits (B, T, V) of token ids (B, T).

    Args:
        token_ids: int array (B, T).
        embedding: array (V, D).
        blocks: list of dicts: `attention_norm` and `ffw_norm`, arrays (D); `project` from (B, T, D) to q (B, T, N, H),
            k and v (B, T, K, H); `output` from (B, T, N, H) to (B, T, D); `gate`, `up` and `down`, of the last axis.
        final_norm: array (D).
    """
    x = embedding[token_ids] * embedding.shape[1] ** 0.5
    for block in blocks:
        x = x + block["output"](_attended(*block["project"](_normed(x, block["attention_norm"]))))
        normed = _normed(x, block["ffw_norm"])
        x = x + block["down"](_gelu(block["gate"](normed)) * block["up"](normed))
    return _normed(x, final_norm) @ embedding.T


def _normed(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * (1 + scale)


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _rotated(x):
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / 10_000 ** (np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attended(q, k, v):
    k, v = (np.repeat(heads, q.shape[2] // k.shape[2], axis=2) for heads in (k, v))
    scores = np.einsum("BTNH,BSNH->BNTS", _rotated(q) * q.shape[-1] ** -0.5, _rotated(k))
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("BNTS,BSNH->BTNH", weights / weights.sum(axis=-1, keepdims=True), v)
