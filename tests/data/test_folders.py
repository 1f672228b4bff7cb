"""Folders of drawn pictures: resumed after a kill, never mixed."""

from pathlib import Path

import numpy as np
import pytest

from jaxid.data.folders import RECORD, PictureFile, draw_folder
from jaxid.data.grid import NEAR_FAR, GridItem, write_grid_folder
from jaxid.errors import OutputError
from jaxid.io import locked

SETTINGS = {"a_b": {"seed": 0}}


def drawings(drawn: list[int], count: int = 30, broken: int | None = None) -> list[PictureFile]:
    """Pictures of one grey each, which note that they are drawn."""

    def paint(index: int) -> np.ndarray:
        if index == broken:
            raise KeyboardInterrupt
        drawn.append(index)
        return np.full((2, 2, 4), index, np.uint8)

    return [
        PictureFile(
            path=Path("a_b", f"{index % 3}", f"{index}.png"), pair="a_b", paint=lambda index=index: paint(index)
        )
        for index in range(count)
    ]


def test_what_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    drawn: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        draw_folder(tmp_path, drawings(drawn, broken=17), settings=SETTINGS)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert {int(path.stem) for path in files} == set(drawn) and 17 not in drawn and 0 < len(files) < 30
    # What a killed process was writing, and what someone else keeps there.
    (tmp_path / "a_b" / "0" / ".9.png.123.tmp").write_bytes(b"half")
    (tmp_path / "a_b" / "0" / ".keep").write_bytes(b"mine")
    before = set(drawn)
    assert draw_folder(tmp_path, drawings(drawn), settings=SETTINGS) == len(files)
    assert sorted(drawn) == list(range(30)) and before < set(drawn)
    assert all(path.stat().st_mtime_ns == when for path, when in files.items())
    assert not list(tmp_path.rglob("*.tmp")) and (tmp_path / "a_b" / "0" / ".keep").exists()
    assert draw_folder(tmp_path, drawings(drawn), settings=SETTINGS) == 30
    assert len(drawn) == 30
    draw_folder(tmp_path, drawings(drawn), settings=SETTINGS, restart=True)
    assert len(drawn) == 60


def test_pictures_drawn_in_another_way_are_not_added_to(tmp_path: Path) -> None:
    draw_folder(tmp_path, drawings([], 6), settings=SETTINGS)
    other = {"a_b": {"seed": 1, "ground": "white"}}
    with pytest.raises(OutputError, match="a_b drawn in another way: seed was 0, is now 1; ground was not set"):
        draw_folder(tmp_path, drawings([]), settings=other)
    drawn: list[int] = []
    draw_folder(tmp_path, drawings(drawn, 6), settings=other, restart=True)
    assert sorted(drawn) == list(range(6))
    with pytest.raises(OutputError, match="seed was 1, is now 0"):
        draw_folder(tmp_path, drawings([]), settings=SETTINGS)
    further = [PictureFile(path=Path("b_c", "0.png"), pair="b_c", paint=lambda: np.zeros((2, 2, 3), np.uint8))]
    assert draw_folder(tmp_path, further, settings={"b_c": {"seed": 7}}) == 0  # another pair
    (tmp_path / RECORD).unlink()
    with pytest.raises(OutputError, match="were not drawn by this command"):
        draw_folder(tmp_path, drawings([]), settings=SETTINGS)
    (tmp_path / RECORD).write_text('{"a_b": 3}')
    with pytest.raises(OutputError, match="is damaged"):
        draw_folder(tmp_path, drawings([]), settings=SETTINGS)
    with locked(tmp_path), pytest.raises(OutputError, match="another process"):
        draw_folder(tmp_path, drawings([]), settings=SETTINGS)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "a_b").write_text("a file in the way")
    with pytest.raises(OutputError, match="cannot write"):
        draw_folder(tmp_path, drawings([]), settings=SETTINGS)


def test_drawn_grids_are_resumed_with_the_same_pictures(tmp_path: Path) -> None:
    def drawn(seed: int = 0, sizes: tuple[int, ...] = (224, 74), restart: bool = False) -> list[GridItem]:
        return write_grid_folder(
            tmp_path,
            [("star", "fish")],
            seed=seed,
            cells=NEAR_FAR,
            picture_size=16,
            object_sizes=sizes,
            writing={"restart": restart},
            backgrounds=("noise",),
            jitter_size=0.2,
        )

    whole = drawn()
    files = [Path(str(item.picture)) for item in whole]
    content = [file.read_bytes() for file in files]
    assert len(files) == 4
    files[2].unlink()
    assert drawn() == whole
    assert [file.read_bytes() for file in files] == content
    with pytest.raises(OutputError, match="object sizes was"):
        drawn(sizes=(224, 174))
    drawn(seed=5, restart=True)
    assert all(file.read_bytes() != before for file, before in zip(files, content, strict=True))
