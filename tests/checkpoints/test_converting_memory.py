"""Conversions hold the largest tensor about twice, whatever the size of the model: seen in a process of their own."""

import json
import math
import struct
import subprocess
import sys

import pytest

from keras_gemma.checkpoints import canonical
from keras_gemma.checkpoints import hugging_face

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

def memory(entry):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))

convert("gemma_tiny_en", sys.argv[2] + "-first", format=sys.argv[3], progress=False)  # imports all that is needed
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of the imports
convert(sys.argv[1], sys.argv[2], format=sys.argv[3], progress=False)
print(memory("VmHWM") - before)
"""


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


@pytest.mark.parametrize("sizes", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "2 GB"])
@pytest.mark.parametrize(
    "format", ["keras", "gguf", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hugging_face", "flax"))]
)
def test_memory(tmp_path, sizes, format):
    total = zeros(tmp_path / "source", sizes)
    command = [sys.executable, "-c", MEASURE, tmp_path / "source", tmp_path / "target", format]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    largest = 2 * max(math.prod(shape) for shape in canonical.shapes(sizes).values())
    limit = 2 * largest + CONSTANT
    print(f"{format}: {int(done.stdout) / 2**20:.0f} MiB of {total / 2**20:.0f}, at most {limit / 2**20:.0f}")
    assert limit < total
    assert int(done.stdout) < limit
