"""Devices: published peaks, and what is read from the device that JAX uses."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxid import devices
from jaxid.devices import DEVICES, GIB, device, free_memory, supposed, this
from jaxid.errors import InputError


def use(monkeypatch: pytest.MonkeyPatch, platform: str, kind: str, statistics: dict[str, int] | None) -> None:
    """Lets JAX have one device of a kind."""
    found = SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: statistics)
    monkeypatch.setattr(jax, "local_devices", lambda: [found])


@pytest.mark.parametrize(
    ("platform", "kind", "name"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
        ("gpu", "NVIDIA H200", "h200"),
        ("gpu", "NVIDIA A100-SXM4-40GB", "a100-40"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "a100-80"),
        ("gpu", "NVIDIA A100 80GB PCIe", "a100-80"),
        ("gpu", "NVIDIA GeForce RTX 4090", "rtx4090"),
        ("tpu", "TPU v5 lite", "v5e"),
        ("tpu", "TPU v5e", "v5e"),
        ("tpu", "TPU v5p", "v5p"),
        ("tpu", "TPU v5", "v5p"),
        ("tpu", "TPU v6 lite", "v6e"),
    ],
)
def test_known_kinds(platform: str, kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, platform, kind, {"bytes_limit": 7 * GIB, "bytes_in_use": 2 * GIB})
    found, known = this(), DEVICES[name]
    assert (found.name, found.flops, found.bandwidth, found.estimated) == (name, known.flops, known.bandwidth, False)
    assert found.memory == 7 * GIB and free_memory() == 5 * GIB  # as the device says, not the table
    use(monkeypatch, platform, kind, None)
    assert this() == known


def test_an_unknown_kind_is_a_stated_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "gpu", "NVIDIA B300", {"bytes_limit": 250 * GIB})
    found = this()
    assert (found.name, found.memory, found.estimated) == ("NVIDIA B300", 250 * GIB, True)
    assert found.flops == DEVICES["rtx4090"].flops


def test_this_machine() -> None:
    found = this()
    assert (found.platform, found.estimated) == ("cpu", True) and found.memory > GIB
    assert 0 < free_memory() <= found.memory
    assert device("this") == found


def test_the_roofline() -> None:
    h100 = device("h100")
    assert h100.seconds(989.4e12, 1e12) == 1.0 and h100.seconds(1e12, 2 * 3.35e12) == 2.0
    assert h100.tokens_per_weight_read(2) == pytest.approx(295.3, abs=0.1)


def test_tables_are_of_the_right_sizes() -> None:
    """Gigabytes as they are sold, within the share that drivers keep."""
    sold = {"h100": 80, "h200": 141, "a100-40": 40, "a100-80": 80, "rtx4090": 24, "v5e": 16, "v5p": 95, "v6e": 32}
    for name, size in sold.items():
        assert 0.95 < DEVICES[name].memory / (size * 2**30) < 1.01, name
        assert 150 < DEVICES[name].flops / DEVICES[name].bandwidth < 600, name


def test_another_device_can_be_supposed() -> None:
    with supposed(DEVICES["v5e"]):
        assert this() == DEVICES["v5e"]
    assert this().platform == "cpu"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"'h99' is not known; known are this, h100, "):
        device("h99")


def test_systems_that_do_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> Any:
        raise ValueError(name)

    monkeypatch.setattr(devices.os, "sysconf", unknown)
    assert free_memory() == 4 * GIB


def test_links_of_chips() -> None:
    """A ring has all links to a switch, and two of those to neighbours."""
    rings = {name: known.links.ring / 1e9 for name, known in DEVICES.items() if known.links is not None}
    assert (rings["h100"], rings["a100-40"], rings["rtx4090"]) == (450, 300, 32)
    assert (rings["v5e"], rings["v5p"], rings["v6e"]) == (100, 200, 224)
    assert {*DEVICES} - {*rings} == {"cpu"}
