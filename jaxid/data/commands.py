"""`jaxid data ...`: draws pictures and data sets in the published layouts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np

from jaxid.checks import Count, Range
from jaxid.errors import InputError
from jaxid.io import ensure_output_folder

if TYPE_CHECKING:
    from jaxid.data.cutouts import Cutout, Pasting

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
    pair: list[str] | None = None,
    size: list[Annotated[int, Range(1, 224)]] | None = None,
    picture_size: Side = 896,
    objects: Path | None = None,
    backgrounds: Path | None = None,
    ground: str | None = None,
    stretch: bool = False,
    jitter_size: Annotated[float, Range(0, 0.99)] = 0.0,
    jitter_rotation: Annotated[float, Range(0, 180)] = 0.0,
    same_row: bool = True,
    same_column: bool = True,
    near_far: bool = False,
    seed: int = 0,
    restart: bool = False,
    skip_bad: bool = False,
) -> str:
    """Draw all placements of pairs of objects on the 4 x 4 grid, in the published layout.

    The objects are drawn ones, or your own pictures. A drawing that was killed is resumed by the same command.

    Args:
        out: folder for {A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png.
        pair: an ordered pair of objects, A,B; may be given several times. All pairs of your own pictures by default.
        size: side of the objects in pixels of the 224-pixel cell; may be given several times; 224 by default. The
            published sizes are 224, 174, 124 and 74.
        picture_size: side of the pictures, in pixels.
        objects: folder of your own pictures of objects, each named by what it shows, such as fire_truck.png; best PNG
            files with an alpha channel.
        backgrounds: folder of photographs to paste your own objects on, one chosen for each picture by the seed.
        ground: behind your own objects without photographs, transparent (the default) or a colour, such as white.
        stretch: resize your own objects to squares, as published; by default their proportions are kept.
        jitter_size: sides of the objects change by up to this share either way; published 0.05 and 0.1.
        jitter_rotation: objects are rotated by up to this many degrees either way; published 15.
        same_row: include placements of both objects in one row.
        same_column: include placements of both objects in one column.
        near_far: draw only the two ends of the top row.
        seed: of the colours, the backgrounds and the jitter.
        restart: draw the pictures again that are there.
        skip_bad: skip files of objects and backgrounds that cannot be used, and list them.
    """
    from jaxid.data.grid import CELL_SIZE, NEAR_FAR, Writing, paste_grid_folder, placements, write_grid_folder

    chosen = NEAR_FAR if near_far else placements(same_row=same_row, same_column=same_column)
    if near_far and not same_row:
        raise InputError("--near-far draws objects at the ends of one row; leave out --no-same-row.")
    sizes = size or [CELL_SIZE]
    writing: Writing = {"restart": restart, "progress": True}
    own = _own(objects, backgrounds, ground, stretch, jitter_size, jitter_rotation, seed, picture_size, skip_bad)
    if own is not None:
        cutouts, pasting, note = own
        items = paste_grid_folder(
            out,
            cutouts,
            _own_pairs(pair),
            pasting,
            object_sizes=sizes,
            cells=chosen,
            writing=writing,
        )
        return f"{len(items)} pictures in {out}{note}"
    items = write_grid_folder(
        out,
        _drawn_pairs(pair),
        seed=seed,
        picture_size=picture_size,
        object_sizes=sizes,
        cells=chosen,
        writing=writing,
        jitter_size=jitter_size,
        jitter_angle=jitter_rotation,
    )
    return f"{len(items)} pictures in {out}"


def coco_spatial(
    *,
    out: Path,
    count: Count = 100,
    picture_size: Side = 224,
    seed: int = 0,
    noise: Annotated[float, Range(0)] = 0.0,
    ground: bool = False,
) -> str:
    """Draw two-object scenes with questions, in the layout of COCO-Spatial.

    Args:
        out: folder for coco_qa_two_obj.json, instances_val2017.json and val2017/.
        count: number of pictures.
        picture_size: side of the pictures, in pixels.
        seed: of the scenes.
        noise: standard deviation of the noise, as a share of the colours' range.
        ground: draw objects on a ground plane in perspective, for `jaxid run depth`.
    """
    from jaxid.data.coco_spatial import write_coco_spatial
    from jaxid.data.perspective import sample_perspective
    from jaxid.data.scenes import sample_free

    rng, numbers = np.random.default_rng(seed), (2, 2)
    if ground:
        scenes, _ = sample_perspective(rng, count, num_objects=numbers)
    else:
        scenes = sample_free(rng, count, num_objects=numbers)
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


def finetune(
    *,
    out: Path,
    pair: list[str] | None = None,
    picture_size: Side = 896,
    objects: Path | None = None,
    backgrounds: Path | None = None,
    ground: str | None = None,
    stretch: bool = False,
    jitter_size: Annotated[float, Range(0, 0.99)] | None = None,
    jitter_rotation: Annotated[float, Range(0, 180)] | None = None,
    same_row: bool = True,
    same_column: bool = True,
    varied: bool = False,
    seed: int = 0,
    restart: bool = False,
    skip_bad: bool = False,
) -> str:
    """Draw all placements of pairs of objects as a fine-tuning set.

    The objects are drawn ones, or your own pictures. A drawing that was killed is resumed by the same command.

    Args:
        out: folder for {A}_{ax}-{ay}_{B}_{bx}-{by}.png.
        pair: an ordered pair of objects, A,B; may be given several times. All pairs of your own pictures by default.
        picture_size: side of the pictures, in pixels.
        objects: folder of your own pictures of objects, each named by what it shows, such as fire_truck.png; best PNG
            files with an alpha channel.
        backgrounds: folder of photographs to paste your own objects on, one chosen for each picture by the seed.
        ground: behind your own objects without photographs, transparent (the default) or a colour, such as white.
        stretch: resize your own objects to squares, as published; by default their proportions are kept.
        jitter_size: sides of the objects change by up to this share either way; 0 by default.
        jitter_rotation: objects are rotated by up to this many degrees either way; 0 by default.
        same_row: include placements of both objects in one row.
        same_column: include placements of both objects in one column.
        varied: vary the backgrounds of drawn objects, and let sizes and angles vary by 0.1 and 15 by default.
        seed: of colours, backgrounds and jitter.
        restart: draw the pictures again that are there.
        skip_bad: skip files of objects and backgrounds that cannot be used, and list them.
    """
    from jaxid.data.grid import Drawing, Writing, paste_finetune_folder, placements, write_finetune_folder
    from jaxid.data.scenes import VARIED

    jitter = jitter_size if jitter_size is not None else 0.1 * varied
    angle = jitter_rotation if jitter_rotation is not None else 15.0 * varied
    chosen = placements(same_row=same_row, same_column=same_column)
    writing: Writing = {"restart": restart, "progress": True}
    own = _own(objects, backgrounds, ground, stretch, jitter, angle, seed, picture_size, skip_bad)
    if own is not None:
        cutouts, pasting, note = own
        items = paste_finetune_folder(out, cutouts, _own_pairs(pair), pasting, cells=chosen, writing=writing)
        return f"{len(items)} pictures in {out}{note}"
    options: Drawing = {"backgrounds": VARIED} if varied else {}
    if jitter or angle:
        options |= {"jitter_size": jitter, "jitter_angle": angle}
    items = write_finetune_folder(
        out,
        _drawn_pairs(pair),
        seed=seed,
        picture_size=picture_size,
        cells=chosen,
        writing=writing,
        **options,
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


def _own(
    objects: Path | None,
    backgrounds: Path | None,
    ground: str | None,
    stretch: bool,
    jitter_size: float,
    jitter_rotation: float,
    seed: int,
    picture_size: int,
    skip_bad: bool,
) -> "tuple[dict[str, Cutout], Pasting, str] | None":
    """The user's own objects, how they are pasted, and a note on the files skipped; None without own objects.

    Raises:
        InputError: for options that do not go together.
        DataError: for a file that cannot be used.
    """
    from jaxid.data.cutouts import TRANSPARENT, Bad, Pasting, read_cutouts, read_grounds

    if objects is None:
        if backgrounds or ground or stretch or skip_bad:
            raise InputError("--backgrounds, --ground, --stretch and --skip-bad are for your own pictures: --objects.")
        return None
    if backgrounds and ground:
        raise InputError("objects are pasted on photographs (--backgrounds) or on a --ground; give one of them.")
    bad: Bad = []
    noted = bad if skip_bad else None
    cutouts = read_cutouts(objects, bad=noted)
    pasting = Pasting(
        seed=seed,
        picture_size=picture_size,
        grounds=() if backgrounds is None else tuple(read_grounds(backgrounds, bad=noted)),
        ground=ground or TRANSPARENT,
        jitter_size=jitter_size,
        jitter_angle=jitter_rotation,
        stretched=stretch,
    )
    return cutouts, pasting, "".join(f"; skipped: {error}" for _, error in bad)


def _own_pairs(texts: list[str] | None) -> list[tuple[str, str]] | None:
    """Pairs of names of files, whose underscores are spaces in names; all by default."""
    return [(a.replace("_", " "), b.replace("_", " ")) for a, b in _pairs(texts)] if texts else None


def _drawn_pairs(texts: list[str] | None) -> list[tuple[str, str]]:
    if not texts:
        raise InputError("give --pair A,B for drawn objects, or --objects DIR for your own pictures.")
    return _pairs(texts)


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        first, separator, second = text.partition(",")
        if not separator or not first or not second:
            raise InputError(f"a pair is two names joined by a comma, such as star,fish; got {text!r}.")
        pairs.append((first, second))
    return pairs
