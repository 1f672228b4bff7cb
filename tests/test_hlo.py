"""The reader of compiled programs, on programs whose counts are known."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from benchmark_files import importable

from jaxid.dcsm import scoring
from jaxid.kernels import banded, lanes

with importable() as load:
    hlo: Any = load("hlo")
    kernels: Any = load("hlo_kernels")

LOOP = """
HloModule loop, is_scheduled=true

%wide (arg: (s32[], f32[8,600], f32[4,600,600])) -> (s32[], f32[8,600], f32[4,600,600]) {
  %arg = (s32[], f32[8,600]{1,0}, /*index=2*/f32[4,600,600]{2,1,0:T(8,128)S(1)}) parameter(0)
  %step = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,600]{1,0} get-tuple-element(%arg), index=1
  %stack = f32[4,600,600]{2,1,0} get-tuple-element(%arg), index=2
  %copied = f32[600,600]{1,0} fusion(%stack, %step), kind=kLoop, calls=%select
  %y = f32[8,600]{1,0} dot(%x, %copied), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %next = s32[] add(%step, %step)
  ROOT %out = (s32[], f32[8,600]{1,0}, f32[4,600,600]{2,1,0}) tuple(%next, %y, %stack)
}

%select (stack: f32[4,600,600], index: s32[]) -> f32[600,600] {
  %stack.1 = f32[4,600,600]{2,1,0} parameter(0)
  %index = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,600,600]{2,1,0} dynamic-slice(%stack.1, %index, %zero, %zero), dynamic_slice_sizes={1,600,600}
  ROOT %flat = f32[600,600]{1,0} bitcast(%one)
}

%less (arg.1: (s32[], f32[8,600], f32[4,600,600])) -> pred[] {
  %arg.1 = (s32[], f32[8,600]{1,0}, f32[4,600,600]{2,1,0}) parameter(0)
  %count = s32[] get-tuple-element(%arg.1), index=0
  ROOT %is = pred[] compare(%count, %count), direction=LT
}

ENTRY %main (p0: f32[8,600], p1: f32[4,600,600]) -> f32[8,600] {
  %p0 = f32[8,600]{1,0} parameter(0)
  %p1 = f32[4,600,600]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], f32[8,600]{1,0}, f32[4,600,600]{2,1,0}) tuple(%start, %p0, %p1)
  %end = (s32[], f32[8,600]{1,0}, f32[4,600,600]{2,1,0}) while(%init), condition=%less, body=%wide, TRIPS
  ROOT %result = f32[8,600]{1,0} get-tuple-element(%end), index=1
}
"""

X, W = 8 * 600 * 4, 600 * 600 * 4
KNOWN = 'backend_config={"known_trip_count":{"n":"4"}}'


def test_a_loop_counts_as_often_as_it_runs() -> None:
    counts = hlo.count(hlo.parse(LOOP.replace("TRIPS", KNOWN)), weights=[1])
    assert counts.flop == 4 * 2 * 8 * 600 * 600
    # Each time: one layer is read and written, then read by the product, and the loop's counter is added.
    index = 4
    assert counts.moved == 4 * ((2 * W + index) + (X + W + X) + 3 * index)
    assert (counts.weight_copies, counts.copied, counts.unknown_loops) == (1, 4 * W, 0)
    assert (counts.in_moves, counts.in_products) == (4 * (2 * W + index), 4 * (X + W + X))
    assert counts.faults == {"a copy of weights: f32[600,600] copied"}


def test_loops_of_unknown_length_count_once_and_are_named() -> None:
    counts = hlo.count(hlo.parse(LOOP.replace("TRIPS", 'metadata={op_name="while"}')))
    assert (counts.flop, counts.unknown_loops) == (2 * 8 * 600 * 600, 1)


@pytest.mark.parametrize(("weights", "large", "copies"), [([1], W, 1), ([1], W + 1, 0), ([0], W, 0), ([], W, 0)])
def test_only_large_copies_of_weights_count(weights: list[int], large: int, copies: int) -> None:
    assert hlo.count(hlo.parse(LOOP.replace("TRIPS", KNOWN)), weights=weights, large=large).weight_copies == copies


OTHERS = """
HloModule others

%update (cache: bf16[32,1024,64], new: bf16[32,1,64], at: s32[]) -> bf16[32,1024,64] {
  %cache = bf16[32,1024,64]{2,1,0} parameter(0)
  %new = bf16[32,1,64]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %twice = bf16[32,1,64]{2,1,0} add(%new, %new)
  ROOT %updated = bf16[32,1024,64]{2,1,0} dynamic-update-slice(%cache, %twice, %zero, %at, %zero)
}

%small (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %negated = f32[4]{0} negate(%a)
}

%big (b: f32[512,512]) -> f32[4] {
  %b = f32[512,512]{1,0} parameter(0)
  %transposed = f32[512,512]{1,0} transpose(%b), dimensions={1,0}
  ROOT %cut = f32[4]{0} slice(%transposed), slice={[0:1], [0:4]}
}

ENTRY %main (all: f32[]) -> f32[4] {
  %q = bf16[16,640,64]{2,1,0} parameter(0)
  %k = bf16[16,640,64]{2,1,0} parameter(1)
  %cache.1 = bf16[32,1024,64]{2,1,0} parameter(2)
  %new.1 = bf16[32,1,64]{2,1,0} parameter(3)
  %at.1 = s32[] parameter(4)
  %w = f32[512,512]{1,0} parameter(5)
  %small.1 = f32[4]{0} parameter(6)
  %scores = (f32[16,640,640]{2,1,0}, s8[64]{0}) custom-call(%q, %k), custom_call_target="__cublas$lt$matmul", BACKEND
  %updated.1 = bf16[32,1024,64]{2,1,0} fusion(%cache.1, %new.1, %at.1), kind=kLoop, calls=%update
  ROOT %chosen = f32[4]{0} conditional(%at.1, %small.1, %w), branch_computations={%small, %big}
}
"""


OTHERS = OTHERS.replace("BACKEND", 'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}')


def test_kernels_updates_in_place_and_branches() -> None:
    counts = hlo.count(hlo.parse(OTHERS), weights=[5], keys=[640], widths=[1024])
    assert counts.flop == 2 * 16 * 640 * 640 * 64
    kernel = 2 * 16 * 640 * 64 * 2 + 16 * 640 * 640 * 4  # without the library's scratch
    update = 2 * 32 * 64 * 2 + 4  # the new token is read and written, its index is read
    branch = 2 * 512 * 512 * 4 + 2 * 16  # the larger one
    assert counts.moved == kernel + update + branch
    assert (counts.weight_copies, counts.copied) == (1, 512 * 512 * 4)
    assert counts.score_tensors == 1 and "scores: f32[16,640,640] scores" in counts.faults


@pytest.mark.parametrize(("keys", "widths", "found"), [([640], [], 1), ([64], [], 0), ([640], [640], 0), ([], [], 0)])
def test_scores_have_an_axis_of_queries_and_one_of_keys(keys: list[int], widths: list[int], found: int) -> None:
    assert hlo.count(hlo.parse(OTHERS), keys=keys, widths=widths).score_tensors == found


def test_scores_on_the_chip_are_not_in_memory() -> None:
    near = OTHERS.replace("(f32[16,640,640]{2,1,0}, s8[64]{0})", "(f32[16,640,640]{2,1,0:T(8,128)S(1)}, s8[64]{0})")
    assert near != OTHERS and hlo.count(hlo.parse(near), keys=[640]).score_tensors == 0


def test_products_written_as_convolutions() -> None:
    """As TPUs compute them: plain, and a batch of products as a dilated window."""

    def flop(a: str, b: str, y: str, how: str) -> float:
        lines = [f"%a = f32[{a}] parameter(0)", f"%b = f32[{b}] parameter(1)"]
        lines += [f"ROOT %y = f32[{y}] convolution(%a, %b), {how}"]
        body = "".join(f"  {line}\n" for line in lines)
        return hlo.count(hlo.parse(f"ENTRY %main (a: f32[{a}], b: f32[{b}]) -> f32[{y}] {{\n{body}}}\n")).flop

    assert flop("8,16", "16,32", "8,32", "dim_labels=bf_io->bf") == 2 * 8 * 16 * 32
    batched = "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf"
    assert flop("4,8,16", "4,16,32", "4,8,32", batched) == 4 * 2 * 8 * 16 * 32
    picture = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
    assert flop("2,7,7,4", "3,3,4,5", "2,7,7,5", picture) == 2 * 2 * (3 * 7 - 2) ** 2 * 5 * 4  # not on the padding
    heads = "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=b0f_i0o->b0f"  # one head of each output is inside
    assert flop("8,1,16", "16,4,32", "8,4,32", heads) == 4 * 2 * 8 * 16 * 32


@pytest.mark.parametrize(("dtype", "size"), [("pred", 1), ("bf16", 2), ("f8e4m3fn", 1), ("c64", 8), ("s4", 0.5)])
def test_sizes(dtype: str, size: float) -> None:
    assert hlo.Shape(dtype, (2, 3)).size == 6 * size


def test_a_program_compiled_here() -> None:
    def program(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, stack)[0]

    shapes = (jax.ShapeDtypeStruct((64, 256), jnp.float32), jax.ShapeDtypeStruct((5, 256, 256), jnp.float32))
    text = jax.jit(program).lower(*shapes).compile().as_text()
    assert text is not None
    counts = hlo.count(hlo.parse(text))
    assert counts.flop == 5 * 2 * 64 * 256 * 256
    assert counts.moved >= 5 * 256 * 256 * 4


CHIP = """
HloModule chip

FunctionNames
1 "caller"
2 "sweep.<locals>.chosen"
3 "sweep"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=0 end_column=1}
2 {file_name_id=1 function_name_id=2 line=2 end_line=2 column=0 end_column=1}
3 {file_name_id=1 function_name_id=3 line=3 end_line=3 column=0 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=1}

%pick (stack: bf16[3,512,512], index: s32[]) -> bf16[512,512] {
  %stack = bf16[3,512,512]{2,1,0} parameter(0)
  %index = s32[]{:S(6)} parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,512,512]{2,1,0} dynamic-slice(%stack, %index, %zero, %zero), dynamic_slice_sizes={1,512,512}
  ROOT %flat = bf16[512,512]{1,0} bitcast(%one)
}

%multiply (x: bf16[16,512], stack.1: bf16[3,512,512], index.1: s32[]) -> bf16[16,512] {
  %x = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %stack.1 = bf16[3,512,512]{2,1,0} parameter(1)
  %index.1 = s32[]{:S(6)} parameter(2)
  %picked = bf16[512,512]{1,0} fusion(%stack.1, %index.1), kind=kLoop, calls=%pick
  ROOT %product = bf16[16,512]{1,0} convolution(%x, %picked), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[16,512], bf16[3,512,512], s32[])) -> (s32[], bf16[16,512], bf16[3,512,512], s32[]) {
  %state = (s32[], bf16[16,512]{1,0:T(8,128)(2,1)S(1)}, bf16[3,512,512]{2,1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one.1 = s32[] constant(1)
  %next = s32[] add(%i, %one.1)
  %a = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %w = bf16[3,512,512]{2,1,0} get-tuple-element(%state), index=2
  %end = s32[] get-tuple-element(%state), index=3
  %b = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %w, %i), kind=kOutput, calls=%multiply
  ROOT %after = (s32[], bf16[16,512]{1,0:S(1)}, bf16[3,512,512]{2,1,0}, s32[]) tuple(%next, %b, %w, %end)
}

%less (state.1: (s32[], bf16[16,512], bf16[3,512,512], s32[])) -> pred[] {
  %state.1 = (s32[], bf16[16,512]{1,0:S(1)}, bf16[3,512,512]{2,1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %end.1 = s32[] get-tuple-element(%state.1), index=3
  ROOT %is = pred[] compare(%i.1, %end.1), direction=LT
}

%skip (given: (bf16[16,512])) -> (bf16[16,512]) {
  %given = (bf16[16,512]{1,0:S(1)}) parameter(0)
  %v = bf16[16,512]{1,0:S(1)} get-tuple-element(%given), index=0
  %one.2 = bf16[16,16]{1,0:S(1)} dot(%v, %v), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %same = (bf16[16,512]{1,0:S(1)}) tuple(%v)
}

%work (given.1: (bf16[16,512])) -> (bf16[16,512]) {
  %given.1 = (bf16[16,512]{1,0:S(1)}) parameter(0)
  %y = bf16[16,512]{1,0:S(1)} get-tuple-element(%given.1), index=0
  %square = bf16[16,16]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %z = bf16[16,512]{1,0:S(1)} dot(%square, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %returned = (bf16[16,512]{1,0:S(1)}) tuple(%z)
}

ENTRY %main (far: bf16[16,512], weights: bf16[3,512,512]) -> bf16[16,512] {
  %far = bf16[16,512]{1,0} parameter(0)
  %weights = bf16[3,512,512]{2,1,0} parameter(1)
  %fetch = (bf16[16,512]{1,0:S(1)}, bf16[16,512]{1,0}, u32[]{:S(2)}) copy-start(%far)
  %near = bf16[16,512]{1,0:S(1)} copy-done(%fetch)
  %first = s32[] constant(0)
  %last = s32[] constant(3)
  %init = (s32[], bf16[16,512]{1,0:S(1)}, bf16[3,512,512]{2,1,0}, s32[]) tuple(%first, %near, %weights, %last)
  %loop = (s32[], bf16[16,512]{1,0:S(1)}, bf16[3,512,512]{2,1,0}, s32[]) while(%init), condition=%less, body=%body
  %x.2 = bf16[16,512]{1,0:S(1)} get-tuple-element(%loop), index=1
  %no = (bf16[16,512]{1,0:S(1)}) tuple(%x.2)
  %yes = (bf16[16,512]{1,0:S(1)}) tuple(%x.2)
  %choice = s32[] get-tuple-element(%loop), index=0
  %cond = (bf16[16,512]{1,0:S(1)}) conditional(%choice, ARMS, metadata={op_name="c" stack_frame_id=2}
  %chosen = bf16[16,512]{1,0:S(1)} get-tuple-element(%cond), index=0
  ROOT %out = bf16[16,512]{1,0} copy(%chosen)
}
"""
INDEXED = "%no, %yes), branch_computations={%skip, %work}"
BOOLEAN = "%yes, %no), true_computation=%work, false_computation=%skip"
TOKENS, LAYER, COUNTER, PRODUCT = 16 * 512 * 2, 512 * 512 * 2, 4, 2 * 16 * 16 * 512


def test_memory_on_the_chip_costs_nothing() -> None:
    """Tokens that stay there, a copy that brings them there, a layer that a nested fusion picks out of its stack."""
    counts = hlo.count(hlo.parse(CHIP.replace("ARMS", INDEXED)), weights=[1], shares={"sweep.<locals>.chosen": 0.0})
    loop = 3 * (LAYER + COUNTER + 3 * COUNTER)  # a layer and its index, and the addition; not the condition
    assert counts.moved == TOKENS + loop + TOKENS
    assert counts.flop == 3 * 2 * 16 * 512 * 512 + PRODUCT  # the loop's length is told by what it counts up to
    assert (counts.weight_copies, counts.unknown_loops, counts.unknown_branches) == (0, 0, 0)


@pytest.mark.parametrize("arms", [INDEXED, BOOLEAN])
def test_branches_count_as_often_as_they_are_taken(arms: str) -> None:
    program = hlo.parse(CHIP.replace("ARMS", arms))
    loop = 3 * 2 * 16 * 512 * 512
    quarter = hlo.count(program, shares={"sweep.<locals>.chosen": 0.25})
    assert quarter.flop == loop + (0.75 * 1 + 0.25 * 2) * PRODUCT
    assert (quarter.functions, quarter.unknown_branches) == ({"sweep.<locals>.chosen"}, 0)
    unknown = hlo.count(program, shares={"sweep": 0.25})
    assert unknown.flop == loop + 2 * PRODUCT  # the branch that moves most
    assert (unknown.functions, unknown.unknown_branches) == (frozenset(), 1)


def test_a_loop_runs_as_often_as_the_caller_says() -> None:
    frames = CHIP[: CHIP.index("%pick")]
    text = frames + LOOP.replace("TRIPS", 'metadata={op_name="while" stack_frame_id=3}')
    counts = hlo.count(hlo.parse(text), trips={"sweep": 7})
    assert (counts.flop, counts.unknown_loops) == (7 * 2 * 8 * 600 * 600, 0)
    assert counts.functions == {"sweep"}


def call(shapes: str, operands: list[str], rest: str) -> Any:
    """Counts of a program that is one custom call."""
    lines = [f"%p{index} = {shape} parameter({index})" for index, shape in enumerate(operands)]
    names = ", ".join(f"%p{index}" for index in range(len(operands)))
    lines += [f"ROOT %y = {shapes} custom-call({names}), {rest}"]
    text = f"ENTRY %main (p0: f32[1]) -> f32[1] {{\n{''.join(f'  {line}' + chr(10) for line in lines)}}}\n"
    return hlo.count(hlo.parse(text))


def pallas(name: str) -> str:
    return f'custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/jvp()/{name}/pallas_call"}}'


def test_attention_kernels() -> None:
    """Two products with the scores forward; three and four backward; heads of keys are shared."""
    number, query, key = "f32[2,8,1,640]", "bf16[2,8,600,64]", "bf16[2,4,700,64]"
    scores = 2 * 8 * 600 * 700
    forward = call(f"({query}, {number})", ["s32[2,1,1,640]", query, key, key], pallas("attention_forward"))
    assert forward.flop == 2 * 2 * scores * 64
    assert forward.moved == 4 * (2 * 640 + 2 * 8 * 640) + 2 * (2 * 2 * 8 * 600 * 64 + 2 * 2 * 4 * 700 * 64)
    backward = [query, query, key, key, number, number]
    assert call(query, backward, pallas("attention_query_gradient")).flop == 3 * 2 * scores * 64
    assert call(f"({key}, {key})", backward, pallas("attention_key_gradient")).flop == 4 * 2 * scores * 64


def test_a_product_reads_its_layer_of_the_stack() -> None:
    counts = call("bf16[1,8,32]", ["s32[]", "bf16[8,16]", "bf16[5,16,32]"], pallas("layer_product"))
    assert counts.flop == 2 * 8 * 16 * 32
    assert counts.moved == 4 + 2 * (8 * 16 + 16 * 32 + 8 * 32)


@pytest.mark.parametrize(
    ("name", "matrix", "outputs"), [("layer_product", "512,32", 32), ("layer_product_transposed", "32,512", 32)]
)
def test_products_in_parts_write_each_of_them(name: str, matrix: str, outputs: int) -> None:
    counts = call(f"f32[4,8,{outputs}]", ["s32[]", "bf16[8,512]", f"bf16[5,{matrix}]"], pallas(name))
    assert (counts.flop, counts.unknown_kernels) == (2 * 8 * 512 * outputs, frozenset())
    assert counts.moved == 4 + 2 * (8 * 512 + 512 * outputs) + 4 * 4 * 8 * outputs


def test_dense_maps_count_as_their_kernels_say() -> None:
    network = jax.eval_shape(lambda key: scoring.Scorer.init(key, 20, 30).network, jax.random.key(0))
    own = jax.eval_shape(lambda network: banded.bands(network, banded.BLOCK), network)
    weights = [",".join(map(str, one.shape)) for one in (own.first, own.second, own.wide)]
    counts = call("f32[1,64]", [f"f32[{shape}]" for shape in ("20,64,32", *weights)], pallas("dense_map_scores"))
    assert counts.flop == 64 * banded.operations(own)

    own = jax.eval_shape(lambda network: lanes.weights(network, lanes.Block()), network)
    shapes = ["2,21,32,256", "2,4,256", *(",".join(map(str, one.shape)) for one in own[:-1])]
    counts = call("f32[2,1,256]", [f"f32[{shape}]" for shape in shapes], pallas("dense_map_scores_in_lanes"))
    assert counts.flop == 2 * 256 * lanes.operations(own)


def test_known_kernels_are_those_of_the_library() -> None:
    folder = Path(__file__).parents[1] / "kernels"
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    assert [name for name in kernels.KERNELS if f'"{name}"' not in text] == []


def test_cudnn_attention() -> None:
    shape = '"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","8","600","700"],"x":[]}'
    query, key = "bf16[2,600,8,64]", "bf16[2,700,8,64]"
    for target, products in (("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaSoftmaxBackward", 5)):
        rest = f'custom_call_target="{target}", backend_config={{{shape}}}'
        counts = call(f"({query}, u8[64])", [query, key, key], rest)
        assert counts.flop == products * 2 * 2 * 8 * 600 * 700 * 64
        assert counts.moved == 2 * 2 * 8 * 64 * (2 * 600 + 2 * 700)  # without the library's scratch


def test_unknown_kernels_are_listed() -> None:
    known = call("f32[4]", ["f32[4]"], 'custom_call_target="AllocateBuffer"')
    assert known.unknown_kernels == frozenset() and known.moved == 0
    gradient = "__cudnn$convBackwardFilter"
    for rest, name in (
        (pallas("mystery"), "mystery"),
        ('custom_call_target="cholesky"', "cholesky"),
        (f'custom_call_target="{gradient}", dim_labels=bf_io->bf', gradient),
    ):
        counts = call("f32[4]", ["f32[4]"], rest)
        assert (counts.unknown_kernels, counts.flop, counts.moved) == ({name}, 0, 32)


def test_a_table_that_is_looked_up_is_not_copied() -> None:
    text = """
ENTRY %main (table: bf16[32000,4096], rows: s32[640]) -> bf16[640,4096] {
  %table = bf16[32000,4096]{1,0} parameter(0)
  %rows = s32[640]{0} parameter(1)
  ROOT %found = bf16[640,4096]{1,0} gather(%table, %rows), offset_dims={1}, slice_sizes={1,4096}
}
"""
    counts = hlo.count(hlo.parse(text), weights=[0])
    assert (counts.weight_copies, counts.moved) == (0, 2 * 640 * 4096 * 2 + 640 * 4)
