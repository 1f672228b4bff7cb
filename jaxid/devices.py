"""Devices: how much memory they have, and how fast they compute and read it.

The numbers are the makers' peaks for one chip, dense products of bfloat16; a program reaches a part of them.
"""

import contextlib
import contextvars
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from jaxid.errors import InputError

Platform = Literal["cpu", "gpu", "tpu"]


class Links(NamedTuple):
    """A chip's links to other chips of its host or slice.

    Attributes:
        count: number of links.
        bandwidth: peak bytes per second of a link in one direction.
        switched: whether they lead to a switch, and so all of them to every other chip; else to neighbours.
    """

    count: int
    bandwidth: float
    switched: bool

    @property
    def ring(self) -> float:
        """Peak bytes per second that a chip sends in a ring of chips: to both neighbours, by one link each."""
        return self.bandwidth * (self.count if self.switched else min(self.count, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One chip.

    Attributes:
        name: its name in `DEVICES`, or what JAX calls the kind.
        memory: bytes that a process can use.
        flops: peak floating-point operations per second, in bfloat16.
        bandwidth: peak bytes per second between memory and chip.
        platform: what JAX calls the platform.
        estimated: whether the peaks are estimates, as the maker's are not known.
        links: to other chips; None for CPUs, whose devices share a memory.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    platform: Platform
    estimated: bool = False
    links: Links | None = None

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for some operations and some moved bytes, which go on at the same time: the roofline."""
        return max(flops / self.flops, moved / self.bandwidth)

    def tokens_per_weight_read(self, width: int) -> float:
        """How many tokens a matrix product multiplies in the time in which it reads its weights.

        A weight of `width` bytes takes two operations for every token.
        """
        return self.flops * width / (2 * self.bandwidth)


GIB = 2**30

_CPU_CORE = {"flops": 80e9, "bandwidth": 5e9}
"""An estimate for one core: 32 operations a cycle at 2.5 GHz, and a core's share of two channels of memory."""

_NVLINK3, _NVLINK4 = Links(12, 25e9, switched=True), Links(18, 25e9, switched=True)
_PCIE4 = Links(16, 2e9, switched=True)
_ICI_V5E, _ICI_V5P, _ICI_V6E = (Links(*one, switched=False) for one in ((4, 50e9), (6, 100e9), (4, 112e9)))
"""What the makers publish: NVLink 600 and 900 GB/s in both directions together, PCIe 4.0 32 GB/s in each; the chips of
TPU slices 1,600, 4,800 and 3,584 Gbit/s over all links."""

DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        # NVIDIA's data sheets; memory is what CUDA reports, after the driver's and the error correction's share.
        Device(name="h100", memory=84_942_979_072, flops=989.4e12, bandwidth=3.35e12, platform="gpu", links=_NVLINK4),
        Device(name="h200", memory=int(139.8 * GIB), flops=989.4e12, bandwidth=4.8e12, platform="gpu", links=_NVLINK4),
        Device(
            name="a100-40", memory=int(39.4 * GIB), flops=312e12, bandwidth=1.555e12, platform="gpu", links=_NVLINK3
        ),
        Device(
            name="a100-80", memory=int(79.1 * GIB), flops=312e12, bandwidth=2.039e12, platform="gpu", links=_NVLINK3
        ),
        Device(
            name="rtx4090", memory=int(23.6 * GIB), flops=165.2e12, bandwidth=1.008e12, platform="gpu", links=_PCIE4
        ),
        # Google's documentation of Cloud TPU; memory is what XLA's compiler has for programs.
        Device(name="v5e", memory=int(15.75 * GIB), flops=197e12, bandwidth=819e9, platform="tpu", links=_ICI_V5E),
        Device(name="v5p", memory=int(95.74 * GIB), flops=459e12, bandwidth=2.765e12, platform="tpu", links=_ICI_V5P),
        Device(name="v6e", memory=int(31.25 * GIB), flops=918e12, bandwidth=1.64e12, platform="tpu", links=_ICI_V6E),
        Device(
            name="cpu",
            memory=16 * GIB,
            flops=8 * _CPU_CORE["flops"],
            bandwidth=8 * _CPU_CORE["bandwidth"],
            platform="cpu",
            estimated=True,
        ),
    )
}
"""Known devices by name; `cpu` stands for one with eight cores and 16 GiB."""

_KINDS: tuple[tuple[str, str], ...] = (
    (r"H200", "h200"),
    (r"H100", "h100"),
    (r"A100.*80GB", "a100-80"),
    (r"A100", "a100-40"),
    (r"RTX 4090", "rtx4090"),
    (r"TPU v5 ?(lite|e)", "v5e"),
    (r"TPU v5", "v5p"),
    (r"TPU v6", "v6e"),
)
"""Patterns of what JAX calls the kind of a device, the first that fits counts."""

_UNKNOWN = {"gpu": "rtx4090", "tpu": "v5e"}
"""The device whose peaks an unknown kind is assumed to have."""


def device(name: str) -> Device:
    """The device of a name; `this` is the one that JAX uses.

    Raises:
        InputError: for an unknown name.
    """
    if name == "this":
        return this()
    if name not in DEVICES:
        raise InputError(f"the device {name!r} is not known; known are this, {', '.join(DEVICES)}.")
    return DEVICES[name]


_SUPPOSED: contextvars.ContextVar[Device | None] = contextvars.ContextVar("supposed", default=None)


@contextlib.contextmanager
def supposed(device: Device) -> Iterator[None]:
    """Lets `this` answer with another device, so that programs can be planned for it."""
    token = _SUPPOSED.set(device)
    try:
        yield
    finally:
        _SUPPOSED.reset(token)


def this() -> Device:
    """The first of the devices that JAX uses, with the memory that it reports.

    Peaks come from the table. A CPU's, and those of a kind that is not in the table, are estimated: a CPU's from the
    number of cores, others as those of a small device of its platform.
    """
    planned = _SUPPOSED.get()
    if planned is not None:
        return planned
    import jax

    found = jax.local_devices()[0]
    limit = statistics(found).get("bytes_limit")
    if found.platform == "cpu":
        cores = os.cpu_count() or 1
        flops, bandwidth = (cores * _CPU_CORE[name] for name in ("flops", "bandwidth"))
        return dataclasses.replace(DEVICES["cpu"], memory=int(limit or _installed()), flops=flops, bandwidth=bandwidth)
    platform: Platform = "tpu" if found.platform == "tpu" else "gpu"
    name = next((name for pattern, name in _KINDS if re.search(pattern, found.device_kind)), None)
    known = DEVICES[name or _UNKNOWN[platform]]
    return dataclasses.replace(
        known, name=name or found.device_kind, memory=int(limit or known.memory), estimated=name is None
    )


def statistics(device: Any) -> Mapping[str, int]:
    """What JAX tells of a device's memory, if anything."""
    return device.memory_stats() or {}


def free_memory() -> int:
    """Free memory of the first device in bytes; 4 GiB if that is unknown."""
    import jax

    found = statistics(jax.local_devices()[0])
    if "bytes_limit" in found:
        return int(found["bytes_limit"] - found.get("bytes_in_use", 0))
    return _pages("SC_AVPHYS_PAGES")


def _installed() -> int:
    return _pages("SC_PHYS_PAGES")


def _pages(name: str) -> int:
    """The size of a count of the system's pages of memory, in bytes; 4 GiB if that is unknown."""
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 4 * GIB
