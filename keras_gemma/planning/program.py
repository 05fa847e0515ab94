"""What a compiled program does, counted in its text: products, kernels and collectives, loops as often as they turn.

XLA's own cost analysis counts the body of a loop once, and nothing of a Pallas kernel.
"""

import copy
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
_SHAPE = re.compile(r"\b(?P<dtype>[a-z]+\d*)\[(?P<sizes>[\d,]*)\](?P<layout>\{[^{}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_CALLERS = ("while", "fusion", "call", "async-start")
# They name tensors, or wait for them, and move none; what they call is looked at by itself.
_IDLE = ("", "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota")
_IDLE += ("while", "call", "conditional", "async-start")
# What a fusion makes of a tensor without reading more of it than is asked for.
_RENAMING = ("bitcast", "pad", "reshape", "convert", "copy", "transpose")
# In whose place the compiler writes a collective that goes on while other things are done.
_START, _DONE = 'custom_call_target="AsyncCollectiveStart"', 'custom_call_target="AsyncCollectiveDone"'
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Shape(NamedTuple):
    """A tensor that an instruction makes.

    Attributes:
        dtype: string.
        sizes: tuple of ints.
        on_chip: bool. Whether it lies in the fast memory next to the units that compute.
    """

    dtype: str
    sizes: tuple
    on_chip: bool = False

    @property
    def bytes(self):
        return BYTES.get(self.dtype, 1) * math.prod(self.sizes)


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
        name: string.
        opcode: string.
        shapes: list of `Shape`, of what it makes.
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
        turn_of_loop: bool. Whether to look at a single turn of the program's only outer loop, and at nothing before it
            or behind it.

    Attributes:
        flops: dict of floats by where in the model they come from.
        moved: float. Bytes that its instructions read from memory and write to it, of slices their own.
        kernels: dict, how often each kernel runs.
        collectives: list of `Collective`.
        unknown_loops: list of names, of loops that the program does not say how often turn: they are counted once.

    Of the branches of a conditional the one that computes most is counted.
    """

    def __init__(self, text, kernel_flops=lambda instruction, operands: 0.0, turn_of_loop=False):
        self._computations, entry = _parsed(text)
        self._kernel_flops = kernel_flops
        self._begin()
        for computation in self._calls_of_loop(entry) if turn_of_loop else [entry]:
            self._walk(computation, turns=1)

    def _begin(self):
        self.flops = defaultdict(float)
        self.moved = 0.0
        self.kernels = defaultdict(int)
        self.collectives = []
        self.unknown_loops = []

    def _calls_of_loop(self, entry):
        (loop,) = (one for one in self._computations[entry].values() if one.opcode == "while")
        return _CALLED.findall(loop.text)

    def _walk(self, computation, turns, fused=False):
        instructions = self._computations[computation]
        for instruction in instructions.values():
            self._count(instruction, instructions, turns, fused)
            if not fused:
                self.moved += turns * _moved(instruction, instructions, self._computations)
            inner = turns * self._trips(instruction, instructions)
            if instruction.opcode == "conditional":
                self._walk(self._largest_branch(instruction), turns, fused)
            elif instruction.opcode in _CALLERS:
                for called in _CALLED.findall(instruction.text):
                    self._walk(called, inner, fused or instruction.opcode == "fusion")

    def _trips(self, instruction, around):
        """How often what an instruction calls is run: 1 where that is not known."""
        trips = _trips(instruction, around, self._computations) if instruction.opcode == "while" else 1
        if trips is None:
            self.unknown_loops.append(instruction.name)
        return trips or 1

    def _largest_branch(self, conditional):
        def work(branch):
            alone = copy.copy(self)
            alone._begin()
            alone._walk(branch, turns=1)
            return sum(alone.flops.values()), alone.moved

        return max(_branches(conditional), key=work)

    def _count(self, instruction, around, turns, fused):
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode in ("dot", "convolution"):
            operands = [around[name].shapes[0].sizes for name in instruction.operands]
            flops = (_dot_flops if instruction.opcode == "dot" else _convolution_flops)(instruction, *operands)
            self.flops[instruction.op_name] += turns * flops
        elif instruction.opcode == "reduce" and instruction.op_name.endswith("dot_general"):
            # A product with a single row is written as its multiplications and their sum.
            self.flops[instruction.op_name] += turns * 2.0 * math.prod(around[instruction.operands[0]].shapes[0].sizes)
        elif instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.text:
            operands = [around[name].shapes[0] for name in instruction.operands if around[name].shapes]
            self.kernels[instruction.name.split(".")[0]] += turns
            self.flops[instruction.op_name] += turns * self._kernel_flops(instruction, operands)
        elif (kind in COLLECTIVES and not _goes_on(instruction, around)) or kind == "send":
            kind = "reduce-scatter" if fused and _keeps_a_part(instruction, around) else kind
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
    sizes = tuple(int(size) for size in found["sizes"].split(",") if size)
    return Shape(found["dtype"], sizes, "S(1)" in (found["layout"] or ""))


def _closing(text, start):
    depth = 1
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    return len(text)


def _branches(conditional):
    listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.text)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed.group(1))
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", conditional.text)


def _trips(loop, around, computations):
    """How often a loop turns: said by XLA, or from the limit, the step and the beginning of its counter; or `None`."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known.group(1))
    condition, body = (
        computations[re.search(rf"{part}=%?([\w.\-]+)", loop.text).group(1)] for part in ("condition", "body")
    )
    limits = [_constant(one) for one in condition.values() if _constant(one) is not None]
    counters = [re.search(r"index=(\d+)", one.text) for one in condition.values() if one.opcode == "get-tuple-element"]
    if len(limits) != 1 or len(counters) != 1:
        # Bounds that are not in the program, as of the tokens of a generation.
        return None
    index = int(counters[0].group(1))
    return -(-(limits[0] - _beginning(loop, index, around)) // _step(body, index))


def _beginning(loop, index, around):
    """The value with which place `index` of a loop's state enters it; 0 where the program does not say."""
    state = around.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return 0
    value = around[state.operands[index]]
    while value.opcode == "copy":
        value = around[value.operands[0]]
    return _constant(value) or 0


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


# === Memory ===


def _moved(instruction, around, computations):
    """Bytes that an instruction reads from a chip's memory and writes to it."""
    if instruction.opcode in _IDLE or instruction.opcode.endswith("-done"):
        return 0.0
    if instruction.opcode == "slice-start":
        # What it makes is named after what it reads.
        return float(instruction.shapes[1].bytes + _in_memory(instruction.shapes[1:2]))
    read = [_in_memory(around[name].shapes) for name in instruction.operands if name in around]
    written = _in_memory(instruction.shapes[:1] if instruction.opcode.endswith("-start") else instruction.shapes)
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2.0 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * read[1]
    if instruction.opcode == "fusion":
        return _moved_by_fusion(instruction, read, written, computations)
    return float(sum(read) + written)


def _moved_by_fusion(instruction, read, written, computations):
    inside = _called(instruction, computations)
    if any(_DONE in one.text for one in inside.values()):
        return 0.0
    read = [min(whole, used) for whole, used in zip(read, _used_of_parameters(inside, computations))]
    for root in _roots(inside):
        if root.opcode == "dynamic-update-slice":
            written -= _in_memory(root.shapes) - _in_memory(inside[root.operands[1]].shapes)
        elif _goes_on(root, inside) or (root.opcode == "parameter" and _carries_on(inside)):
            written -= _in_memory(root.shapes)
    return float(sum(read) + max(0, written))


def _used_of_parameters(inside, computations):
    """Bytes that a fusion needs of each of its operands."""
    users = _users(inside)

    def used(one):
        return min(_bytes(one.shapes), sum(used_by(place, user) for place, user in users[one.name]))

    def used_by(place, user):
        if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
            return _in_memory(user.shapes)
        if user.opcode == "dynamic-update-slice" and place == 0:
            return 0
        if user.opcode in _RENAMING and users[user.name]:
            return used(user)
        if user.opcode == "fusion":
            return _used_of_parameters(_called(user, computations), computations)[place]
        return _bytes(inside[user.operands[place]].shapes)

    found = [(re.search(r"parameter\((\d+)\)", one.text), one) for one in inside.values()]
    parameters = {int(number.group(1)): one for number, one in found if one.opcode == "parameter"}
    return [used(parameters[number]) for number in sorted(parameters)]


def _users(inside):
    """Who in a fusion reads what: lists of `(place among its operands, instruction)` by name."""
    users = defaultdict(list)
    hands_on = _carries_on(inside)
    for one in inside.values():
        if not (_goes_on(one, inside) or (hands_on and one.opcode == "tuple")):
            for place, name in enumerate(one.operands):
                users[name].append((place, one))
    return users


def _roots(inside):
    last = list(inside.values())[-1]
    return [inside[name] for name in last.operands] if last.opcode == "tuple" else [last]


def _called(fusion, computations):
    return computations[_CALLED.search(fusion.text).group(1)]


def _bytes(shapes):
    return sum(shape.bytes for shape in shapes)


def _in_memory(shapes):
    return sum(shape.bytes for shape in shapes if not shape.on_chip)


# === Products ===


def _dot_flops(instruction, left, right):
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
    axes = [int(axis) for axis in contracted.group(1).split(",") if axis] if contracted else []
    return 2.0 * math.prod(instruction.shapes[0].sizes) * math.prod(left[axis] for axis in axes)


def _convolution_flops(instruction, left, right):
    """The TPU's compiler writes products as convolutions, those of batches with windows that reach over the edge."""
    of_left, of_right, of_result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text).groups()
    made = instruction.shapes[0].sizes
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


def _goes_on(instruction, around):
    """Whether a collective began elsewhere: parts of what else is to be done go on with it, each naming it again."""
    if "chain_id=" not in instruction.text or instruction.opcode not in COLLECTIVES:
        return False
    return not any(_START in one.text and instruction.name in one.operands for one in around.values())


def _carries_on(inside):
    """Whether a collective that began elsewhere goes on in a fusion, which hands its state on as it is."""
    return any(_goes_on(one, inside) for one in inside.values())


def _keeps_a_part(instruction, around):
    """Whether all that is done with a sum is to take a part of it."""
    users = [one.opcode for one in around.values() if instruction.name in one.operands]
    return instruction.opcode == "all-reduce" and users == ["dynamic-slice"]


def _collective(kind, instruction, around, turns):
    groups = _groups(instruction.text)
    devices = groups.shape[-1]
    given = sum(_bytes(around[name].shapes) for name in instruction.operands)
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
    sent = _bytes(around[instruction.operands[0]].shapes)
    return Collective(kind, None, float(sent), turns, instruction.op_name)


def _groups(text):
    """Groups of a collective in each of the forms in which XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return _listed(pairs.group(1))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? *\{([^}]*)\}", text):
        return _of_mesh(*mesh.groups())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _of_iota(*iota.groups())
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return _listed(listed.group(1))
    raise ValueError(f"Unknown way of writing who takes part in a collective. Received: {text[:400]}")


def _listed(text):
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)])


def _of_iota(sizes, reshaped, order):
    places = np.arange(math.prod(_numbers(reshaped))).reshape(_numbers(reshaped))
    if order:
        places = places.transpose(_numbers(order))
    return places.reshape(_numbers(sizes))


def _of_mesh(axes, order, reduced):
    # mesh['axis_0'=16,'axis_1'=16] {'axis_1'}: one group for each place along the other axes.
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    places = _in_order(order, math.prod(sizes.values())).reshape(tuple(sizes.values()))
    inner = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", reduced)]
    outer = [axis for axis in range(places.ndim) if axis not in inner]
    members = math.prod(places.shape[axis] for axis in inner)
    return places.transpose(*outer, *inner).reshape(-1, members)


def _in_order(order, count):
    """The devices of a mesh: as they are numbered, in a transposed order as `[2,4]T(1,0)`, or one by one."""
    if order is None:
        return np.arange(count)
    transposed = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    return _of_iota(str(count), *transposed.groups()) if transposed else np.array(_numbers(order))


def _numbers(text):
    return tuple(int(number) for number in text.split(","))
