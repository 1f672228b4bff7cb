"""Writes contents as one HTML page that needs no network: data, pictures, scripts and styles are in it."""

import base64
import dataclasses
import gzip
import html
import importlib.resources
import io as bytes_io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxid import io
from jaxid.errors import InputError
from jaxid.prompts.pictures import Picture, open_picture
from jaxid.viewer.content import Content, Geometry, Item, Maps, Plane, Run

PICTURE_SIZE = 336
"""Longest side of an embedded picture, in pixels, by default."""

_SMALL = 128
"""Pictures up to this side are embedded without loss."""

_WHOLE = 262_144
"""Arrays of up to so many numbers are stored as they are, in single precision."""

_LEVELS = 65_534
_MISSING = -32_768


def write_page(path: str | Path, contents: Sequence[Content], *, picture_size: int = PICTURE_SIZE) -> Path:
    """Writes a page of runs, IDs and dense maps.

    Arrays of more than 262,144 numbers are rounded to 1/65,534 of their range.

    Args:
        path: the HTML file.
        contents: what it shows, in order.
        picture_size: longest side of the embedded pictures, in pixels.

    Raises:
        InputError: if there is nothing to show.
        OutputError: if the file cannot be written.
    """
    return io.write_text(path, page(contents, picture_size=picture_size))


def page(contents: Sequence[Content], *, picture_size: int = PICTURE_SIZE) -> str:
    """The page that `write_page` writes.

    Raises:
        InputError: if there is nothing to show.
    """
    if not contents:
        raise InputError("there is nothing to show; give at least one run.")
    packed = _Packed(picture_size)
    manifest = {"contents": [packed.content(one) for one in contents], "arrays": packed.arrays}
    assets = importlib.resources.files("jaxid.viewer") / "assets"

    def asset(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    parts = {
        "title": html.escape(contents[0].title if len(contents) == 1 else f"{len(contents)} runs"),
        "style": asset("viewer.css"),
        "plotly": asset("plotly-cartesian.min.js"),
        "script": "\n".join(asset(f"{name}.js") for name in ("data", "plots", "viewer")),
        "manifest": _in_script(manifest),
        "pictures": _in_script(packed.pictures),
        "arrays": base64.b64encode(gzip.compress(bytes(packed.data), mtime=0)).decode(),
    }
    # Even pieces are the template's own, odd ones the names of parts.
    pieces = re.split(r"\{\{(\w+)\}\}", asset("viewer.html"))
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


@dataclasses.dataclass(frozen=True)
class Page:
    """A page as notebooks show it.

    Attributes:
        contents: what it shows.
        height: of the frame, in pixels.
    """

    contents: tuple[Content, ...]
    height: int = 900

    def save(self, path: str | Path) -> Path:
        """Writes the page to a file."""
        return write_page(path, self.contents)

    def _repr_html_(self) -> str:
        source = html.escape(page(self.contents), quote=True)
        style = f"width:100%;height:{self.height}px;border:0"
        return f'<iframe srcdoc="{source}" style="{style}" title="jaxid view"></iframe>'

    def __repr__(self) -> str:
        return f"Page({', '.join(one.title for one in self.contents)})"


def _in_script(value: object) -> str:
    """JSON that ends no script element and opens no comment."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


class _Packed:
    """Everything of a page that is not its program: arrays in one block, pictures once each."""

    def __init__(self, picture_size: int):
        self.picture_size = picture_size
        self.arrays: list[dict[str, Any]] = []
        self.data = bytearray()
        self.pictures: list[str] = []
        self._known: dict[str, int] = {}

    def array(self, values: Shaped[np.ndarray, "..."]) -> int:
        """Stores an array; its index among the arrays."""
        record: dict[str, Any] = {"shape": list(values.shape), "offset": len(self.data)}
        if values.dtype.kind == "f" and values.size <= _WHOLE:
            values = values.astype("<f4")
            record |= {"kind": "float"}
        elif values.dtype.kind == "f":
            known = values[np.isfinite(values)]
            low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
            step = (high - low) / _LEVELS or 1.0
            scaled = (
                np.rint((np.where(np.isfinite(values), values, low).astype(np.float64) - low) / step) + _MISSING + 1
            )
            values = np.where(np.isfinite(values), scaled, _MISSING).astype("<i2")
            record |= {"kind": "fixed", "low": low, "step": step}
        else:
            values = values.astype("<i4")
            record |= {"kind": "integer"}
        self.data += values.tobytes() + bytes(-values.nbytes % 8)
        self.arrays.append(record)
        return len(self.arrays) - 1

    def picture(self, picture: Picture | None) -> int:
        """Embeds a picture, once; its index, -1 for none."""
        if picture is None:
            return -1
        opened = open_picture(picture)
        opened.thumbnail((self.picture_size, self.picture_size))
        small, buffer = max(opened.size) <= _SMALL, bytes_io.BytesIO()
        opened.save(buffer, "PNG") if small else opened.save(buffer, "JPEG", quality=85)
        uri = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if uri not in self._known:
            self._known[uri] = len(self.pictures)
            self.pictures.append(uri)
        return self._known[uri]

    def content(self, one: Content) -> dict[str, Any]:
        """A content for the manifest."""
        shared = {"title": one.title, "about": _pairs(one.about)}
        if isinstance(one, Run):
            return shared | {"kind": "run"} | self._run(one)
        if isinstance(one, Maps):
            return shared | {"kind": "maps"} | self._maps(one)
        assert isinstance(one, Geometry)
        return shared | {"kind": "ids", "plane": self._plane(one.plane)}

    def _run(self, run: Run) -> dict[str, Any]:
        texts = None
        if run.texts is not None:
            before, after = run.texts.before, run.texts.after
            distinct, indices = np.unique(np.concatenate([before, after.ravel()]), return_inverse=True)
            texts = {
                "distinct": distinct.tolist(),
                "before": self.array(indices[: len(before)]),
                "after": self.array(indices[len(before) :].reshape(after.shape)),
            }
        return {
            "axes": [[name, [str(entry) for entry in entries]] for name, entries in run.axes.items()],
            "items": self._items(run.items),
            "before": self.array(run.before),
            "after": None if run.after is None else self.array(run.after),
            "values": [
                {"name": value.name, "unit": value.unit, "signed": value.signed, "array": self.array(value.values)}
                for value in run.values
            ],
            "texts": texts,
            "plane": None if run.plane is None else self._plane(run.plane),
        }

    def _items(self, items: Sequence[Item]) -> dict[str, Any]:
        words = list(dict.fromkeys(item.words for item in items))
        tokens = list(dict.fromkeys(token for item in items for token in item.tokens))
        index = {token: place for place, token in enumerate(tokens)}
        return {
            "key": [item.key for item in items],
            "question": [item.question for item in items],
            "wordPairs": words,
            "words": [words.index(item.words) for item in items],
            "truth": [item.truth for item in items],
            "vocabulary": tokens,
            "tokens": [[index[token] for token in item.tokens] for item in items],
            "edited": [{label: list(places) for label, places in item.edited.items()} for item in items],
            "picture": [self.picture(item.picture) for item in items],
        }

    def _plane(self, plane: Plane) -> dict[str, Any]:
        return {
            "layers": [str(layer) for layer in plane.layers],
            "groups": list(plane.groups),
            "labels": list(plane.labels),
            "points": self.array(np.asarray(plane.points)),
            "lines": [list(line) for line in plane.lines],
            "axes": list(plane.axes),
        }

    def _maps(self, maps: Maps) -> dict[str, Any]:
        return {
            "picture": self.picture(maps.picture),
            "captions": list(maps.captions),
            "tokens": [[list(token) for token in row] for row in maps.tokens],
            "maps": self.array(np.asarray(maps.maps)),
            "scores": [float(value) for value in maps.scores],
            "cosines": [float(value) for value in maps.cosines],
        }


def _pairs(about: Mapping[str, str]) -> list[list[str]]:
    return [[name, text] for name, text in about.items()]
