"""What a compiled program does, counted in its text: products, kernels and collectives, loops as often as they turn.

XLA's own cost analysis counts the body of a loop once, and nothing of a Pallas kernel.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])(?P<opcode>[a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b(?P<dtype>[a-z]+\d*)\[(?P<sizes>[\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
        name: string.
        opcode: string.
        shapes: list of pairs, dtype and tuple of sizes, of what it makes.
        operands: list of names.
        text: string, all that stands behind the name.
    """

    name: str
    opcode: str
    shapes: list
    operands: list
    text: str

    @property
    def op_name(self):
        found = _OP_NAME.search(self.text)
        return found.group(1) if found else ""


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
        kind: string, of `COLLECTIVES`.
        groups: int array `[groups, devices]`, or `[pairs, 2]` of a permutation: places in the mesh, flattened. `None`
            for what the compiler has turned into transfers between pods.
        sent: float. Bytes that each device sends for it, in the rings or trees in which it is known to need fewest;
            of a transfer, those that it hands over.
        turns: int. How often a step runs it.
        op_name: string, where in the model it comes from.
    """

    kind: str
    groups: np.ndarray
    sent: float
    turns: int
    op_name: str

    def crosses(self, pod_of):
        """Whether devices of several pods take part.

        Args:
            pod_of: int array, the pod of each place in the mesh.
        """
        if self.groups is None:
            return True
        pods = np.asarray(pod_of)[self.groups]
        return bool((pods != pods[:, :1]).any())


class Program:
    """The optimised program of one device.

    Args:
        text: string, as of `jax.stages.Compiled.as_text`.
        kernel_flops: callable `(Instruction, shapes of its operands) → float` for kernels that are no HLO.
    """

    def __init__(self, text, kernel_flops=lambda instruction, operands: 0.0):
        self._computations, entry = _parsed(text)
        self._kernel_flops = kernel_flops
        self.flops = defaultdict(float)
        self.kernels = defaultdict(int)
        self.collectives = []
        self._walk(entry, turns=1)

    def _walk(self, computation, turns):
        instructions = self._computations[computation]
        for instruction in instructions.values():
            self._count(instruction, instructions, turns)
            inner = turns * _trips(instruction, self._computations) if instruction.opcode == "while" else turns
            if instruction.opcode in ("while", "fusion", "call", "conditional", "async-start"):
                for called in _CALLED.findall(instruction.text):
                    self._walk(called, inner)

    def _count(self, instruction, around, turns):
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode in ("dot", "convolution"):
            operands = [around[name].shapes[0][1] for name in instruction.operands]
            flops = (_dot_flops if instruction.opcode == "dot" else _convolution_flops)(instruction, *operands)
            self.flops[instruction.op_name] += turns * flops
        elif instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.text:
            operands = [around[name].shapes[0] for name in instruction.operands if around[name].shapes]
            self.kernels[instruction.name.split(".")[0]] += turns
            self.flops[instruction.op_name] += turns * self._kernel_flops(instruction, operands)
        elif kind in COLLECTIVES or kind == "send":
            collective = (_transfer if kind == "send" else _collective)(kind, instruction, around, turns)
            if collective.groups is None or collective.groups.shape[-1] > 1:
                self.collectives.append(collective)


# === Reading ===


def _parsed(text):
    computations, entry, current, last = {}, None, None, None
    for line in text.splitlines():
        if line == "}":
            current = None
        elif current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = computations[header["name"]] = {}
                entry = header["name"] if line.startswith("ENTRY") else entry
        else:
            found = _INSTRUCTION.match(line)
            if found:
                last = found["name"]
                current[last] = _instruction(last, found["rest"])
            else:
                # What is said of a kernel is written over several lines.
                current[last] = current[last]._replace(text=current[last].text + line)
    return computations, entry


def _instruction(name, rest):
    # The dimensions of a layout, `{1,0:T(8,128)}`, would read as calls.
    opcode = _OPCODE.search(re.sub(r"\{[^{}]*\}", lambda layout: " " * len(layout.group()), rest))
    if not opcode:
        return Instruction(name, "", [], [], rest)
    made = [_shape(found) for found in _SHAPE.finditer(rest[: opcode.start("opcode")])]
    arguments = rest[opcode.end() : _closing(rest, opcode.end())]
    return Instruction(name, opcode["opcode"], made, re.findall(r"%([\w.\-]+)", arguments), rest)


def _shape(found):
    return found["dtype"], tuple(int(size) for size in found["sizes"].split(",") if size)


def _closing(text, start):
    depth = 1
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    return len(text)


def _trips(loop, computations):
    """How often a loop turns: said by XLA, or from the limit and the step of its counter, which begins at 0."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known.group(1))
    condition, body = (
        computations[re.search(rf"{part}=%?([\w.\-]+)", loop.text).group(1)] for part in ("condition", "body")
    )
    limits = [_constant(one) for one in condition.values() if _constant(one) is not None]
    counters = [re.search(r"index=(\d+)", one.text) for one in condition.values() if one.opcode == "get-tuple-element"]
    if len(limits) != 1 or len(counters) != 1:
        # Bounds that are not in the program, as of the tokens of a generation: counted once.
        return 1
    return -(-limits[0] // _step(body, int(counters[0].group(1))))


def _constant(instruction):
    found = re.match(r"[su]32\[\][^ ]* constant\((-?\d+)\)", instruction.text)
    return int(found.group(1)) if found else None


def _step(body, index):
    """By how much the counter in place `index` of a loop's state grows each turn."""
    new_state = list(body.values())[-1]
    instruction, step = body[new_state.operands[index]], 0
    while instruction.opcode == "add":
        left, right = (body[name] for name in instruction.operands)
        instruction, constant = (left, right) if _constant(left) is None else (right, left)
        step += _constant(constant) or 0
    return step or 1


# === Products ===


def _dot_flops(instruction, left, right):
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
    axes = [int(axis) for axis in contracted.group(1).split(",") if axis] if contracted else []
    return 2.0 * math.prod(instruction.shapes[0][1]) * math.prod(left[axis] for axis in axes)


def _convolution_flops(instruction, left, right):
    """The TPU's compiler writes products as convolutions, those of batches with windows that reach over the edge."""
    of_left, of_right, of_result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text).groups()
    made = instruction.shapes[0][1]
    window = _window(instruction.text, sum(label.isdigit() for label in of_left))
    flops = 2.0 * made[of_result.index("b")] * made[of_result.index("f")] * right[of_right.index("i")]
    for axis, (stride, low, dilation, kernel_dilation) in enumerate(window):
        label = str(axis)
        sizes = left[of_left.index(label)], right[of_right.index(label)], made[of_result.index(label)]
        flops *= _pairs(*sizes, stride, low, dilation, kernel_dilation)
    return flops


def _window(text, rank):
    inside = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(field.split("=") for field in inside.group(1).split()) if inside else {}

    def numbers(name, default):
        return [int(number) for number in fields[name].split("x")] if name in fields else [default] * rank

    lows = [int(pad.split("_")[0]) for pad in fields["pad"].split("x")] if "pad" in fields else [0] * rank
    return list(zip(numbers("stride", 1), lows, numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)))


def _pairs(size, kernel, made, stride, low, dilation, kernel_dilation):
    """How many pairs of a place in the result and one in the kernel meet an entry, not padding."""
    place = np.arange(made)[:, None] * stride + np.arange(kernel)[None, :] * kernel_dilation - low
    inside = (place >= 0) & (place <= (size - 1) * dilation) & (place % dilation == 0)
    return int(inside.sum())


# === Collectives ===


def _collective(kind, instruction, around, turns):
    groups = _groups(instruction.text)
    devices = groups.shape[-1]
    given = sum(_bytes(shape) for name in instruction.operands for shape in around[name].shapes)
    sent = {
        # A device passes on all parts but one of the whole, each to its neighbour.
        "all-gather": given * (devices - 1),
        "reduce-scatter": given * (devices - 1) / devices,
        "all-reduce": 2 * given * (devices - 1) / devices,
        "all-to-all": given * (devices - 1) / devices,
        "collective-permute": given,
    }[kind]
    return Collective(kind, groups, float(sent), turns, instruction.op_name)


def _transfer(kind, instruction, around, turns):
    """A part of a collective that is sent through the hosts to other pods."""
    named = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
    kind = named.group(1).lower().replace("_", "-") if named else kind
    sent = sum(_bytes(shape) for shape in around[instruction.operands[0]].shapes)
    return Collective(kind, None, float(sent), turns, instruction.op_name)


def _bytes(shape):
    dtype, sizes = shape
    return BYTES.get(dtype, 1) * math.prod(sizes)


def _groups(text):
    """Groups of a collective in each of the forms in which XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return _listed(pairs.group(1))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", text):
        return _of_mesh(*mesh.groups())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _of_iota(*iota.groups())
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return _listed(listed.group(1))
    return np.zeros((1, 1), int)


def _listed(text):
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)])


def _of_iota(sizes, reshaped, order):
    places = np.arange(math.prod(_numbers(reshaped))).reshape(_numbers(reshaped))
    if order:
        places = places.transpose(_numbers(order))
    return places.reshape(_numbers(sizes))


def _of_mesh(axes, reduced):
    # mesh['axis_0'=16,'axis_1'=16]<=[...] {'axis_1'}: one group for each place along the other axes.
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    inner = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", reduced)]
    outer = [axis for axis in range(places.ndim) if axis not in inner]
    members = math.prod(places.shape[axis] for axis in inner)
    return places.transpose(*outer, *inner).reshape(-1, members)


def _numbers(text):
    return tuple(int(number) for number in text.split(","))
