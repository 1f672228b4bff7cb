"""`jaxid data ...`: draws pictures and data sets in the published layouts."""

from pathlib import Path
from typing import Annotated

import numpy as np

from jaxid.checks import Count, Range
from jaxid.errors import InputError
from jaxid.io import ensure_output_folder

Side = Annotated[int, Range(32)]
"""Side of a picture in pixels."""


def preview(out: Path, *, seed: int = 0, count: Count = 16, size: Annotated[int, Range(8)] = 112) -> None:
    """Draw a sheet of procedural scenes with their captions.

    Args:
        out: the picture to write, for example scenes.png.
        seed: of the scenes.
        count: how many scenes.
        size: side of each scene, in pixels.
    """
    from jaxid.data import scenes

    scenes.preview(out, seed=seed, count=count, size=size)


def grid(
    *,
    out: Path,
    pair: list[str],
    size: list[Annotated[int, Range(1, 224)]] | None = None,
    picture_size: Side = 896,
    seed: int = 0,
    near_far: bool = False,
) -> str:
    """Draw all placements of pairs of objects on the 4 x 4 grid, in the published layout.

    Args:
        out: folder for {A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png.
        pair: an ordered pair of objects, A,B; may be given several times.
        size: side of the objects in pixels of the 224-pixel cell; may be given several times; 224 by default.
        picture_size: side of the pictures, in pixels.
        seed: of the colours.
        near_far: draw only the two ends of the top row.
    """
    from jaxid.data.grid import CELL_SIZE, NEAR_FAR, write_grid_folder

    items = write_grid_folder(
        ensure_output_folder(out),
        _pairs(pair),
        seed=seed,
        picture_size=picture_size,
        object_sizes=size or [CELL_SIZE],
        cells=NEAR_FAR if near_far else None,
    )
    return f"{len(items)} pictures in {out}"


def coco_spatial(
    *,
    out: Path,
    count: Count = 100,
    picture_size: Side = 224,
    seed: int = 0,
    noise: Annotated[float, Range(0)] = 0.0,
) -> str:
    """Draw two-object scenes with questions, in the layout of COCO-Spatial.

    Args:
        out: folder for coco_qa_two_obj.json, instances_val2017.json and val2017/.
        count: number of pictures.
        picture_size: side of the pictures, in pixels.
        seed: of the scenes.
        noise: standard deviation of the noise, as a share of the colours' range.
    """
    from jaxid.data.coco_spatial import write_coco_spatial
    from jaxid.data.scenes import sample_free

    scenes = sample_free(np.random.default_rng(seed), count, num_objects=(2, 2))
    items = write_coco_spatial(ensure_output_folder(out), scenes, picture_size, noise=noise)
    return f"{len(items)} pictures in {out}"


def three_objects(*, out: Path, count: Count = 100, picture_size: Side = 224, seed: int = 0) -> str:
    """Draw three-object scenes for questions about what is in between.

    Args:
        out: folder for three_objects.json and val2017/.
        count: number of scenes.
        picture_size: side of the pictures, in pixels.
        seed: of the scenes.
    """
    from jaxid.data.three_objects import sample_in_between, write_three_objects

    scenes = sample_in_between(np.random.default_rng(seed), count)
    items = write_three_objects(ensure_output_folder(out), scenes, picture_size)
    return f"{len(items)} pictures in {out}"


def finetune(*, out: Path, pair: list[str], picture_size: Side = 896, seed: int = 0, varied: bool = False) -> str:
    """Draw all placements of pairs of objects as a fine-tuning set.

    Args:
        out: folder for {A}_{ax}-{ay}_{B}_{bx}-{by}.png.
        pair: an ordered pair of objects, A,B; may be given several times.
        picture_size: side of the pictures, in pixels.
        seed: of colours, backgrounds and jitter.
        varied: vary backgrounds, sizes and angles.
    """
    from jaxid.data.grid import Drawing, write_finetune_folder
    from jaxid.data.scenes import VARIED

    options: Drawing = {"backgrounds": VARIED, "jitter_size": 0.1, "jitter_angle": 15.0} if varied else {}
    items = write_finetune_folder(
        ensure_output_folder(out), _pairs(pair), seed=seed, picture_size=picture_size, **options
    )
    return f"{len(items)} pictures in {out}"


def appear(*, out: Path, pair: list[str], picture_size: Side = 144, seed: int = 0) -> str:
    """Draw clips in which two objects appear at all pairs of frames.

    Args:
        out: folder for appear_{A}{i}_{B}{j}.mp4.
        pair: an ordered pair of objects, A,B; may be given several times.
        picture_size: side of the pictures, in pixels, even.
        seed: of positions, colours and backgrounds.
    """
    from jaxid.data.clips import write_appear_folder

    items = write_appear_folder(ensure_output_folder(out), _pairs(pair), seed=seed, picture_size=picture_size)
    return f"{len(items)} clips in {out}"


def mvbench(*, out: Path, count: Count = 100, picture_size: Side = 144, seed: int = 0) -> str:
    """Draw videos of one scene after another with questions of order, in the layout of MVBench's manifest.

    Args:
        out: folder for manifest.csv and videos/.
        count: number of videos.
        picture_size: side of the pictures, in pixels, even.
        seed: of everything drawn.
    """
    from jaxid.data.clips import write_mvbench

    items = write_mvbench(ensure_output_folder(out), count, seed=seed, picture_size=picture_size)
    return f"{len(items)} videos in {out}"


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        first, separator, second = text.partition(",")
        if not separator or not first or not second:
            raise InputError(f"a pair is two names joined by a comma, such as star,fish; got {text!r}.")
        pairs.append((first, second))
    return pairs
