"""Randomly damaged copies of files for fuzz tests of readers."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np

ODD_VALUES: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, -5, 1.5, 2**31, 10**9, 10**20, 1e300, float("nan"), float("inf")),
    *("", "x", "²", "\x00", "../../etc/passwd", [], {}, [0], [None], ["x", 1], {"x": None}, [[[[]]]]),
)
"""Replacements of a value in a JSON file."""

ROOTS: tuple[bytes, ...] = (
    *(b"", b"null", b"[]", b"{}", b"0", b'"x"', b"[null]", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"\x00" * 64),
    *(b"[" * 20_000 + b"]" * 20_000, b'{"a":' * 20_000 + b"0" + b"}" * 20_000, b"NaN", b"<html></html>"),
)
"""Replacements of a whole JSON file."""


def damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """The data with some bytes flipped, removed, duplicated, zeroed, replaced or cut off."""
    if not data:
        return b"\x00"
    place, length = int(rng.integers(len(data))), int(rng.integers(1, 65))
    match rng.integers(6):
        case 0:
            return data[:place]
        case 1:
            changed = bytearray(data)
            for at in rng.integers(len(data), size=int(rng.integers(1, 9))):
                changed[at] ^= 1 << int(rng.integers(8))
            return bytes(changed)
        case 2:
            return data[:place] + data[place + length :]
        case 3:
            return data[: place + length] + data[place:]
        case 4:
            return data[:place] + bytes(length) + data[place + length :]
        case _:
            return data[:place] + rng.bytes(length) + data[place:]


def damaged_header(data: bytes, rng: np.random.Generator) -> bytes:
    """As `damaged_bytes`, but within the first kilobyte, where formats keep their header."""
    return damaged_bytes(data[:1024], rng) + data[1024:]


def damaged_json(data: bytes, rng: np.random.Generator) -> bytes:
    """JSON with a value replaced, a key renamed, removed or duplicated, or another root; sometimes not valid JSON."""
    kind = rng.random()
    if kind < 0.1:
        return damaged_bytes(data, rng)
    if kind < 0.2:
        return ROOTS[rng.integers(len(ROOTS))]
    tree = json.loads(data)
    places = [place for place in _places(tree) if place]
    if not places:
        return ROOTS[rng.integers(len(ROOTS))]
    # Values near the root matter most.
    weights = np.array([1 / len(place) ** 2 for place in places])
    place = places[rng.choice(len(places), p=weights / weights.sum())]
    parent = tree
    for step in place[:-1]:
        parent = parent[step]
    step = place[-1]
    if kind < 0.8:
        parent[step] = copy.deepcopy(ODD_VALUES[rng.integers(len(ODD_VALUES))])
    elif isinstance(parent, list):
        parent[step : step + 1] = [] if kind < 0.9 else [parent[step]] * 2
    elif kind < 0.9:
        del parent[step]
    else:
        parent[f"{step}x"] = parent.pop(step)
    return json.dumps(tree).encode()


def _places(tree: object, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a tree of dictionaries and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place, *(path for step, value in inner for path in _places(value, (*place, step)))]


def damaged_lines(data: bytes, rng: np.random.Generator) -> bytes:
    """A text table with a cell replaced or removed, a line removed, or an unclosed quote."""
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    lines = data.split(b"\n")
    row = int(rng.integers(len(lines)))
    cells = lines[row].split(b",")
    match rng.integers(4):
        case 0:
            cells[rng.integers(len(cells))] = json.dumps(ODD_VALUES[rng.integers(len(ODD_VALUES))]).encode()
            lines[row] = b",".join(cells)
        case 1:
            lines[row] = b",".join(cells[:-1])
        case 2:
            del lines[row]
        case _:
            lines[row] = b'"' + lines[row]
    return b"\n".join(lines)


def how(name: str) -> tuple[Callable[[bytes, np.random.Generator], bytes], ...]:
    """The functions that damage a file of that name."""
    if name.endswith(".json"):
        return (damaged_json,)
    if name.endswith((".csv", ".jsonl", ".jinja", ".txt")):
        return (damaged_lines, damaged_bytes)
    return (damaged_header, damaged_bytes)
