"""Folders of many drawn pictures: drawn by several threads, and resumed after a kill.

A file `.drawn.json` in the folder says how the pictures of each pair were drawn, so that a folder never mixes two ways.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxid.data.files import save_picture
from jaxid.errors import OutputError
from jaxid.io import differences, ensure_output_folder, locked, read_json, remove_temporary, to_json, write_json

RECORD = ".drawn.json"
"""The file that says how a folder's pictures were drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureFile:
    """A picture to be drawn.

    Attributes:
        path: of the file, relative to the folder.
        pair: name of the pair that it shows.
        paint: draws it; called in any thread.
    """

    path: Path
    pair: str
    paint: Callable[[], UInt8[np.ndarray, "Y X C"]]


def draw_folder(
    folder: str | Path,
    drawings: Sequence[PictureFile],
    *,
    settings: Mapping[str, Mapping[str, Any]],
    restart: bool = False,
    progress: bool = False,
) -> int:
    """Draws the pictures that a folder does not hold yet.

    Every file is written whole or not at all, so that a drawing that was killed is resumed where it stopped.

    Args:
        folder: where the files are written.
        drawings: the pictures.
        settings: by pair, everything that its pictures depend on besides their paths, as JSON types.
        restart: draw the pictures again that are there.
        progress: show a progress bar, on terminals.

    Returns:
        How many pictures were there already.

    Raises:
        OutputError: if the folder holds pictures of a pair that were drawn with other settings, is in use by another
            process, or cannot be written to.
    """
    folder = ensure_output_folder(folder)
    with locked(folder):
        there = _cleaned(folder, drawings)
        record = _record(folder)
        if restart:
            for drawing in drawings:
                if drawing.path in there:
                    (folder / drawing.path).unlink(missing_ok=True)
            record, there = {pair: own for pair, own in record.items() if pair not in settings}, set()
        now = json.loads(to_json(settings))
        _refuse_others(folder, record, now, {drawing.pair for drawing in drawings if drawing.path in there})
        if any(record.get(pair) != own for pair, own in now.items()):
            write_json(folder / RECORD, {**record, **now})
        missing = [drawing for drawing in drawings if drawing.path not in there]
        _draw(folder, missing, len(drawings), progress)
    return len(drawings) - len(missing)


def _record(folder: Path) -> dict[str, dict[str, Any]]:
    """How the pictures of each pair in the folder were drawn."""
    record = read_json(folder / RECORD, OutputError, missing={})
    if not all(isinstance(own, dict) for own in record.values()):
        raise OutputError(f"{folder / RECORD} is damaged; remove it and give --restart, or choose another --out.")
    return record


def _refuse_others(
    folder: Path, record: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]], there: set[str]
) -> None:
    """Refuses to add to pictures that were drawn in another way; `there` names the pairs that have pictures."""
    for pair, own in now.items():
        if pair not in record and pair in there:
            raise OutputError(
                f"{folder} holds pictures of {pair} that were not drawn by this command; give --restart to replace "
                "them, or another --out."
            )
        found = differences(record.get(pair, own), own, "was {}, is now {}")
        if found:
            raise OutputError(
                f"{folder} holds pictures of {pair} drawn in another way: {'; '.join(found)}. Repeat that to resume, "
                "give --restart to draw them again, or another --out."
            )


def _cleaned(folder: Path, drawings: Sequence[PictureFile]) -> set[Path]:
    """The files of the folders in which pictures are drawn, without what a killed process left half-written."""
    there = set()
    for parent in dict.fromkeys(drawing.path.parent for drawing in drawings):
        if (folder / parent).is_dir():
            remove_temporary(folder / parent)
            there |= {parent / name for name in os.listdir(folder / parent)}
    return there


def _draw(folder: Path, drawings: Sequence[PictureFile], total: int, progress: bool) -> None:
    """Draws pictures in one thread per core, a few ahead of those that are done."""
    from tqdm import tqdm

    def draw(drawing: PictureFile) -> None:
        save_picture(folder / drawing.path, drawing.paint(), compression=1)

    workers = os.cpu_count() or 1
    waiting: set[Future[None]] = set()
    shown = None if progress else True  # None: on terminals only
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, initial=total - len(drawings), unit="picture", disable=shown) as bar,
    ):
        try:
            for drawing in drawings:
                if len(waiting) >= 4 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for one in done:
                        one.result()
                    bar.update(len(done))
                waiting.add(pool.submit(draw, drawing))
            for one in waiting:
                one.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
