"""Counts in the text of a program against what it is known to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from keras_gemma.planning.program import Program

LAYERS = 5
FORWARD = 2 * 16 * 32 * 32


def program_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def scanned(x, weights):
    return lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]


def test_a_loop_counts_as_often_as_it_turns():
    program = program_of(scanned, (16, 32), (LAYERS, 32, 32))
    assert sum(program.flops.values()) == LAYERS * FORWARD


def test_a_backward_pass_counts_thrice():
    program = program_of(jax.grad(lambda *args: scanned(*args).sum(), (0, 1)), (16, 32), (LAYERS, 32, 32))
    assert sum(program.flops.values()) == 3 * LAYERS * FORWARD


# As the TPU's compiler writes products: of a matrix; of a matrix and a batch of them, in windows over the edge.
CONVOLUTIONS = {
    "f32[8,5] convolution(%left, %right), dim_labels=bf_io->bf": ("8,3", "3,5", 2 * 8 * 3 * 5),
    "f32[8,4,6,1] convolution(%left, %right), window={size=4x2 pad=3_3x0_0 rhs_reversal=1x0}, "
    "dim_labels=b1f0_01io->b0f1": ("8,2,3,1", "4,2,3,6", 2 * 8 * 4 * 2 * 3 * 6),
}


@pytest.mark.parametrize("line", CONVOLUTIONS)
def test_products_that_are_written_as_convolutions(line):
    left, right, expected = CONVOLUTIONS[line]
    text = f"""HloModule m
ENTRY %main (left: f32[{left}], right: f32[{right}]) -> f32[] {{
  %left = f32[{left}]{{0}} parameter(0)
  %right = f32[{right}]{{0}} parameter(1)
  ROOT %product = {line}
}}
"""
    assert sum(Program(text).flops.values()) == expected


LOOP = """HloModule m
%condition (state: (u32[], f32[64])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %state = (u32[]{:T(128)}, f32[64]{0}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body (state: (u32[], f32[64])) -> (u32[], f32[64]) {
  %one = u32[]{:T(128)} constant(1)
  %state.1 = (u32[]{:T(128)}, f32[64]{0}) parameter(0)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=0
  %sent = f32[64]{0} get-tuple-element(%state.1), index=1
  %received = f32[64]{0} collective-permute(%sent), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %kernel = f32[64]{0} custom-call(%received), custom_call_target="tpu_custom_call", frontend_attributes={metadata={
}}, metadata={op_name="attention"}
  %next = u32[]{:T(128)} add(%counter.1, %one)
  %next.1 = u32[]{:T(128)} add(%one, %next)
  ROOT %new = (u32[]{:T(128)}, f32[64]{0}) tuple(%next.1, %kernel)
}

ENTRY %main (start: (u32[], f32[64])) -> (u32[], f32[64]) {
  %start = (u32[]{:T(128)}, f32[64]{0}) parameter(0)
  ROOT %loop = (u32[]{:T(128)}, f32[64]{0}) while(%start), condition=%condition, body=%body
}
"""


def test_a_counter_may_take_two_steps_at_once():
    program = Program(LOOP, kernel_flops=lambda instruction, operands: 10.0)
    assert program.kernels == {"kernel": 4}
    assert program.flops == {"attention": 40.0}
    (sent,) = program.collectives
    assert (sent.kind, sent.sent, sent.turns) == ("collective-permute", 64 * 4, 4)


GROUPS = {
    "replica_groups={{0,1},{2,3}}": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[4]": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[2,2]T(1,0)": [[0, 2], [1, 3]],
    "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}": [[0, 2], [1, 3]],
    "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}": [[0, 1], [2, 3]],
    "replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}": [[0, 2], [1, 3]],
    "replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=(0,3,1,2) {'axis_1'}": [[0, 3], [1, 2]],
    "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}": [[0, 1, 2, 3]],
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_of_devices(groups):
    text = f"""HloModule m
ENTRY %main (x: bf16[10]) -> bf16[10] {{
  %x = bf16[10]{{0}} parameter(0)
  ROOT %sum = bf16[10]{{0}} all-reduce(%x), {groups}, to_apply=%add
}}
"""
    (collective,) = Program(text).collectives
    np.testing.assert_array_equal(collective.groups, GROUPS[groups])
    # Pods of two devices.
    assert collective.crosses([0, 0, 1, 1]) == (GROUPS[groups][0] != [0, 1])
    members = len(GROUPS[groups][0])
    assert collective.sent == pytest.approx(2 * 20 * (members - 1) / members)


def test_groups_that_cannot_be_read_are_not_passed_over():
    with pytest.raises(ValueError, match="who takes part"):
        Program("ENTRY %main (x: f32[1]) -> f32[1] {\n  ROOT %sum = f32[1]{0} all-reduce(%x), replica_groups=new\n}\n")


def test_transfers_between_pods():
    text = """HloModule m
ENTRY %main (x: bf16[10]) -> token[] {
  %x = bf16[10]{0} parameter(0)
  %after-all = token[] after-all()
  ROOT %send = (bf16[10]{0}, u32[], token[]) send(%x, %after-all), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:255}",_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
    (collective,) = Program(text).collectives
    assert (collective.kind, collective.sent) == ("all-reduce", 20.0)
    assert collective.crosses([0])


GATHER = 'all-gather(%{}), replica_groups=[1,4]<=[4], dimensions={{0}}, frontend_attributes={{chain_id="3"}}'
# As the TPU's compiler lets a collective go on while a product is computed: each part of the work names it again.
GOES_ON = f"""HloModule m
%begin (x: bf16[8]) -> (bf16[8], bf16[32]) {{
  %x = bf16[8]{{0}} parameter(0)
  %gather.1 = bf16[32]{{0}} {GATHER.format("x")}
  ROOT %start = (bf16[8]{{0}}, bf16[32]{{0}}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}}

%meanwhile (x: bf16[8], whole: bf16[32], other: f32[64]) -> (f32[64], bf16[8], bf16[32]) {{
  %x = bf16[8]{{0}} parameter(0)
  %whole = bf16[32]{{0}} parameter(1)
  %other = f32[64]{{0}} parameter(2)
  %computed = f32[64]{{0}} negate(%other)
  %gather.2 = bf16[32]{{0}} {GATHER.format("x")}
  ROOT %state = (f32[64]{{0}}, bf16[8]{{0}}, bf16[32]{{0}}) tuple(%computed, %x, %gather.2)
}}

%end (x: bf16[8], whole: bf16[32]) -> bf16[32] {{
  %x = bf16[8]{{0}} parameter(0)
  %whole = bf16[32]{{0}} parameter(1)
  %gather.3 = bf16[32]{{0}} {GATHER.format("x")}
  ROOT %done = bf16[32]{{0}} custom-call(%x, %whole, %gather.3), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: bf16[8], other: f32[64]) -> bf16[32] {{
  %x = bf16[8]{{0}} parameter(0)
  %other = f32[64]{{0}} parameter(1)
  %begun = (bf16[8]{{0}}, bf16[32]{{0}}) fusion(%x), kind=kCustom, calls=%begin
  %part = bf16[8]{{0}} get-tuple-element(%begun), index=0
  %whole = bf16[32]{{0}} get-tuple-element(%begun), index=1
  %gone = (f32[64]{{0}}, bf16[8]{{0}}, bf16[32]{{0}}) fusion(%part, %whole, %other), kind=kCustom, calls=%meanwhile
  %part.1 = bf16[8]{{0}} get-tuple-element(%gone), index=1
  %whole.1 = bf16[32]{{0}} get-tuple-element(%gone), index=2
  ROOT %ended = bf16[32]{{0}} fusion(%part.1, %whole.1), kind=kCustom, calls=%end
}}
"""


def test_a_collective_that_goes_on_beside_other_work_counts_once():
    program = Program(GOES_ON)
    (gather,) = program.collectives
    assert (gather.kind, gather.sent) == ("all-gather", 3 * 16)
    # It reads a part and writes it and the whole; the other work reads and writes 256 bytes.
    assert program.moved == (16 + 16 + 64) + 2 * 256


SCATTERED = """HloModule m
%all-reduce-scatter (x: bf16[32]) -> bf16[8] {
  %x = bf16[32]{0} parameter(0)
  %sum = bf16[32]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %place = u32[] partition-id()
  ROOT %part = bf16[8]{0} dynamic-slice(%sum, %place), dynamic_slice_sizes={8}
}

ENTRY %main (x: bf16[32]) -> bf16[8] {
  %x = bf16[32]{0} parameter(0)
  ROOT %scattered = bf16[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_sum_of_which_a_fusion_keeps_a_part_is_scattered():
    (collective,) = Program(SCATTERED).collectives
    assert (collective.kind, collective.sent) == ("reduce-scatter", 64 * 3 / 4)


SLICED = """HloModule m
%inner (x: f32[8,64], place: s32[]) -> f32[8,2] {
  %x = f32[8,64]{1,0} parameter(0)
  %place = s32[] parameter(1)
  %padded = f32[8,66]{1,0} pad(%x, %zero), padding=0_0x0_2
  ROOT %slice = f32[8,2]{1,0} dynamic-slice(%padded, %zero, %place), dynamic_slice_sizes={8,2}
}

%outer (x: f32[8,64], place: s32[]) -> f32[8,2] {
  %x = f32[8,64]{1,0} parameter(0)
  %place = s32[] parameter(1)
  %columns = f32[8,2]{1,0} fusion(%x, %place), kind=kLoop, calls=%inner
  ROOT %negated = f32[8,2]{1,0} negate(%columns)
}

ENTRY %main (x: f32[8,64], place: s32[]) -> f32[8,2] {
  %x = f32[8,64]{1,0} parameter(0)
  %place = s32[] parameter(1)
  ROOT %made = f32[8,2]{1,0} fusion(%x, %place), kind=kOutput, calls=%outer
}
"""


def test_a_fusion_reads_the_columns_that_it_asks_for():
    assert Program(SLICED).moved == 8 * 2 * 4 + 4 + 8 * 2 * 4


CONDITIONAL = """HloModule m
%small (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4]{1,0} parameter(0)
  ROOT %same = f32[4,4]{1,0} copy(%x)
}
%large (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4]{1,0} parameter(0)
  ROOT %product = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (which: s32[], x: f32[4,4]) -> f32[4,4] {
  %which = s32[] parameter(0)
  %x = f32[4,4]{1,0} parameter(1)
  ROOT %chosen = f32[4,4]{1,0} conditional(%which, %x, %x), BRANCHES
}
"""


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%small, %large}",
        "branch_computations={%large, %small, %large}",
        "true_computation=%large, false_computation=%small",
        "true_computation=%small, false_computation=%large",
    ],
)
def test_of_a_conditional_its_largest_branch_counts(branches):
    program = Program(CONDITIONAL.replace("BRANCHES", branches))
    assert sum(program.flops.values()) == 2 * 4**3
    assert program.moved == 3 * 4 * 4 * 4


def test_a_conditional_of_jax_is_counted():
    def either(which, x):
        return lax.cond(which[0] > 0, lambda x: x @ x, lambda x: x, x)

    assert sum(program_of(either, (1,), (8, 8)).flops.values()) == 2 * 8**3


def test_a_loop_of_unknown_length_is_told():
    def until(limit, x):
        return lax.while_loop(lambda x: x.sum() < limit[0], lambda x: x @ x, x)

    program = program_of(until, (1,), (8, 8))
    assert len(program.unknown_loops) == 1 and sum(program.flops.values()) == 2 * 8**3
    assert not program_of(scanned, (16, 32), (LAYERS, 32, 32)).unknown_loops
