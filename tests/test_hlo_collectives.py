"""The reader of compiled programs, on collectives: who takes part, along which axes, and how many bytes each sends."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from benchmark_files import importable
from jax.sharding import NamedSharding, PartitionSpec

from jaxid import meshes

with importable() as load:
    hlo: Any = load("hlo")
    found_in: Any = load("hlo_collectives")

MESH = {"data": 2, "model": 4}


def entry(*lines: str, before: str = "") -> Any:
    """A program that runs some instructions on `%x`, an array of 4,096 bytes."""
    text = "\n".join(f"  {line}" for line in ("%x = f32[32,32]{1,0} parameter(0)", *lines))
    return hlo.parse(f"HloModule given\n{before}\nENTRY %main (x: f32[32,32]) -> f32[32,32] {{\n{text}\n}}\n")


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": ("model",),
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ("data",),
    "replica_groups={{0,1,2,3,4,5,6,7}}": ("data", "model"),
    "replica_groups={}": ("data", "model"),
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": ("model",),
    "replica_groups=[2,4]<=[8]": ("model",),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ("data",),
    "replica_groups=[1,8]<=[8]": ("data", "model"),
    "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}": ("model",),
    "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}": ("data",),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}": ("data", "model"),
}


@pytest.mark.parametrize(("groups", "axes"), GROUPS.items(), ids=str)
def test_groups_lie_along_axes_of_the_mesh(groups: str, axes: tuple[str, ...]) -> None:
    program = entry(f"ROOT %sum = f32[32,32]{{1,0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add")
    (one,) = hlo.count(program, mesh=MESH).collectives
    assert (one.kind, one.axes, one.size) == ("all-reduce", axes, 4096)


SENT = {
    "f32[32,32]{1,0} all-reduce(%x)": 2 * 3 / 4 * 4096,
    "f32[128,32]{1,0} all-gather(%x)": 3 * 4096,
    "f32[8,32]{1,0} reduce-scatter(%x)": 3 / 4 * 4096,
    "f32[32,32]{1,0} all-to-all(%x)": 3 / 4 * 4096,
    "f32[32,32]{1,0} all-reduce-start(%x)": 2 * 3 / 4 * 4096,
    "(f32[32,32]{1,0}, f32[128,32]{1,0}) all-gather-start(%x)": 3 * 4096,
    "f32[32,32]{1,0} add(%x, %x)": 0,
}


@pytest.mark.parametrize(("text", "sent"), SENT.items())
def test_bytes_that_a_device_sends(text: str, sent: float) -> None:
    """Those of a ring; the end of an asynchronous collective counts with its start."""
    start = f"%one = {text}, replica_groups=[2,4]<=[8], use_global_device_ids=true"
    end = f"ROOT %done = f32[32,32]{{1,0}} {text.split(' ')[-1].split('(')[0].replace('-start', '-done')}(%one)"
    counts = hlo.count(entry(start, *([end] if "start" in text else ["ROOT %done = f32[] bitcast(%one)"])), mesh=MESH)
    assert counts.sent("model") == sent and counts.sent("data") == 0


def test_pairs_of_devices_that_hand_on() -> None:
    pairs = "source_target_pairs={{0,4},{4,0},{1,5},{5,1}}"
    counts = hlo.count(entry(f"ROOT %y = f32[32,32]{{1,0}} collective-permute(%x), channel_id=1, {pairs}"), mesh=MESH)
    assert (counts.sent("data"), counts.sent("model")) == (4096, 0)


def test_groups_of_one_device_send_nothing() -> None:
    counts = hlo.count(entry("ROOT %y = f32[32,32]{1,0} all-reduce(%x), replica_groups={{0},{1}}"), mesh=MESH)
    assert counts.collectives == ()


FUSED = """
%piece (p: f32[32,32]) -> f32[8,32] {
  %p = f32[32,32]{1,0} parameter(0)
  %sum = f32[32,32]{1,0} all-reduce(%p), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  %at = s32[] constant(0)
  ROOT %part = f32[8,32]{1,0} dynamic-slice(%sum, %at, %at), dynamic_slice_sizes={8,32}
}

%wrapped (q: f32[32,32]) -> f32[8,32] {
  %q = f32[32,32]{1,0} parameter(0)
  ROOT %scattered = f32[8,32]{1,0} reduce-scatter(%q), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
}
"""


def test_a_sum_in_a_fusion_of_which_each_device_keeps_a_part() -> None:
    """The pieces into which a fusion is cut name the same channel, and count once."""
    first = "%one = f32[8,32]{1,0} fusion(%x), kind=kCustom, calls=%piece"
    second = "ROOT %two = f32[8,32]{1,0} fusion(%x), kind=kCustom, calls=%piece"
    program = entry(first, second, before=FUSED)
    (one,) = hlo.count(program, mesh=MESH).collectives
    assert (one.kind, one.sent) == ("reduce-scatter", 3 / 4 * 4096)


def test_a_collective_that_is_started_as_a_computation() -> None:
    start = "%one = ((f32[32,32]{1,0}), f32[8,32]{1,0}) async-start(%x), calls=%wrapped"
    program = entry(start, "ROOT %two = f32[8,32]{1,0} async-done(%one)", before=FUSED)
    assert hlo.count(program, mesh=MESH).sent("model") == 3 / 4 * 4096


def test_groups_that_are_not_understood_are_not_passed_over() -> None:
    program = entry("ROOT %y = f32[32,32]{1,0} all-reduce(%x), replica_groups=some")
    with pytest.raises(ValueError, match=r"y names no groups of devices"):
        hlo.count(program, mesh=MESH)


def test_layers_of_a_compiled_stack() -> None:
    """Two sums for each of five layers, gathers before and after them, and a loop around all that runs twice."""
    mesh = meshes.mesh(2, 4, jax.devices()[:8])

    def put(shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def whole(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))

    def layer(x: Any, weights: Any) -> Any:
        into, back = weights
        x = whole(jax.nn.relu(x @ into) @ back)
        return whole(jax.nn.relu(x @ into) @ back), None

    def run(x: Any, into: Any, back: Any) -> Any:
        x, _ = jax.lax.scan(lambda x, _: jax.lax.scan(layer, x, (into, back)), x, None, length=2)
        return jax.lax.with_sharding_constraint(x, PartitionSpec())

    arrays = put((8, 16), "data"), put((5, 16, 32), None, None, "model"), put((5, 32, 16), None, "model")
    with jax.set_mesh(mesh):
        program = hlo.parse(jax.jit(run).lower(*arrays).compile().as_text())
    counts = hlo.count(program, mesh=MESH)
    sums = [one for one in counts.collectives if one.kind == "all-reduce"]
    assert sum(one.runs for one in sums) == 2 * 5 * 2
    assert counts.sent("model") == 2 * 5 * 2 * (2 * 3 / 4 * 4 * 16 * 4)
    assert counts.sent("data") == 4 * 16 * 4  # a half of the prompts, once
    assert found_in.in_one_step(program, MESH, axis="model") == 2
    assert found_in.in_one_step(program, MESH, axis="data") == 0
    loops = [one for inner in program.computations.values() for one in inner.values() if one.opcode == "while"]
    named = {program.function(loop) for loop in loops}
    assert found_in.in_one_step(program, MESH, axis="model", skipped=named) == 0
