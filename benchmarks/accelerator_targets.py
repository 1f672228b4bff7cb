"""Accelerators that programs are compiled for without being there: compilers, meshes and placement of arrays."""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxid import meshes
from jaxid.devices import DEVICES, Device

# Before JAX looks for devices: it is to use none, and libtpu is to ask no server where it runs, and to need no lock.
jax.config.update("jax_platforms", "cpu")
for _name, _value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(_name, _value)

_GPU = """gpu_device_info {{threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {units}
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
shared_memory_per_block_optin: {most_shared} cuda_compute_capability {{ major: {major} minor: {minor} }}
registers_per_core_limit: 65536 registers_per_block_limit: 65536}} platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{text}" """

_GPUS: Mapping[str, Mapping[str, object]] = {
    "h100": {
        "text": "NVIDIA H100 80GB HBM3",
        "major": 9,
        "minor": 0,
        "cores": 132,
        "units": 128,
        "threads": 2048,
        "shared": 233472,
        "most_shared": 232448,
        "cache": 52428800,
        "clock": 1.98,
    },
    "a100-40": {
        "text": "NVIDIA A100-SXM4-40GB",
        "major": 8,
        "minor": 0,
        "cores": 108,
        "units": 64,
        "threads": 2048,
        "shared": 167936,
        "most_shared": 166912,
        "cache": 41943040,
        "clock": 1.41,
    },
    "rtx4090": {
        "text": "NVIDIA GeForce RTX 4090",
        "major": 8,
        "minor": 9,
        "cores": 128,
        "units": 128,
        "threads": 1536,
        "shared": 102400,
        "most_shared": 101376,
        "cache": 75497472,
        "clock": 2.52,
    },
}

_TPUS: Mapping[str, Mapping[int, str]] = {
    "v5e": {1: "v5e:2x2", 2: "v5e:2x2", 4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4", 64: "v5e:8x8"},
    "v5p": {1: "v5p:2x2x1", 2: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2", 64: "v5p:4x4x4"},
}
"""Slices by the number of their chips; of the smallest one, single chips and pairs may be used."""

_MOST = 16
"""The most chips that share a copy of a model, where their number is not given."""

_HOST = 8
"""GPUs of a host."""

TARGETS = (*_GPUS, *_TPUS)
"""Names of the accelerators, as in `jaxid.devices`."""

# Without them the compiler looks for tilings of Triton's products on the GPU that is not there. They become calls of
# cuBLAS.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0},
    "tpu": {},
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips of one kind that share a program.

    Attributes:
        device: one chip.
        model: number of chips that share a copy of the model.
        data: number of copies, among which prompts are divided.
    """

    device: Device
    model: int = 1
    data: int = 1

    @property
    def name(self) -> str:
        """Name of the accelerator."""
        return self.device.name

    @property
    def chips(self) -> int:
        """Number of all chips."""
        return self.data * self.model

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The chips, as the library arranges them."""
        return meshes.mesh(self.data, self.model, devices(self.name, self.chips))

    @property
    def shared(self) -> Mesh | None:
        """The mesh as the library knows it: None for a single chip."""
        return self.mesh if self.chips > 1 else None

    def array(self, leaf: Any, axis: int | None = None) -> jax.ShapeDtypeStruct:
        """An array's shape on the chips: split along an axis over "model", or the same on all of them."""
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, meshes.MODEL)
        return self.placed(leaf, spec)

    def placed(self, leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        """An array's shape on the chips."""
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec))

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Within it, programs are traced as on these chips, see `jaxid.interp.programs`."""
        return contextlib.nullcontext() if self.shared is None else jax.set_mesh(self.mesh)

    def traced(self) -> contextlib.AbstractContextManager[object]:
        """The same within another trace, which no longer allows a mesh of devices."""
        mesh = self.shared
        return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)

    def compile(self, function: Any, *args: PyTree, **options: PyTree) -> Any:
        """A jitted function, compiled for these chips."""
        with self.context():
            lowered = function.lower(*args, **options)
        return lowered.compile(compiler_options=dict(_OPTIONS[self.device.platform]))


@functools.cache
def devices(name: str, chips: int) -> list[Any]:
    """Chips of one kind, at least so many; they need not be there."""
    device = DEVICES[name]
    if device.platform == "gpu":
        text = _GPU.format(**_GPUS[name], memory=device.memory, bandwidth=int(device.bandwidth))
        hosts = -(-chips // _HOST)
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            topology=f"{hosts}x1x{min(chips, _HOST)}",
            target_config=text,
        )
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name=_TPUS[name][chips])
    return found.devices


def missing(name: str) -> str | None:
    """What has to be installed to compile for an accelerator; None if its compiler is there."""
    try:
        devices(name, 1)
    except Exception as error:  # whatever a plugin that is absent or too old raises
        extra = f"{DEVICES[name].platform}-compile"
        return (
            f'no compiler for {name}: install the extra, pip install -e ".[{extra}]" ({type(error).__name__}: {error})'
        )
    return None


def named(name: str) -> tuple[str, int, int | None]:
    """The accelerator of a name such as v5e, v5e-8 or v5e-2x4, the copies of the model, and the chips that share one.

    The number of these is None where the name does not say it.
    """
    known = next((one for one in TARGETS if name == one or name.startswith(f"{one}-")), "")
    count = re.fullmatch(r"(?:-(?:(\d+)x)?(\d+))?", name.removeprefix(known))
    if not known or count is None:
        raise SystemExit(f"{name!r} is not one of {', '.join(TARGETS)}, or one with a number of chips, such as v5e-8")
    return known, int(count[1] or 1), int(count[2]) if count[2] else None


def target(name: str, needed: Callable[[Target], float]) -> Target:
    """The chips of a name.

    Args:
        name: see `named`. Where it says no number, the fewest TPUs with room share a copy of the model, and one GPU in
            any case.
        needed: bytes that each of some chips needs.
    """
    known, data, model = named(name)
    device = DEVICES[known]
    if model is not None:
        return Target(device, model, data)
    if device.platform == "gpu":
        return Target(device)
    several = [Target(device, chips) for chips in _TPUS[known] if chips <= _MOST]
    return next((one for one in several if needed(one) <= device.memory), several[-1])
