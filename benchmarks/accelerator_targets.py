"""Accelerators that programs are compiled for without being there: compilers, meshes and placement of arrays."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

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
    "v5e": {1: "v5e:2x2", 4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4"},
    "v5p": {1: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2"},
}
"""Slices by the number of their chips; of the smallest one a single chip may be used."""

TARGETS = (*_GPUS, *_TPUS)
"""Names of the accelerators, as in `jaxid.devices`."""

# Without them the compiler looks for tilings of Triton's products on the GPU that is not there. They become calls of
# cuBLAS.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0},
    "tpu": {},
}

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips of one kind that share a program.

    Attributes:
        device: one chip.
        chips: number of them.
    """

    device: Device
    chips: int = 1

    @property
    def name(self) -> str:
        """Name of the accelerator."""
        return self.device.name

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The chips, along one axis "model"."""
        return Mesh(np.array(devices(self.name, self.chips)[: self.chips]), ("model",))

    def array(self, leaf: Any, axis: int | None = None) -> jax.ShapeDtypeStruct:
        """An array's shape on the chips: split along an axis, or the same on all of them."""
        spec = [None] * len(leaf.shape)
        if axis is not None and self.chips > 1:
            spec[axis] = "model"  # pyright: ignore[reportArgumentType, reportCallIssue]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, PartitionSpec(*spec)))

    def divides(self, length: int) -> bool:
        """Whether the chips can share an axis of this length."""
        return self.chips > 1 and length % self.chips == 0

    def compile(self, function: Any, *args: PyTree, **options: PyTree) -> Any:
        """A jitted function, compiled for these chips."""
        lowered = function.lower(*args, **options)
        return lowered.compile(compiler_options=dict(_OPTIONS[self.device.platform]))


@functools.cache
def devices(name: str, chips: int) -> list[Any]:
    """Chips of one kind that share a host; they need not be there."""
    device = DEVICES[name]
    if device.platform == "gpu":
        text = _GPU.format(**_GPUS[name], memory=device.memory, bandwidth=int(device.bandwidth))
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology=f"1x1x{chips}", target_config=text
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


def target(name: str, needed: float) -> Target:
    """The fewest chips with room for a number of bytes; one GPU in any case."""
    device = DEVICES[name]
    if device.platform == "gpu":
        return Target(device)
    counts = [chips for chips in _TPUS[name] if chips * device.memory >= needed]
    return Target(device, min(counts, default=max(_TPUS[name])))


def split_axis(path: str, shape: tuple[int, ...], target: Target) -> int | None:
    """The axis along which the chips share a parameter: the outputs of maps into heads and MLPs, the inputs of others.

    So a block needs two sums over the chips, after its attention and after its MLP.
    """
    if len(shape) < 2 or math.prod(shape) < 1_000_000:
        return None
    inward = path.endswith((".out", ".down.kernel"))
    if path.endswith("embedding"):  # rows of the table; the columns of the map to the vocabulary
        axes = [0] if not path.endswith("unembedding") else [len(shape) - 1]
    elif len(shape) == 4:  # heads are an axis of their own
        axes = [1] if inward else [2]
    else:
        axes = [len(shape) - 2] if inward else [len(shape) - 1]
    return next((axis for axis in axes if target.divides(shape[axis])), None)
