"""Clips of objects that come and go: what is drawn, what names and manifests say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxid.data import clips
from jaxid.data.clips import read_appear_folder, read_mvbench, write_appear_folder, write_mvbench
from jaxid.data.scenes import OBJECTS, Scenes
from jaxid.errors import DataError, InputError


def changes(frames: np.ndarray) -> list[int]:
    """Frames that differ from the one before."""
    steps = np.abs(np.diff(frames.astype(int), axis=0)).max(axis=(1, 2, 3))
    return (np.flatnonzero(steps > 60) + 1).tolist()


def test_objects_come_at_the_frames_of_the_name(tmp_path: Path) -> None:
    pairs = [("star", "fish"), ("cup", "moon")]
    written = write_appear_folder(tmp_path, pairs, frames=[(1, 7), (5, 2)], seed=3, picture_size=64)
    found = read_appear_folder(tmp_path)
    assert (
        {item.key for item in found}
        == {item.key for item in written}
        == {*("star1_fish7", "star5_fish2", "cup1_moon7", "cup5_moon2")}
    )
    for item in found:
        assert changes(np.asarray(item.open().frames)) == sorted((item.frame_a, item.frame_b))
    again = write_appear_folder(tmp_path / "again", pairs[:1], frames=[(1, 7), (5, 2)], seed=3, picture_size=64)
    np.testing.assert_array_equal(again[0].open().frames, found[2].open().frames)


def test_objects_stand_apart() -> None:
    rng = np.random.default_rng(0)
    names = rng.random((40, len(OBJECTS))).argsort(axis=1)[:, :3]
    scenes = clips.of_objects(rng, names)
    np.testing.assert_array_equal(scenes.objects, names)
    ninths = np.clip((scenes.centers * 3).astype(int), 0, 2) @ np.array([1, 3])
    assert all(len(set(row)) == 3 for row in ninths.tolist())


def test_one_goes_before_the_other_comes() -> None:
    starts, stops = clips.draw_windows(np.random.default_rng(0), 500)
    assert (starts >= 1).all() and (stops <= 7).all() and (starts < stops).all() and (stops[:, 0] <= starts[:, 1]).all()
    # Reversed in time, the other one comes first.
    assert ((8 - stops[:, 1]) < (8 - stops[:, 0])).all()


def test_manifest_read_back(tmp_path: Path) -> None:
    items = write_mvbench(tmp_path, 6, seed=2, picture_size=64)
    assert [item.answer for item in items] == ["before", "after"] * 3
    for item in items:
        assert isinstance(item.video, str | Path)
        assert item.query == f"Does the {item.scene1} come before or after the {item.scene2}? Answer in one word."
        first, second = Path(item.video).stem.split("_")[1:]
        assert (item.scene1, item.scene2) == ((first, second) if item.answer == "before" else (second, first))
    assert len({item.key for item in items}) == 6
    # What the names say is what is seen: the first of the file's name is there alone, then gone.
    frames = np.asarray(items[0].open().frames)
    assert len(changes(frames)) in (3, 4)


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
@pytest.mark.parametrize(
    ("correct", "query", "answer", "first"),
    [
        ("scene1,scene2", "scene1,scene2", "before", "opens the door"),
        ("scene1,scene2", "scene2,scene1", "after", "sits down"),
        ("2,1", "1,2", "after", "opens the door"),
        ("sits down, opens the door", "scene2 -> scene1", "before", "sits down"),
    ],
)
def test_orders(form: str, correct: str, query: str, answer: str, first: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    row = {
        "video_path": "a.mp4",
        "scene1": "opens the door",
        "scene2": "sits down",
        "query": "Which is first?",
        "correct_order": correct,
        "query_order": query,
    }
    write(tmp_path, form, [row])
    (item,) = read_mvbench(tmp_path)
    assert (item.answer, item.scene1) == (answer, first) and {item.scene1, item.scene2} == {
        "opens the door",
        "sits down",
    }


def write(folder: Path, form: str, rows: list[dict[str, Any]]) -> None:
    path = folder / f"manifest.{form}"
    if form == "csv":
        names = list(rows[0])
        lines = [",".join(names), *(",".join(f'"{row.get(name, "")}"' for name in names) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        path.write_text(json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows)))


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    good = {
        "video_path": "a.mp4",
        "scene1": "one",
        "scene2": "two",
        "query": "?",
        "correct_order": "1,2",
        "query_order": "1,2",
    }
    rows = [good, {**good, "query": ""}, {**good, "video_path": "b.mp4"}, {**good, "query_order": "1,1"}, [1]]
    write(tmp_path, "json", rows)  # type: ignore[arg-type]
    bad: list[tuple[str, DataError]] = []
    assert [item.row for item in read_mvbench(tmp_path, bad=bad)] == [0]
    reasons = [str(error) for _, error in bad]
    assert [name for name, _ in bad] == ["row 1", "row 2", "row 3", "row 4"]
    for reason, expected in zip(
        reasons, ("lacks query", "b.mp4 does not exist", "'1,1'; expected an order", "lacks video_path"), strict=True
    ):
        assert expected in reason
    with pytest.raises(DataError, match=r"row 1 of .* lacks query"):
        read_mvbench(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_mvbench(tmp_path)
    with pytest.raises(DataError, match=r"holds no manifest\.csv"):
        read_mvbench(tmp_path / "nowhere")


GOOD = {
    "video_path": "a.mp4",
    "scene1": "one",
    "scene2": "two",
    "query": "?",
    "correct_order": "1,2",
    "query_order": ["2", "1"],
}


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_a_manifest(form: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    write(tmp_path, form, [{**GOOD, "query_order": "2,1", "scene1": "\u00e9t\u00e9\u2028"}])
    path = tmp_path / f"manifest.{form}"
    path.write_text(path.read_text(), encoding=encoding)
    (item,) = read_mvbench(tmp_path)
    assert (item.answer, item.video, item.scene2) == ("after", tmp_path / "a.mp4", "\u00e9t\u00e9")


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
@pytest.mark.parametrize(
    "damaged",
    [b"\xff\xfea\0b\0", b"\x80\x81", b"[" * 50_000, b"null", b"3", b'{"a": 1', b'a,b\n"' + b"x" * 200_000, b"{}"],
)
def test_damaged_manifests(form: str, damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / f"manifest.{form}").write_bytes(damaged)
    with pytest.raises(DataError, match=f"manifest.{form}") as caught:
        read_mvbench(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"video_path": "../a.mp4"}, "leads out of"),
        ({"video_path": "/etc/hostname"}, "leads out of"),
        ({"video_path": "x" * 5000}, "cannot be the name"),
        ({"video_path": "a\0.mp4"}, "cannot be the name"),
        ({"video_path": 3}, "needs text in video_path"),
        ({"scene1": {"a": 1}}, "needs text in scene1"),
        ({"query": ["a"]}, "needs text in query"),
        ({"query_order": 12}, "needs text in query_order"),
        ({"query_order": [[1], 2]}, "expected an order"),
        ({"correct_order": float("nan")}, "needs text in correct_order|JSON does not have"),
    ],
)
def test_fields_of_another_kind(changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    write(tmp_path, "jsonl", [GOOD, {**GOOD, **changed}])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"row 1 of .*manifest\.jsonl.*({reason})") as caught:
        read_mvbench(tmp_path)
    assert len(str(caught.value)) < 600


def test_clips_that_cannot_be_used(tmp_path: Path) -> None:
    for name in ("appear_star1_fish1.mp4", "appear_star0_fish3.mp4", "other.mp4"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=f"{name} does not fit"):
            read_appear_folder(tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="holds no clips"):
        read_appear_folder(tmp_path)
    (tmp_path / "x.mp4").write_bytes(b"")
    (tmp_path / "appear_polar bear1_fish3.mp4").write_bytes(b"")
    bad: list[tuple[str, DataError]] = []
    (item,) = read_appear_folder(tmp_path, bad=bad)
    assert (item.object_a, item.frame_a, item.object_b, item.frame_b) == ("polar bear", 1, "fish", 3)
    assert [name for name, _ in bad] == ["x.mp4"]
    for pairs, frames in (([("star", "star")], None), ([("star", "fish")], [(1, 1)]), ([("star", "fish")], [(0, 3)])):
        with pytest.raises(InputError):
            write_appear_folder(tmp_path, pairs, frames=frames)


def test_only_what_is_there_is_drawn() -> None:
    scenes: Scenes = clips.of_objects(np.random.default_rng(1), np.array([[0, 1]]))
    present = clips.frame_states(np.array([[2, 4]]), np.array([[8, 6]]))[0]
    frames = clips.draw_clip(scenes, present, 48)
    assert frames.shape == (8, 48, 48, 3) and changes(frames) == [2, 4, 6]
    np.testing.assert_array_equal(frames[6], frames[3])
