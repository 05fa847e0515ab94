"""Conversions hold the largest tensor about twice, whatever the size of the model: seen in a process of their own."""

import math

import pytest
from canonical_tensors import zeros
from peak_memory import measured

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import convert

SMALL = canonical.Sizes(64000, 12, 8, 1, 256, 2 * 16384, 64)
# 2 GB in bfloat16.
LARGE = canonical.Sizes(64000, 8, 8, 1, 2048, 2 * 16384, 256)
# What a conversion needs besides, whatever its model: buffers of the libraries that write.
CONSTANT = 96 * 2**20

MEASURE = """
import sys
from keras_gemma import startup
startup.leave_out_tensorflow()
from keras_gemma.checkpoints import convert

options = {"dtype": None if sys.argv[4] == "None" else sys.argv[4], "progress": False}
convert("gemma_tiny_en", sys.argv[2] + "-first", format=sys.argv[3], **options)  # imports all that is needed
begin()
convert(sys.argv[1], sys.argv[2], format=sys.argv[3], **options)
print(peak())
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize("sizes", [SMALL, pytest.param(LARGE, marks=SLOW)], ids=["small", "2 GB"])
@pytest.mark.parametrize(
    "source, format, dtype",
    [
        ("hugging_face", "keras", None),
        ("hugging_face", "gguf", None),
        ("gguf", "hugging_face", "float32"),
        pytest.param("flax", "keras", None, marks=SLOW),
        pytest.param("hugging_face", "hugging_face", None, marks=SLOW),
        pytest.param("hugging_face", "flax", None, marks=SLOW),
        pytest.param("hugging_face", "keras", "float32", marks=SLOW),
    ],
)
def test_memory(tmp_path, sizes, source, format, dtype):
    total = zeros(tmp_path / "zeros", sizes)
    path = tmp_path / "zeros"
    if source != "hugging_face":
        convert(path, path := tmp_path / "source", format=source, progress=False)
    peak = measured(MEASURE, path, tmp_path / "target", format, dtype)
    # In the dtype written, if that is the larger one.
    grown = 2 if dtype == "float32" else 1
    largest = grown * 2 * max(math.prod(shape) for shape in canonical.shapes(sizes).values())
    limit = 2 * largest + CONSTANT
    print(f"{source} to {format}: {peak / 2**20:.0f} MiB of {total / 2**20:.0f}, at most {limit / 2**20:.0f}")
    assert limit < grown * total
    assert peak < limit
