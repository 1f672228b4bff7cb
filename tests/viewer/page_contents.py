"""Contents of pages, made by hand, and what a page holds, decoded as the browser does."""

import base64
import gzip
import json
import re
from typing import Any

import numpy as np

from jaxid.viewer.content import Geometry, Item, Maps, Plane, Run, Texts, Value

CONDITIONS = ("belief", "noise")


def picture(index: int) -> np.ndarray:
    """A small picture of its own."""
    return np.random.default_rng(index).integers(0, 255, (24, 24, 3), np.uint8)


def plane(layers: int = 5) -> Plane:
    """A grid that turns by 20 degrees a layer."""
    x, y = np.meshgrid(np.arange(4) - 1.5, np.arange(4) - 1.5, indexing="ij")
    grid = np.stack([x.ravel(), y.ravel()], axis=-1)
    angles = np.radians(20 * np.arange(layers))
    turns = np.array([[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in angles])
    points = np.einsum("lij,pj->lpi", turns, grid)
    place = np.arange(16).reshape(4, 4)
    return Plane(
        layers=range(layers),
        groups=["all objects", "star"],
        labels=[f"{a},{b}" for a in range(4) for b in range(4)],
        points=np.stack([points, 2 * points], axis=1).astype(np.float32),
        lines=[*place.tolist(), *place.T.tolist()],
        axes=("x", "y"),
    )


def swap(count: int = 6, layers: int = 5, *, pictures: bool = True) -> Run:
    """A run over conditions and layers: item k's answer changes by IDs from layer 2 on if k is even."""
    rng = np.random.default_rng(3)
    before = np.log(np.stack([np.full(count, 0.9), np.full(count, 0.05)], -1))[:, None, None]
    after = np.broadcast_to(before, (count, 2, layers, 2)).copy()
    after[::2, 0, 2:] = after[::2, 0, 2:, ::-1]
    after += rng.uniform(-0.01, 0.01, after.shape)
    changed = (after[..., 0] < after[..., 1]).astype(np.float32)
    items = [
        Item(
            key=f"item-{k}",
            words=("left", "right"),
            truth=k % 2,
            question=f"Is the star to the left or right of the fish {k}?",
            tokens=("<s>", "[36 picture tokens]", "Is", "the", "star", "?"),
            edited={"": [4], "noise": [2]},
            picture=picture(k % 50) if pictures else None,
        )
        for k in range(count)
    ]
    return Run(
        title="belief-swap · test",
        about={"model": "tiny"},
        items=items,
        axes={"condition": CONDITIONS, "layer": range(layers)},
        before=before,
        after=after,
        values=[Value(name="belief swapped", values=changed, signed=False)],
        texts=Texts(before=np.full(count, "left"), after=np.where(changed > 0, "right", "left")),
        plane=plane(layers),
    )


def steering(count: int = 4) -> Run:
    """A run over layers and cells, in which the effect at a cell is 10 x + y + layer / 10 of the item's number."""
    layer, x, y = np.meshgrid(np.arange(3), np.arange(4), np.arange(4), indexing="ij")
    effect = (10 * x + y + layer / 10)[None] * np.arange(1, count + 1)[:, None, None, None]
    before = np.full((count, 1, 1, 1, 2), -1.0)
    after = np.stack([before[..., 0] + effect, np.broadcast_to(before[..., 1], effect.shape)], axis=-1)
    items = [Item(key=f"cell-{k}", words=("left", "right")) for k in range(count)]
    axes = {"layer": range(3), "x": range(4), "y": range(4)}
    return Run(title="steer · test", items=items, axes=axes, before=before, after=after)


def maps() -> Maps:
    """Two captions of a picture; the map of token t has its maximum at patch t."""
    found = np.zeros((2, 3, 3, 4), np.float32)
    for token in range(4):
        found[:, token // 3, token % 3, token] = 1 + token
    words = [(0, "a", False), (1, "star", False), (2, "above", True), (3, "fish", False)]
    return Maps(
        title="dense maps · test",
        picture=picture(7).repeat(10, 0).repeat(10, 1),
        captions=["a star above fish", "a fish above star"],
        tokens=[words, words],
        maps=found,
        scores=np.array([0.5, 1.5]),
        cosines=np.array([0.3, 0.2]),
    )


def geometry() -> Geometry:
    """IDs on their own."""
    return Geometry(title="spatial IDs of tiny", plane=plane())


def part(page: str, name: str) -> str:
    """The text of a script element."""
    found = re.search(rf'<script type="[^"]+" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return found[1]


def manifest(page: str) -> dict[str, Any]:
    """The page's manifest."""
    return json.loads(part(page, "manifest"))


def array(page: str, index: int) -> np.ndarray:
    """One of the page's arrays."""
    block = gzip.decompress(base64.b64decode(part(page, "arrays")))
    record = manifest(page)["arrays"][index]
    count = int(np.prod(record["shape"]))
    if record["kind"] != "fixed":
        kind = {"integer": "<i4", "float": "<f4"}[record["kind"]]
        return np.frombuffer(block, kind, count, record["offset"]).reshape(record["shape"])
    stored = np.frombuffer(block, "<i2", count, record["offset"]).astype(np.float64)
    values = record["low"] + (stored + 32_767) * record["step"]
    return np.where(stored == -32_768, np.nan, values).reshape(record["shape"])
