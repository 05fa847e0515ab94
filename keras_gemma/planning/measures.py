"""What the compiled programs of a phase do on each chip, summed over their runs."""

import math
from collections import defaultdict

import numpy as np

from keras_gemma.planning.program import Program

# Products of two matrices in each pass of JAX's Splash kernels, forward and backward.
PRODUCTS_OF_KERNELS = {"splash_mqa_fwd": 2, "splash_mqa_dkv": 4, "splash_mqa_dq": 3}
PROJECTIONS = ("ffw_", "query", "key", "value", "attention_output")
# The products of the loss are called after the axes of their operands.
OF_VOCABULARY = ("token_embedding", ",vd->", "->vd")
LARGEST = 8


class Measures:
    """Sums over programs.

    Args:
        mesh_shape: tuple of ints, pods first.

    Attributes:
        flops: float.
        moved: float. Bytes that go to and from a chip's memory.
        kernels: dict, how often each kernel runs.
        within_pods, across_pods: dicts of bytes that a chip sends, by kind of collective.
        unknown_loops: int, loops that are counted once since the program does not say how often they turn.
    """

    def __init__(self, mesh_shape):
        self._pods = mesh_shape[0]
        self._pod_of = np.repeat(np.arange(mesh_shape[0]), np.prod(mesh_shape[1:]))
        self._parts = defaultdict(lambda: {"operations": 0.0, "sent": 0.0})
        self.flops = 0.0
        self.moved = 0.0
        self.kernels = defaultdict(int)
        self.within_pods = defaultdict(float)
        self.across_pods = defaultdict(float)
        self.unknown_loops = 0

    def add(self, compiled, runs=1, turn_of_loop=False):
        """Adds a `jax.stages.Compiled` that runs so often, or a single turn of its loop."""
        program = Program(compiled.as_text(), _flops_of_kernel, turn_of_loop)
        self.moved += runs * program.moved
        self.unknown_loops += len(program.unknown_loops)
        for name, count in program.kernels.items():
            self.kernels[name] += runs * count
        for op_name, flops in program.flops.items():
            self.flops += runs * flops
            self._parts[part_of_model(op_name)]["operations"] += runs * flops
        for one in program.collectives:
            sent = runs * one.sent * one.turns * self._rounds(one)
            by_kind = self.across_pods if one.crosses(self._pod_of) else self.within_pods
            by_kind[one.kind] += sent
            self._parts[part_of_model(one.op_name)]["sent"] += sent

    def _rounds(self, collective):
        # Of a sum over pods each sends, and passes on, all parts but its own.
        return 2 * (1 - 1 / self._pods) if collective.groups is None and collective.kind == "all-reduce" else 1

    def largest(self):
        """Dicts of `part`, its share of the `operations` and the bytes `sent` for it: those with most of either."""
        total, sent = self.flops or 1.0, sum(part["sent"] for part in self._parts.values()) or 1.0
        shares = [
            {"part": name, "operations": part["operations"] / total, "sent": part["sent"]}
            for name, part in self._parts.items()
        ]
        return sorted(shares, key=lambda one: -max(one["operations"], one["sent"] / sent))[:LARGEST]

    def seconds(self, chip):
        """How long each kind of work takes at full speed."""
        return {
            "compute": self.flops / chip.flops,
            "memory": self.moved / chip.memory_bandwidth,
            "within_pods": sum(self.within_pods.values()) / chip.link_bandwidth,
            "across_pods": sum(self.across_pods.values()) / chip.pod_bandwidth,
        }


def _flops_of_kernel(instruction, operands):
    """Of Splash: its blocks below the diagonal and on it, of the causal mask."""
    products = [count for name, count in PRODUCTS_OF_KERNELS.items() if instruction.name.startswith(name)]
    if not products:
        return 0.0
    mask = next(operand.sizes for operand in operands if operand.dtype == "s8")
    tensors = [operand.sizes for operand in operands if operand.dtype in ("bf16", "f32") and len(operand.sizes) > 1]
    # A device that has a share of the queries has fewer of them than keys.
    query, blocks, length = max(tensors, key=len), mask[-1], max(sizes[-2] for sizes in tensors)
    return products[0] * 2.0 * math.prod(query) * length * (blocks + 1) / (2 * blocks)


def part_of_model(op_name):
    """The part of the model that an instruction comes from, by the path that XLA keeps of it."""
    found = next((name for name in op_name.split("/") if name.startswith(PROJECTIONS)), None)
    if found:
        return f"decoder blocks, {found}"
    if any(name in op_name for name in OF_VOCABULARY):
        return "vocabulary"
    of_attention = any(name in op_name for name in ("decoder_block", "splash", "dot_general"))
    return "decoder blocks, attention" if of_attention else "optimizer and others"
