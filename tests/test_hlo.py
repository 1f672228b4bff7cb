"""The reader of compiled programs, on programs whose counts are known."""

import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
hlo: Any = importlib.import_module("hlo")

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
    assert counts.score_tensors == 1


@pytest.mark.parametrize(("keys", "widths", "found"), [([640], [], 1), ([64], [], 0), ([640], [640], 0), ([], [], 0)])
def test_scores_have_an_axis_of_queries_and_one_of_keys(keys: list[int], widths: list[int], found: int) -> None:
    assert hlo.count(hlo.parse(OTHERS), keys=keys, widths=widths).score_tensors == found


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
