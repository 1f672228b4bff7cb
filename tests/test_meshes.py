"""Meshes: texts, sizes, devices, how they are divided among processes, and what a model takes on them."""

import dataclasses
import math
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
from families import EVERY
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxid import load, meshes
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.devices import DEVICES
from jaxid.errors import InputError
from jaxid.meshes import Axes

CASE = EVERY[0]


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("data=4,model=2", Axes(4, 2)),
        (" model = 2 , data=4", Axes(4, 2)),
        ("data=8", Axes(8, 1)),
        ("model=4", Axes(1, 4)),
    ],
)
def test_texts(text: str, axes: Axes) -> None:
    assert meshes.sizes(text) == axes and meshes.sizes(str(axes)) == axes


@pytest.mark.parametrize("text", ["", "8", "data", "data=0", "data=-1", "data=2,data=2", "rows=2", "data=2;model=2"])
def test_other_texts(text: str) -> None:
    with pytest.raises(InputError, match=r"a mesh is given as data=4,model=2, or as auto; not as"):
        meshes.sizes(text)


def test_copies_of_the_model_are_side_by_side() -> None:
    mesh = meshes.mesh(2, 3)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.tolist() == [jax.devices()[:3], jax.devices()[3:6]]
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_more_devices_than_there_are() -> None:
    with pytest.raises(InputError, match=r"data=4,model=4 has 16 devices, but JAX sees 8"):
        meshes.mesh(4, 4)


def test_own_meshes() -> None:
    checkpoint = open_checkpoint(fixtures.folder(CASE))
    devices = np.array(jax.devices())
    own = checkpoint.on(Mesh(devices[:2], ("model",))).mesh
    assert own is not None and own.shape == {"model": 2}
    assert checkpoint.on(Mesh(devices[:1], ("model",))).mesh is None
    with pytest.raises(InputError, match=r"the mesh has an axis 'rows'; jaxid shards over data and model"):
        checkpoint.on(Mesh(devices[:2], ("rows",)))
    explicit = Mesh(devices[:2], ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(InputError, match=r"type Auto"):
        checkpoint.on(explicit)


def test_arrays_are_divided_where_they_divide() -> None:
    mesh = meshes.mesh(4, 2)
    found: Any = meshes.sharded(mesh, (np.arange(8), np.ones((3, 4)), np.float32(1)))
    even, odd, _ = found
    assert [one.sharding.spec for one in found] == [PartitionSpec("data"), PartitionSpec(), PartitionSpec()]
    inner: Any = meshes.sharded(mesh, np.ones((3, 4)), axis=1)
    assert inner.sharding.spec == PartitionSpec(None, "data")
    assert meshes.of((even, odd)) == mesh and meshes.of(np.ones(2)) is None and meshes.of(jax.numpy.ones(2)) is None
    assert jax.jit(lambda x: jax.numpy.asarray(meshes.of(x) is None))(even)
    assert meshes.of(meshes.sharded(None, np.arange(8))) is None


@pytest.mark.parametrize(
    ("data", "model", "processes", "found"),
    [
        (8, 1, 2, (4, 1)),  # four copies in each
        (4, 2, 4, (1, 1)),
        (1, 8, 2, (1, 2)),  # two processes share one copy
        (2, 8, 4, (1, 2)),
        (6, 2, 3, (2, 1)),
    ],
)
def test_among_processes(data: int, model: int, processes: int, found: tuple[int, int]) -> None:
    assert meshes.local(data, model, processes) == found


@pytest.mark.parametrize(("data", "model", "processes"), [(3, 1, 2), (2, 3, 3), (4, 3, 2 * 4)])
def test_not_among_so_many_processes(data: int, model: int, processes: int) -> None:
    with pytest.raises(InputError, match=r"cannot be divided among \d processes"):
        meshes.local(data, model, processes)


def test_auto_takes_the_fewest_devices_that_hold_a_copy() -> None:
    checkpoint = open_checkpoint(fixtures.folder(CASE))
    size = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(checkpoint.abstract().parameters))
    heads = checkpoint.model.config.text_config.num_attention_heads
    for shared in (1, 2, 4):
        device = dataclasses.replace(DEVICES["h100"], memory=int(size / shared / 0.6) + 64)
        found = checkpoint.axes("auto", 8, device)
        assert found == Axes(8 // shared, shared) and heads % shared == 0
    with pytest.raises(InputError, match=r"the parameters take .* GB, more than \d devices with .* hold"):
        checkpoint.axes("auto", 8, dataclasses.replace(DEVICES["h100"], memory=1000))
    assert checkpoint.axes("auto", 8) == Axes(8, 1)  # on a CPU
    assert checkpoint.axes(None, 8) == meshes.ONE


@pytest.mark.filterwarnings("ignore:model=4 does not divide:jaxid.errors.JaxidWarning")
def test_what_a_device_holds() -> None:
    checkpoint = open_checkpoint(fixtures.folder(CASE))
    for axes in (meshes.ONE, Axes(4, 1), Axes(2, 2), Axes(1, 4)):
        model = load(fixtures.folder(CASE), mesh=str(axes))
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model.parameters))
        assert checkpoint.held(axes) == held
    assert checkpoint.held(Axes(1, 4)) < 0.5 * checkpoint.held(meshes.ONE)
