"""Loading onto a mesh: the same numbers and the same fingerprint, each part read by those who hold it, and no more."""

import functools
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import fixtures
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from families import QUICK, Case, over
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.torch import save_file

from jaxid import meshes
from jaxid.checkpoints import sharding, streaming
from jaxid.checkpoints.loading import abstract_parameters, load, open_checkpoint
from jaxid.checkpoints.tensors import TensorFolder, flatten, read_parameters
from jaxid.errors import CheckpointError
from jaxid.nn.keys import LINEAR, Key

MESHES = ("data=4,model=2", "data=2,model=4")


@over((*QUICK, "llava-plain"), among=(*QUICK, "llava-plain"))
def test_parameters_on_a_mesh_are_those_of_one_device(case: Case) -> None:
    """Of one model of each family; `test_passes_on_mesh.py` loads further ones."""
    alone = fixtures.model(case)
    definition, abstract = abstract_parameters(open_checkpoint(fixtures.folder(case)).kind, alone.config)
    for text in MESHES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tiny towers have few heads
            found = load(fixtures.folder(case), mesh=text)
        assert found.fingerprint == alone.fingerprint and found.mesh == meshes.mesh(*meshes.sizes(text))
        assert found.config == alone.config
        wanted = sharding.layout(definition, abstract, meshes.mesh(*meshes.sizes(text))).shardings
        leaves, expected = flatten(found.parameters), flatten(alone.parameters)
        assert leaves.keys() == expected.keys()
        divided = 0
        for path, leaf in leaves.items():
            assert leaf.sharding == wanted[path], path
            divided += not leaf.sharding.is_fully_replicated
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
        assert divided >= 8


# --- tensors by themselves ------------------------------------------------------------------------------------------

SHAPES = {
    "columns": (3, 512, 6000),
    "rows": (3, 6000, 512),
    "layers": (4, 8, 6),
    "both": (600, 800),
    "whole": (7, 5),
    "number": (),
    "fused": (512, 400),
}
SPECS = {
    "columns": PartitionSpec(None, None, "model"),
    "rows": PartitionSpec(None, "model", None),
    "layers": PartitionSpec("data", None, None),
    "both": PartitionSpec("model", "data"),
    "fused": PartitionSpec("model", None),
}
KEYS = [
    Key("{layer}.columns", "columns", LINEAR),
    Key("{layer}.rows", "rows", LINEAR),
    Key("{layer}.layers", "layers", layers=(1, 0, 3, 2), rows=(0, 1, 2, 3)),
    Key("both", "both"),
    Key("whole", "whole", LINEAR),
    Key("number", "number"),
    Key("fused", "fused", "d (h e) -> (e h) d", {"h": 8}, part=(1, 2)),  # is no view
    Key("fused", "other", part=(0, 2)),
]
SHAPES["other"] = (400, 512)


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """Tensors of all the keys above."""
    shapes = {"fused": (800, 512)}
    for key in KEYS[:-2]:
        for name, row in key.tensors(SHAPES[key.target]):
            parameter = np.broadcast_to(np.zeros((), np.int8), SHAPES[key.target])
            shapes[name] = key.to_checkpoint(parameter if row is None else parameter[row]).shape
    noise = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TensorFolder:
    """A folder of them."""
    folder = tmp_path_factory.mktemp("tensors")
    save_file(weights(), folder / "model.safetensors")
    return TensorFolder(folder)


@pytest.fixture(scope="module")
def alone(files: TensorFolder) -> tuple[dict[str, Any], str]:
    """Their parameters on one device, and the digest."""
    return read_parameters(files, abstract(), KEYS)


def damaged(folder: Path, number: str) -> TensorFolder:
    """A folder of them with one number replaced."""
    changed = weights() | {"1.columns": weights()["1.columns"].clone()}
    changed["1.columns"][-1, -1] = float(number)
    folder.mkdir()
    save_file(changed, folder / "model.safetensors")
    return TensorFolder(folder)


def places(data: int, model: int) -> dict[str, NamedSharding]:
    mesh = meshes.mesh(data, model)
    return {path: NamedSharding(mesh, SPECS.get(path, PartitionSpec())) for path in SHAPES}


def abstract() -> dict[str, Any]:
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}


@pytest.fixture(params=[1 << 30, 1 << 20, 1])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that the host holds on their way to an accelerator."""
    monkeypatch.setattr(streaming, "_HELD_BYTES", request.param)
    monkeypatch.setattr(streaming, "_own_memory", lambda device: False)
    return request.param


@pytest.mark.parametrize("axes", [(4, 2), (2, 4), (1, 8), (1, 1)], ids=str)
def test_every_way_to_cut(
    files: TensorFolder, alone: tuple[dict[str, Any], str], axes: tuple[int, int], held: int
) -> None:
    """Along layers, rows and columns, over pieces that they cross; a few parts at a time as on accelerators."""
    whole, digest = alone
    found, same = read_parameters(files, abstract(), KEYS, shardings=places(*axes))
    assert same == digest
    for path, expected in whole.items():
        assert found[path].sharding == places(*axes)[path]
        for one in found[path].addressable_shards:
            np.testing.assert_array_equal(one.data, np.asarray(expected)[one.index], err_msg=path)


@pytest.mark.parametrize("axes", [(4, 2), (1, 1)], ids=str)
def test_replicas_are_read_once(
    files: TensorFolder, monkeypatch: pytest.MonkeyPatch, axes: tuple[int, int], held: int
) -> None:
    copied, looked, made = [], [], []
    copy, look, empty = streaming.copy, streaming.look, streaming.empty
    monkeypatch.setattr(streaming, "copy", lambda target, source: (copied.append(source.size), copy(target, source))[1])
    monkeypatch.setattr(streaming, "look", lambda part: (looked.append(part.size), look(part))[1])
    monkeypatch.setattr(streaming, "empty", lambda *given: (made.append(empty(*given)), made[-1])[1])
    read_parameters(files, abstract(), KEYS, shardings=places(*axes))
    numbers = [int(np.prod(shape)) for shape in SHAPES.values()]
    assert sum(copied) == sum(looked) == sum(array.size for array in made) == sum(numbers)
    assert max(array.size for array in made) == max(numbers) // axes[1]


def test_damage_is_seen_on_a_mesh(tmp_path: Path, held: int) -> None:
    files = damaged(tmp_path / "nan", "nan")
    with pytest.raises(CheckpointError, match=r"holds NaN or infinite numbers in tensor '1\.columns'; copy"):
        read_parameters(files, abstract(), KEYS, shardings=places(2, 4))
    files = damaged(tmp_path / "large", "7e4")
    read_parameters(files, abstract(), KEYS, shardings=places(2, 4))
    with pytest.raises(CheckpointError, match=r"numbers too large for float16 in tensor '1\.columns'; load"):
        read_parameters(files, abstract(), KEYS, shardings=places(2, 4), dtype=np.float16)


# --- processes and memory -------------------------------------------------------------------------------------------

BIG = {"a": (4, 4096, 4000), "b": (4, 4000, 4096), "head": (12000, 2000), "norm": (4, 4096)}
BIG_SPECS = {"a": (None, None, "model"), "b": (None, "model", None), "head": ("model", None), "norm": ()}

MEASURE = """
import json, sys
from pathlib import Path
import jax, ml_dtypes, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxid import meshes
from jaxid.checkpoints import streaming
from jaxid.checkpoints.tensors import TensorFolder, read_parameters
from jaxid.nn.keys import LINEAR, Key

folder, shapes, specs, data, model, processes, process, address = json.loads(sys.argv[1])
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, process, initialization_timeout=60)

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

copied, looked, copy, look = [], [], streaming.copy, streaming.look
streaming.copy = lambda target, source: (copied.append(source.nbytes), copy(target, source))[1]
streaming.look = lambda part: (looked.append(part.nbytes), look(part))[1]
read, release = [], TensorFolder.release
TensorFolder.release = lambda self, key, part: (read.append(part.nbytes), release(self, key, part))[1]
mesh = meshes.mesh(data, model)
jax.block_until_ready(jax.device_put(np.zeros(8), jax.local_devices()[0]))
abstract = {path: jax.ShapeDtypeStruct(tuple(shape), ml_dtypes.bfloat16) for path, shape in shapes.items()}
places = {path: NamedSharding(mesh, PartitionSpec(*spec)) for path, spec in specs.items()}
keys = [Key("{layer}.a", "a", LINEAR), Key("{layer}.b", "b", LINEAR), Key("head", "head"), Key("{layer}.norm", "norm")]
files, before = TensorFolder(Path(folder)), memory("VmRSS")
made, digest = read_parameters(files, abstract, keys, dtype=ml_dtypes.bfloat16, shardings=places)
found = {"grown": memory("VmHWM") - before, "digest": digest, "copied": sum(copied), "looked": sum(looked)}
found["read"] = sum(read)
shards = [shard for leaf in made.values() for shard in leaf.addressable_shards]
held = {shard.data.unsafe_buffer_pointer(): shard.data.nbytes for shard in shards}
found["held"], wrong = sum(held.values()), []
for key in keys:
    for name, row in key.tensors(shapes[key.target]):
        expected = key.to_parameter(files.read(name))
        for shard in made[key.target].addressable_shards:
            own, index = (shard.data, shard.index) if row is None else (shard.data[row], shard.index[1:])
            if not np.array_equal(np.asarray(own).view("u2"), expected[index].view("u2")):
                wrong.append(name)
print(json.dumps(found | {"wrong": wrong}))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """310 MB of tensors."""
    folder = tmp_path_factory.mktemp("big")
    bits = np.random.default_rng(0).integers(0, 0x7F80, 4096 * 4000 + 4, np.uint16)
    block = torch.from_numpy(bits).view(torch.bfloat16)
    weights = {}
    for layer in range(4):
        weights[f"{layer}.a"] = block[layer : layer + 4096 * 4000].reshape(4000, 4096).clone()
        weights[f"{layer}.b"] = block[4 - layer : 4 - layer + 4096 * 4000].reshape(4096, 4000).clone()
        weights[f"{layer}.norm"] = block[layer : layer + 4096].clone()
    weights["head"] = torch.cat([block, block])[: 12000 * 2000].reshape(12000, 2000)
    save_file(weights, folder / "model.safetensors")
    return folder


def measured(folder: Path, data: int, model: int, processes: int = 1) -> list[dict[str, Any]]:
    """What every process tells of loading the tensors onto eight devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={8 // processes}"
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                MEASURE,
                json.dumps([str(folder), BIG, BIG_SPECS, data, model, processes, process, address]),
            ],
            stdout=subprocess.PIPE,
            env=os.environ | {"XLA_FLAGS": flags},
        )
        for process in range(processes)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def digest_on_one_device(folder: Path) -> str:
    shapes = {path: jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16) for path, shape in BIG.items()}
    keys = [Key(f"{{layer}}.{name}", name, LINEAR) for name in "ab"] + [Key("{layer}.norm", "norm")]
    return read_parameters(TensorFolder(folder), shapes, [*keys, Key("head", "head")], dtype=ml_dtypes.bfloat16)[1]


def test_two_processes_read_what_they_hold(big: Path) -> None:
    """A model over four devices of each: neither reads the other's part for its parameters, nor holds more memory."""
    size = sum(2 * int(np.prod(shape)) for shape in BIG.values())
    found = measured(big, 1, 8, processes=2)
    for one in found:
        assert not one["wrong"]
        assert one["copied"] == one["held"] and 0.5 * size <= one["held"] <= 0.501 * size
        assert 0.4 * size < one["looked"] < 0.6 * size
        assert one["grown"] <= 1.15 * one["held"] + (16 << 20), one
    assert sum(one["looked"] for one in found) == size
    # Of maps back, every piece has something for each device, and so have the pieces at borders. All else is read once.
    crossed = 2 * int(np.prod(BIG["b"]))
    assert sum(one["read"] for one in found) <= 2 * crossed + 1.3 * (size - crossed)
    assert {one["digest"] for one in found} == {digest_on_one_device(big)}


@pytest.mark.slow
def test_a_mesh_needs_little_more_memory_than_its_shards(big: Path) -> None:
    size = sum(2 * int(np.prod(shape)) for shape in BIG.values())
    (found,) = measured(big, 4, 2)
    assert not found["wrong"]
    assert found["copied"] == found["held"] == size  # devices of a CPU share the memory of replicas
    assert size <= found["grown"] + (16 << 20) and found["grown"] <= 1.15 * size + (16 << 20), found
