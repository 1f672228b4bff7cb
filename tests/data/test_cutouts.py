"""Users' own pictures of objects on the grid, against pixels placed by hand in NumPy and Pillow."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_cli import refused, run

from jaxid.data.cutouts import Pasting, object_name, read_cutouts, read_grounds
from jaxid.data.grid import (
    paste_finetune_folder,
    paste_grid_folder,
    placements,
    read_finetune_folder,
    read_grid_folder,
)
from jaxid.errors import DataError, InputError, JaxidWarning

pytestmark = pytest.mark.filterwarnings("ignore:no part of the pictures of .* is transparent")

SIDE = 4 * 56
RED, BLUE = (220, 20, 20), (20, 20, 220)


def framed(color: tuple[int, int, int], size: tuple[int, int], margin: int = 0) -> Image.Image:
    """A rectangle of one colour, with a transparent margin of another one."""
    picture = np.zeros((size[1] + 2 * margin, size[0] + 2 * margin, 4), np.uint8)
    picture[..., :3] = (9, 99, 9)
    picture[margin : margin + size[1], margin : margin + size[0]] = (*color, 255)
    return Image.fromarray(picture)


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """A red square, and a blue rectangle twice as wide as high."""
    folder = tmp_path / "objects"
    folder.mkdir()
    framed(RED, (40, 40)).save(folder / "fire_truck.png")
    framed(BLUE, (60, 30)).save(folder / "dog.png")
    return folder


def seen(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(pixels[..., :3].astype(int) - color).max(axis=-1) < 60


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is seen."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def test_objects_are_resized_and_pasted_at_the_centres_of_cells(objects: Path, tmp_path: Path) -> None:
    own = read_cutouts(objects)
    assert list(own) == ["dog", "fire truck"]
    items = paste_grid_folder(
        tmp_path / "grid", own, [("fire truck", "dog")], Pasting(picture_size=SIDE), object_sizes=(224, 124)
    )
    assert len(items) == 480 and set(read_grid_folder(tmp_path / "grid")) == set(items)
    for item in items[::37]:
        # 56-pixel cells: the published 224 and 124 become 56 and 31; the rectangle's height is half of that, rounded.
        side = {224: 56, 124: 31}[item.size]
        expected = np.zeros((SIDE, SIDE, 4), np.uint8)
        for (x, y), color, (width, height) in (
            (item.cell_a, RED, (side, side)),
            (item.cell_b, BLUE, (side, round(side / 2))),
        ):
            left, top = int(np.floor(x * 56 + (56 - width) / 2)), int(np.floor(y * 56 + (56 - height) / 2))
            expected[top : top + height, left : left + width] = (*color, 255)
        np.testing.assert_array_equal(np.asarray(Image.open(str(item.picture))), expected)
    path = Path(str(items[0].picture)).relative_to(tmp_path / "grid")
    assert path.as_posix() == "fire truck_dog/0_0/1_0_224.png"


def test_stretched_objects_fill_squares_as_published(tmp_path: Path) -> None:
    """Where nothing is half transparent, pictures equal those that Pillow's `paste` makes with the object as mask."""
    rng = np.random.default_rng(0)
    for name, size in (("cup", (30, 50)), ("key", (64, 64))):
        picture = np.dstack([rng.integers(0, 256, (*size, 3), np.uint8), np.full(size, 255, np.uint8)])
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    with pytest.warns(JaxidWarning, match="no part of the pictures of cup, key is transparent"):
        own = read_cutouts(tmp_path)
    found = Pasting(picture_size=896, stretched=True).draw(own["cup"], (1, 0), own["key"], (3, 2), 174.0)
    canvas = Image.new("RGBA", (896, 896), (0, 0, 0, 0))
    for name, (x, y) in (("cup", (1, 0)), ("key", (3, 2))):
        resized = Image.open(tmp_path / f"{name}.png").resize((174, 174), Image.Resampling.LANCZOS)
        canvas.paste(resized, (x * 224 + 25, y * 224 + 25), resized)
    np.testing.assert_array_equal(found, np.asarray(canvas))
    kept = Pasting(picture_size=896).draw(own["cup"], (1, 0), own["key"], (3, 2), 174.0)
    assert box(found[:224, 224:448, 3] > 0) == (25, 25, 199, 199)
    assert box(kept[:224, 224:448, 3] > 0) == (25, 60, 199, 164)  # 174 wide and 104 high


def test_jitter_changes_sizes_and_angles_within_their_bounds(objects: Path) -> None:
    own = read_cutouts(objects)
    plain, sized, turned = (
        Pasting(picture_size=896, jitter_size=size, jitter_angle=angle) for size, angle in ((0, 0), (0.1, 0), (0, 15))
    )
    widths, heights = [], []
    for cells in placements(same_row=False, same_column=False)[::6]:
        pictures = [
            one.draw(own["fire truck"], cells[0], own["dog"], cells[1], 124.0) for one in (plain, sized, turned)
        ]
        left, top, right, bottom = box(seen(pictures[0], RED))
        assert (right - left, bottom - top) == (124, 124)
        left, top, right, bottom = box(seen(pictures[1], RED))
        widths.append(right - left)
        assert right - left == bottom - top and (left + right) // 2 - 112 - 224 * cells[0][0] in (-1, 0)
        # A rotated square: the share of its box that it fills says by how much.
        mask = pictures[2][..., 3] > 127
        red = mask & seen(pictures[2], RED)
        left, top, right, bottom = box(red)
        heights.append(bottom - top)
        assert abs(red.sum() - 124**2) < 260
    assert 111 <= min(widths) < 118 and 130 < max(widths) <= 137
    most = 124 * (np.cos(np.pi / 12) + np.sin(np.pi / 12))
    assert 124 <= min(heights) < 132 and 140 < max(heights) <= most + 2


def test_jittered_objects_neither_overlap_nor_leave_the_picture(objects: Path) -> None:
    own = read_cutouts(objects)
    pasting = Pasting(picture_size=SIDE, jitter_size=0.3, jitter_angle=30, ground="white")
    larger = 0
    for cells in placements()[::2]:
        pixels = pasting.draw(own["fire truck"], cells[0], own["dog"], cells[1], 56.0)
        red, blue = seen(pixels, RED), seen(pixels, BLUE)
        assert pixels.shape == (SIDE, SIDE, 3)
        one, other = box(red), box(blue)
        apart = max(one[0], other[0]) >= min(one[2], other[2]) - 2 or max(one[1], other[1]) >= min(one[3], other[3]) - 2
        assert apart, cells
        # A square that the picture's border cut off would show fewer pixels than a square of its height and width.
        larger += one[2] - one[0] > 57
        assert min(one[2] - one[0], one[3] - one[1]) >= 0.69 * 56
        assert abs((one[2] - one[0]) - (one[3] - one[1])) <= 3
    assert larger > 20


def test_every_picture_has_a_seed_of_its_own(objects: Path, tmp_path: Path) -> None:
    own = read_cutouts(objects)
    both = [("fire truck", "dog"), ("dog", "fire truck")]
    cells = placements()[::24]
    pasting = Pasting(picture_size=64, jitter_size=0.1, jitter_angle=15, seed=3)
    some: Any = {"object_sizes": (174,), "cells": cells}
    one = paste_grid_folder(tmp_path / "one", own, both, pasting, **some)
    other = paste_grid_folder(tmp_path / "other", dict(reversed(own.items())), both[1:], pasting, **some)
    flat = paste_finetune_folder(tmp_path / "flat", own, both, pasting, cells=cells)
    assert len(one) == 20 and len(other) == 10

    def bytes_of(items: list) -> dict:
        return {(item.names, item.cell_a, item.cell_b): Path(str(item.picture)).read_bytes() for item in items}

    assert bytes_of(other).items() <= bytes_of(one).items()
    assert len(set(bytes_of(one).values())) == 20
    assert read_finetune_folder(tmp_path / "flat") == sorted(flat, key=lambda item: str(item.picture))
    assert Path(str(flat[0].picture)).name == "fire truck_0-0_dog_1-0.png"
    again = paste_grid_folder(
        tmp_path / "again", own, both, Pasting(picture_size=64, jitter_size=0.1, jitter_angle=15, seed=4), **some
    )
    assert not set(bytes_of(again).values()) & set(bytes_of(one).values())


def test_photographs_are_cut_to_squares_and_chosen_by_the_seed(objects: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    colors = [(10, 200, 10), (200, 200, 10), (120, 120, 120)]
    for index, color in enumerate(colors):
        wide = np.full((40, 80, 3), 255, np.uint8)
        wide[:, 20:60] = color  # the square around the centre
        Image.fromarray(wide).save(tmp_path / "photos" / f"{index}.bmp")
    own, grounds = read_cutouts(objects), tuple(read_grounds(tmp_path / "photos"))
    pasting = Pasting(picture_size=40, grounds=grounds)
    cells = placements(same_row=False, same_column=False)
    found = []
    for first, second in cells[:60]:
        pixels = pasting.draw(own["fire truck"], first, own["dog"], second, 6.0)
        assert pixels.shape == (40, 40, 3)
        ground = pixels[~(seen(pixels, RED) | seen(pixels, BLUE))]
        assert (ground == ground[0]).all()
        found.append(tuple(ground[0].tolist()))
    assert set(found) == set(colors)
    # Which photograph is shown says nothing about where the objects are: each shows up with many cells.
    assert all(len({cell[0] for cell, color in zip(cells, found, strict=False) if color == one}) > 3 for one in colors)
    assert Pasting(picture_size=40, ground="#010203").draw(own["dog"], (0, 0), own["fire truck"], (2, 2), 6.0)[
        39, 0
    ].tolist() == [1, 2, 3]


def test_excluded_rows_and_columns() -> None:
    assert len(placements(same_row=False)) == 16 * 12 == len(placements(same_column=False))
    assert len(placements(same_row=False, same_column=False)) == 16 * 9
    assert all(a[1] != b[1] for a, b in placements(same_row=False))
    assert all(a[0] != b[0] for a, b in placements(same_column=False))


@pytest.mark.parametrize(
    ("file", "name"), [("fire_truck.png", "fire truck"), ("polar bear.PNG", "polar bear"), ("a__b_.png", "a b")]
)
def test_objects_are_named_by_their_files(file: str, name: str) -> None:
    assert object_name(file) == name


def test_files_that_show_no_object(objects: Path, tmp_path: Path) -> None:
    def expect(name: str, reason: str) -> None:
        with pytest.raises(DataError, match=f"{name}.*{reason}") as caught:
            read_cutouts(objects)
        assert "\n" not in str(caught.value)
        bad: list[tuple[str, DataError]] = []
        assert list(read_cutouts(objects, bad=bad)) == ["dog", "fire truck"]
        assert [one for one, _ in bad] == [name]
        (objects / name).unlink()

    (objects / "broken.png").write_bytes(b"\x89PNG no picture")
    expect("broken.png", "cannot be read as a picture")
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(objects / "nothing.png")
    expect("nothing.png", "transparent everywhere")
    framed(RED, (4, 4)).save(objects / "fire_truck.webp")
    expect("fire_truck.webp", "fire_truck.png both show the fire truck")
    framed(RED, (4, 4)).save(objects / "__.png")
    expect("__.png", "names no object")
    (objects / "notes.txt").write_text("passed over")
    assert len(read_cutouts(objects)) == 2
    with pytest.raises(DataError, match="is not a directory"):
        read_cutouts(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no files that end in \.png"):
        read_grounds(tmp_path / "empty")
    framed(RED, (4, 4)).save(tmp_path / "empty" / "one.png")
    with pytest.raises(DataError, match="holds 1 usable pictures of objects"):
        read_cutouts(tmp_path / "empty")


@pytest.mark.parametrize(
    "wrong", [{"jitter_size": 1.0}, {"jitter_size": -0.1}, {"jitter_angle": 181.0}, {"ground": "no colour"}]
)
def test_wrong_ways_to_paste_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        Pasting(picture_size=64, **wrong)


def test_the_command(objects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fire_truck.png", "dog.png"):
        picture = Image.open(objects / name)
        picture.putpixel((5, 5), (0, 0, 0, 0))
        picture.save(objects / name)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (90, 60), (0, 200, 0)).save(tmp_path / "photos" / "meadow.jpg")
    out, common = tmp_path / "out", ("--objects", objects, "--picture-size", "64")
    options = ("--backgrounds", tmp_path / "photos", "--jitter-size", "0.1", "--jitter-rotation", "15")
    sizes = ("--size", "224", "--size", "74")
    assert run("data", "grid", *common, *options, "--no-same-row", "--no-same-column", *sizes, "--out", out) == 0
    assert f"{2 * 144 * 2} pictures in {out}" in capsys.readouterr().out
    items = read_grid_folder(out)
    assert {item.names for item in items} == set(itertools.permutations(("dog", "fire truck")))
    assert all(a != b for item in items for a, b in zip(item.cell_a, item.cell_b, strict=True))
    with Image.open(str(items[0].picture)) as picture:
        assert picture.mode == "RGB" and picture.size == (64, 64)
    (objects / "cup.png").write_bytes(b"no picture")
    line = refused(capsys, "data", "finetune", *common, "--pair", "fire_truck,dog", "--out", tmp_path / "set")
    assert "cup.png cannot be read as a picture" in line
    arguments = ("data", "finetune", *common, "--pair", "fire_truck,dog", "--out", tmp_path / "set", "--skip-bad")
    assert run(*arguments) == 0
    assert "240 pictures" in (text := capsys.readouterr().out) and f"skipped: {objects / 'cup.png'}" in text
    assert len(read_finetune_folder(tmp_path / "set")) == 240
    assert "two different names out of dog, fire truck" in refused(
        capsys, "data", "grid", *common, "--skip-bad", "--pair", "star,dog", "--out", out
    )
    for wrong in (["--ground", "white"], ["--backgrounds", "x"], ["--stretch"], []):
        line = refused(capsys, "data", "grid", *wrong, "--out", tmp_path / "none")
        assert "--objects" in line
    assert "one of them" in refused(
        capsys, "data", "grid", *common, "--backgrounds", "x", "--ground", "white", "--out", tmp_path / "none"
    )
    assert not (tmp_path / "none").exists()
