"""Clips in which objects appear at different times, and MVBench's questions about order, read and written.

Synthetic clips are named `appear_{A}{i}_{B}{j}.mp4`: of eight evenly spaced frames 0..7, A is visible from frame i on
and B from frame j on. The manifest lists which of two scenes of a video happens first. Source: [ID] arXiv 2601.12626,
section on temporal IDs.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from jaxid.data.files import existing, inside, read_csv, usable, write_csv
from jaxid.data.objects import OBJECTS, check_pairs
from jaxid.data.scenes import Scenes, concatenate, render, sample_free
from jaxid.data.videos import FRAMES, VIDEO_ENDINGS, read_video, write_video
from jaxid.errors import DataError, InputError
from jaxid.io import read_json, reading
from jaxid.prompts.pictures import Clip

MANIFEST = "manifest.csv"
PUBLISHED = "mvbench_scene_queries.json"
"""Name of the published manifest, whose videos are in `video/`."""
_FIELDS = ("video_path", "scene1", "scene2", "query", "correct_order", "query_order")
_NAME = re.compile(r"appear_([^_]+?) ?([1-7])_([^_]+?) ?([1-7])")
_HOLD, _RATES = 4, (8, 16)
"""How many video frames show each of the eight, and the frame rates of written videos."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Filmed:
    """A question about a video."""

    video: Clip | str | Path

    def open(self) -> Clip:
        """The clip's eight frames."""
        return self.video if isinstance(self.video, Clip) else read_video(self.video)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppearItem(_Filmed):
    """A clip of eight frames, counted from 0, in which A appears at one frame and B at another."""

    object_a: str
    frame_a: int
    object_b: str
    frame_b: int

    @property
    def key(self) -> str:
        """A unique name."""
        return f"{self.object_a}{self.frame_a}_{self.object_b}{self.frame_b}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderItem(_Filmed):
    """A question about which of two scenes of a video comes first."""

    scene1: str  # the words for the scene that the query names first
    scene2: str
    query: str
    answer: str  # "before" or "after": when the scene named first happens relative to the other
    row: int = 0

    @property
    def key(self) -> str:
        """A unique name."""
        name = self.video.stem if isinstance(self.video, Path) else "clip"
        return f"{self.row:05d}-{name}"


# --- clips of objects that appear ----------------------------------------------------------------------------------


def read_appear_folder(folder: str | Path, *, bad: list[tuple[str, DataError]] | None = None) -> list[AppearItem]:
    """Lists a folder's clips `appear_{A}{i}_{B}{j}` (video files, or folders of frames) by objects and frames.

    Args:
        folder: the folder of the clips.
        bad: if given, clips with other names are skipped and noted here.

    Raises:
        DataError: if the folder is missing or holds no clips, or, without `bad`, for a video with another name.
    """
    folder = Path(folder)
    expected = "appear_{A}{i}_{B}{j}.mp4 with two different frames from 1 to 7"
    if not folder.is_dir():
        raise DataError(f"the folder {folder} does not exist; give a folder of clips {expected}.")
    items = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (path.is_file() and path.suffix.lower() not in VIDEO_ENDINGS):
            continue
        found = _NAME.fullmatch(path.stem if path.is_file() else path.name)
        if found is None or found[2] == found[4] or found[1] == found[3]:
            error = DataError(f"{path} does not fit {expected}; rename or remove it.")
            if bad is None:
                raise error
            bad.append((path.name, error))
            continue
        items.append(
            AppearItem(video=path, object_a=found[1], frame_a=int(found[2]), object_b=found[3], frame_b=int(found[4]))
        )
    if not items:
        raise DataError(f"{folder} holds no clips {expected}.")
    return items


def frame_states(starts: Int[np.ndarray, "N K"], stops: Int[np.ndarray, "N K"], frames: int = FRAMES) -> np.ndarray:
    """Which objects are visible at every frame, Bool[N, F, K]: from their start on, and before their stop."""
    frame = np.arange(frames)[:, None]
    return (starts[:, None] <= frame) & (frame < stops[:, None])


def draw_clip(scene: Scenes, present: np.ndarray, size: int) -> UInt8[np.ndarray, "F Y X 3"]:
    """Draws the frames of one scene; `present`, Bool[F, K], says which objects are visible when."""
    states, which = np.unique(present, axis=0, return_inverse=True)
    return render(with_objects(scene, np.zeros(len(states), np.int64), states), size)[which.reshape(-1)]


def with_objects(scenes: Scenes, rows: Int[np.ndarray, "M"], present: np.ndarray) -> Scenes:
    """Copies of scenes that keep only the objects in `present`, Bool[M, K]."""
    chosen = scenes[rows]
    return dataclasses.replace(chosen, objects=np.where(present, chosen.objects, -1))


def write_appear_folder(
    folder: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    frames: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    picture_size: int = 144,
) -> list[AppearItem]:
    """Draws clips of all pairs at all frames, as `appear_{A}{i}_{B}{j}.mp4`.

    Args:
        folder: where the clips are written.
        pairs: ordered pairs of different names from `OBJECTS`.
        frames: pairs of different frames (i, j) from 1 to 7; all 42 by default.
        seed: of positions, colours and backgrounds; the same seed draws the same clips.
        picture_size: side of the pictures in pixels, even.

    Raises:
        InputError: for a pair or frames that do not satisfy this.
        OutputError: if a file cannot be written.
    """
    frames = [(i, j) for i in range(1, FRAMES) for j in range(1, FRAMES) if i != j] if frames is None else frames
    check_pairs(pairs)
    if any(i == j or not {i, j} <= set(range(1, FRAMES)) for i, j in frames):
        raise InputError(f"frames must be two different integers from 1 to {FRAMES - 1}; got {list(frames)}.")
    items = []
    for index, pair in enumerate(pairs):
        rng = np.random.default_rng((seed, index))
        scenes = of_objects(rng, np.array([[OBJECTS.index(name) for name in pair]] * len(frames)))
        for row, (i, j) in enumerate(frames):
            present = frame_states(np.array([[i, j]]), np.full((1, 2), FRAMES))[0]
            path = Path(folder) / f"appear_{pair[0]}{i}_{pair[1]}{j}.mp4"
            _write(path, scenes[row : row + 1], present, picture_size, _RATES[int(rng.integers(len(_RATES)))])
            items.append(AppearItem(video=path, object_a=pair[0], frame_a=i, object_b=pair[1], frame_b=j))
    return items


def of_objects(rng: np.random.Generator, objects: Int[np.ndarray, "N K"]) -> Scenes:
    """Free scenes of given objects, each in a different ninth of the picture, so that none hides another."""
    count, most = objects.shape
    kept: list[Scenes] = []
    missing = count
    while missing:
        drawn = sample_free(rng, 2 * missing + 8, num_objects=(most, most), size_range=(0.24, 0.32))
        column, row = np.moveaxis(np.clip((drawn.centers * 3).astype(int), 0, 2), -1, 0)
        ninths = np.sort(row * 3 + column, axis=1)
        good = np.flatnonzero((np.diff(ninths, axis=1) > 0).all(axis=1))[:missing]
        kept.append(drawn[good])
        missing -= len(good)
    return dataclasses.replace(concatenate(kept), objects=objects)


def _write(path: Path, scene: Scenes, present: np.ndarray, size: int, rate: int) -> None:
    write_video(path, np.repeat(draw_clip(scene, present, size), _HOLD, axis=0), rate=rate)


# --- questions about order -----------------------------------------------------------------------------------------


def read_mvbench(path: str | Path, *, bad: list[tuple[str, DataError]] | None = None) -> list[OrderItem]:
    """Reads a manifest of questions about order and checks that every video exists.

    Rows hold video_path (relative to the manifest's folder, or to `video/` in it, which it must not leave), scene1 and
    scene2 (words for what happens), query, correct_order (in which the scenes happen) and query_order (in which the
    query names them), both as "scene1,scene2", "1,2" or, as published, [0, 1]. The answer is "before" if the two orders
    agree, else "after". Where the query holds the words of both scenes, they say which one it names first.

    Args:
        path: the manifest (.csv, .json, .jsonl), or the folder that holds `manifest.csv`, `.json` or `.jsonl`, or the
            published `mvbench_scene_queries.json`.
        bad: if given, rows that cannot be used are skipped and noted here.

    Raises:
        DataError: if the manifest is missing or unreadable, or, without `bad`, for a row that lacks a field or its
            video.
    """
    path = _manifest(Path(path))
    items = usable(_rows(path), lambda index, row: _order_item(row, index, path), bad)
    if not items:
        raise DataError(f"{path} holds no usable rows{f': {bad[0][1]}' if bad else ''}.")
    return items


def _manifest(path: Path) -> Path:
    if path.is_file():
        return path
    for name in (*((path / MANIFEST).with_suffix(ending).name for ending in (".csv", ".json", ".jsonl")), PUBLISHED):
        if (path / name).is_file():
            return path / name
    raise DataError(f"{path} holds no {MANIFEST} (or .json, .jsonl) or {PUBLISHED}; give the manifest or its folder.")


def _rows(path: Path) -> list[object]:
    ending = path.suffix.lower()
    if ending == ".csv":
        return read_csv(path)
    if ending != ".jsonl":
        return read_json(path, DataError, expected=list)
    with reading(path, "one JSON value per line", DataError):
        return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def _order_item(row: object, index: int, path: Path) -> OrderItem:
    where = f"row {index} of {path}"
    fields = row if isinstance(row, Mapping) else {}
    missing = [name for name in _FIELDS if not fields.get(name)]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; rows hold {', '.join(_FIELDS)}.")
    wrong = [name for name in _FIELDS if not isinstance(fields[name], str if "order" not in name else str | list)]
    if wrong:
        raise DataError(f"{where} needs text in {', '.join(wrong)}, not {[fields[name] for name in wrong]!r:.300}.")
    scenes = {"1": fields["scene1"].strip(), "2": fields["scene2"].strip()}
    named, happened = (_order(fields[name], scenes, f"{name} in {where}") for name in ("query_order", "correct_order"))
    query = fields["query"].strip()
    places = {digit: query.lower().find(words.lower()) for digit, words in scenes.items()}
    told = min(places.values()) >= 0 and places["1"] != places["2"]
    first, second = sorted(places, key=places.__getitem__) if told else named
    return OrderItem(
        video=_video(path.parent, fields["video_path"], where),
        scene1=scenes[first],
        scene2=scenes[second],
        query=query,
        answer="before" if named == happened else "after",
        row=index,
    )


def _video(folder: Path, name: object, where: str) -> Path:
    """A video in the folder of a manifest, or in `video/` there."""
    inner = folder / "video"
    if inner.is_dir() and not inside(folder, name, where).exists():
        folder = inner
    return existing(folder, name, where, folders=True)


def _order(value: str | list[object], scenes: Mapping[str, str], where: str) -> tuple[str, str]:
    """("1", "2") or ("2", "1"), from a list or a string of the scenes' names, digits or words; or from 0 and 1."""
    parts = value if isinstance(value, list) else re.split(r"\s*(?:,|;|->|<|\|)\s*", value.strip("[]() "))
    digits = {words: digit for digit, words in scenes.items()}
    order = tuple(
        digits.get(text) or text.lower().removeprefix("scene").strip(" _")
        for text in (str(part).strip("'\" ") for part in parts)
    )
    if sorted(order) == ["0", "1"]:
        order = tuple(str(int(digit) + 1) for digit in order)
    if sorted(order) != ["1", "2"]:
        raise DataError(
            f"{where} is {value!r:.300}; expected an order of the two scenes, such as 'scene1,scene2' or [0, 1]."
        )
    return order[0], order[1]


def write_mvbench(folder: str | Path, count: int, *, seed: int = 0, picture_size: int = 144) -> list[OrderItem]:
    """Draws videos in which one object comes and goes before another does, with questions about their order.

    Args:
        folder: where `manifest.csv` and `videos/` are written.
        count: number of videos.
        seed: of everything drawn.
        picture_size: side of the pictures in pixels, even.

    Raises:
        OutputError: if a file cannot be written.
    """
    rng = np.random.default_rng((seed, 7))
    objects = rng.random((count, len(OBJECTS))).argsort(axis=1)[:, :2]
    scenes = of_objects(rng, objects)
    starts, stops = draw_windows(rng, count)
    lines = []
    for row in range(count):
        first, second = (OBJECTS[index] for index in objects[row])
        order = (1, 2) if row % 2 == 0 else (2, 1)  # in which the query names them
        named = (first, second)[:: 1 if order == (1, 2) else -1]
        name = f"videos/{row:05d}_{first}_{second}.mp4"
        present = frame_states(starts[row : row + 1], stops[row : row + 1])[0]
        _write(Path(folder) / name, scenes[row : row + 1], present, picture_size, _RATES[row % 2])
        query = f"Does the {named[0]} come before or after the {named[1]}? Answer in one word."
        lines.append([name, first, second, query, "scene1,scene2", f"scene{order[0]},scene{order[1]}"])
    write_csv(Path(folder) / MANIFEST, [_FIELDS, *lines])
    return read_mvbench(folder)


def draw_windows(rng: np.random.Generator, count: int) -> tuple[Int[np.ndarray, "N 2"], Int[np.ndarray, "N 2"]]:
    """When two objects appear and disappear within frames 1 to 6, the first one before the second appears."""
    cuts = np.sort(rng.random((count, 6)).argsort(axis=1)[:, :4] + 1, axis=1)  # four different frames of 1..6
    starts, stops = cuts[:, [0, 2]], cuts[:, [1, 3]]
    return starts, stops + np.array([0, 1])
