"""The scorer's data sets in the published layouts, read and written ([DCSM] arXiv 2503.08723, section 5).

| set | on disk | opposite picture |
| --- | --- | --- |
| spatial | `star_above_fish.png`; relations above, below, leftof, rightof | `CUTMIX_star_above_fish.png` |
| attributes | `red_star_blue_fish.png`, or `small_star_big_fish.png` | `MIRROR_red_star_blue_fish.png` |
| negation | a JSON list of rows with two pictures and the name of what each shows | the row's other picture |
| COCO | COCO-Spatial's rows [id, right caption, wrong caption] | none |

Every item has its caption in two versions. Names of several words are joined by hyphens or further underscores.
Further pictures of the same things have a number after a full stop, as in `star_above_fish.2.png`.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jaxid.data import coco_spatial
from jaxid.data.coco_spatial import article
from jaxid.data.files import existing, save_picture
from jaxid.errors import DataError
from jaxid.io import read_json, write_json
from jaxid.prompts.pictures import Picture

ENDINGS = (".png", ".jpg", ".jpeg")
RELATIONS = {"above": "above", "below": "below", "leftof": "to the left of", "rightof": "to the right of"}
"""Relations in file names, and in captions."""

INVERSE = {"above": "below", "below": "above", "leftof": "rightof", "rightof": "leftof"}
NEGATIONS = ("and not", "but no", "without")
"""Words between what a picture shows and what is missing in it."""

_SPATIAL = re.compile(rf"(?P<first>.+)_(?P<relation>{'|'.join(RELATIONS)})_(?P<second>.+)")
_PREFIX = "An image of "


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """A picture and its opposite, with their captions in two versions.

    Attributes:
        key: a unique name.
        picture: a path, or UInt8[Y, X, 3].
        opposite: the opposite picture, for which the captions are wrong, or None.
        captions: the correct caption of the picture, in two versions.
        opposite_captions: the caption that is wrong for it and correct for its opposite, in the same versions.
    """

    key: str
    picture: Picture
    opposite: Picture | None
    captions: tuple[str, str]
    opposite_captions: tuple[str, str]


def named(stem: str) -> str:
    """A picture's name without the number that marks further pictures of the same things."""
    return re.sub(r"\.[0-9]+$", "", stem)


def read_spatial(folder: str | Path) -> list[Item]:
    """Reads pictures of two objects and the relation of the first to the second.

    Raises:
        DataError: for a name in another form, a missing opposite, or a folder without pictures.
    """
    items = []
    for path, opposite in _pairs(Path(folder), "CUTMIX_"):
        match = _SPATIAL.fullmatch(named(path.stem))
        if match is None:
            raise DataError(f"{path}: the name must be A_{{{'|'.join(RELATIONS)}}}_B, such as star_above_fish.")
        first, second = article(_words(match["first"])), article(_words(match["second"]))
        how, inverse = RELATIONS[match["relation"]], RELATIONS[INVERSE[match["relation"]]]
        items.append(
            Item(
                key=path.stem,
                picture=path,
                opposite=opposite,
                captions=(f"{_PREFIX}{first} {how} {second}", f"{_PREFIX}{second} {inverse} {first}"),
                opposite_captions=(f"{_PREFIX}{second} {how} {first}", f"{_PREFIX}{first} {inverse} {second}"),
            )
        )
    return items


def read_attributes(folder: str | Path) -> list[Item]:
    """Reads pictures of two objects, each with an attribute: a colour, or small and big.

    A name has four parts. In longer names the first part is an attribute, and so is the part that other names of the
    folder use as an attribute.

    Raises:
        DataError: for an ambiguous name, a missing opposite, or a folder without pictures.
    """
    pairs = list(_pairs(Path(folder), "MIRROR_"))
    split = [named(path.stem).split("_") for path, _ in pairs]
    known = {parts[0] for parts in split} | {parts[2] for parts in split if len(parts) == 4}
    items = []
    for (path, opposite), parts in zip(pairs, split, strict=True):
        places = [2] if len(parts) == 4 else [k for k in range(2, len(parts) - 1) if parts[k] in known]
        if len(parts) < 4 or len(places) != 1:
            raise DataError(f"{path}: the name must be c1_A_c2_B, such as red_star_blue_fish, with c2 an attribute.")
        cut = places[0]
        attributes, names = (parts[0], parts[cut]), (_words("_".join(parts[1:cut])), _words("_".join(parts[cut + 1 :])))
        own = [article(f"{attribute} {name}") for attribute, name in zip(attributes, names, strict=True)]
        other = [article(f"{attribute} {name}") for attribute, name in zip(attributes[::-1], names, strict=True)]
        items.append(
            Item(
                key=path.stem,
                picture=path,
                opposite=opposite,
                captions=(f"{_PREFIX}{own[0]} and {own[1]}", f"{_PREFIX}{own[1]} and {own[0]}"),
                opposite_captions=(f"{_PREFIX}{other[0]} and {other[1]}", f"{_PREFIX}{other[1]} and {other[0]}"),
            )
        )
    return items


def read_negation(path: str | Path) -> list[Item]:
    """Reads pairs of pictures of one thing each, which is missing in the other picture.

    The file lists rows {"image_1", "image_2", "object_1", "object_2"}, with pictures relative to the file's folder. The
    two versions of a caption use two of `NEGATIONS`, which change from row to row.

    Raises:
        DataError: for a file that is not such a list, a row without a field, or a missing picture.
    """
    path = Path(path)
    items = []
    for index, row in enumerate(read_json(path, DataError, expected=list)):
        where = f"{path}, row {index}"
        fields = ("image_1", "image_2", "object_1", "object_2")
        values = [row.get(name) if isinstance(row, dict) else None for name in fields]
        missing = [
            name for name, value in zip(fields, values, strict=True) if not isinstance(value, str) or not value.strip()
        ]
        if missing:
            raise DataError(f"{where} lacks {', '.join(missing)}; each must be a string.")
        pictures = [existing(path.parent, row[name], where) for name in ("image_1", "image_2")]
        here, there = row["object_1"].strip(), row["object_2"].strip()
        words = [NEGATIONS[(index + shift) % len(NEGATIONS)] for shift in range(2)]
        items.append(
            Item(
                key=f"{path.stem}-{index}",
                picture=pictures[0],
                opposite=pictures[1],
                captions=(negated(here, words[0], there), negated(here, words[1], there)),
                opposite_captions=(negated(there, words[0], here), negated(there, words[1], here)),
            )
        )
    if not items:
        raise DataError(f"{path} lists no rows.")
    return items


def read_coco(folder: str | Path) -> list[Item]:
    """Reads COCO-Spatial's rows: a picture, the correct caption and the wrong one, without opposite pictures.

    Raises:
        DataError: if the folder is not in that layout.
    """
    items = []
    for item in coco_spatial.read_coco_spatial(*coco_spatial.find_coco_spatial(folder)):
        opposite = coco_spatial.OPPOSITE[item.relation]
        first, second = item.subject, item.object
        items.append(
            Item(
                key=item.key,
                picture=item.picture,
                opposite=None,
                captions=(
                    coco_spatial.caption(first, second, item.relation),
                    coco_spatial.caption(second, first, opposite),
                ),
                opposite_captions=(
                    coco_spatial.caption(first, second, opposite),
                    coco_spatial.caption(second, first, item.relation),
                ),
            )
        )
    return items


def read_sets(folder: str | Path) -> dict[str, list[Item]]:
    """Reads the data sets in a folder: `spatial/`, `attributes/`, `sizes/`, `negation.json`, and COCO-Spatial's layout.

    Raises:
        DataError: if there are none, or one is not in its layout.
    """
    folder = Path(folder)
    found: dict[str, list[Item]] = {}
    if (folder / "spatial").is_dir():
        found["spatial"] = read_spatial(folder / "spatial")
    for name in ("attributes", "sizes"):  # published as one set
        if (folder / name).is_dir():
            found["attributes"] = [*found.get("attributes", []), *read_attributes(folder / name)]
    if (folder / "negation.json").is_file():
        found["negation"] = read_negation(folder / "negation.json")
    if (folder / coco_spatial.CAPTIONS_FILE).is_file():
        found["coco"] = read_coco(folder)
    if not found:
        raise DataError(
            f"{folder} holds no data set: spatial/, attributes/, sizes/, negation.json or {coco_spatial.CAPTIONS_FILE}."
        )
    return found


def negated(here: str, words: str, missing: str) -> str:
    """The caption of a picture that shows one thing and lacks another."""
    return f"{_PREFIX}{article(here)} {words} {missing if words == 'but no' else article(missing)}"


# --- writing -------------------------------------------------------------------------------------------------------


def write_pair(
    folder: str | Path, name: str, picture: UInt8[np.ndarray, "Y X 3"], opposite: UInt8[np.ndarray, "Y X 3"]
) -> None:
    """Writes an item of the spatial or the attribute set as PNG files; the opposite's name gets the layout's prefix.

    Args:
        folder: of the set; made if missing.
        name: such as "star_above_fish" or "red_star_blue_fish".
        picture: the picture.
        opposite: its opposite.

    Raises:
        OutputError: if a file cannot be written.
    """
    prefix = "CUTMIX_" if _SPATIAL.fullmatch(named(name)) else "MIRROR_"
    save_picture(Path(folder) / f"{prefix}{name}.png", opposite)  # first, so that no picture ever lacks its opposite
    save_picture(Path(folder) / f"{name}.png", picture)


def write_negation(
    path: str | Path,
    rows: Sequence[tuple[UInt8[np.ndarray, "Y X 3"], UInt8[np.ndarray, "Y X 3"], str, str]],
) -> None:
    """Writes a negation set: the pictures, then the JSON file beside them.

    Args:
        path: the JSON file.
        rows: two pictures and the names of the things they show.

    Raises:
        OutputError: if a file cannot be written.
    """
    path, listed = Path(path), []
    for index, (first, second, here, there) in enumerate(rows):
        names = [f"{path.stem}_{index:05d}_{side}.png" for side in (1, 2)]
        for name, picture in zip(names, (first, second), strict=True):
            save_picture(path.parent / name, picture)
        listed.append({"image_1": names[0], "image_2": names[1], "object_1": here, "object_2": there})
    write_json(path, listed)


# --- files ---------------------------------------------------------------------------------------------------------


def _pairs(folder: Path, prefix: str) -> list[tuple[Path, Path]]:
    """The pictures of a folder with their opposites, sorted by name."""
    if not folder.is_dir():
        raise DataError(f"the folder {folder} does not exist.")
    files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS and path.is_file()}
    pairs = []
    for name, path in files.items():
        if name.startswith(prefix):
            continue
        if f"{prefix}{name}" not in files:
            raise DataError(f"{path} has no opposite picture {prefix}{name} beside it.")
        pairs.append((path, files[f"{prefix}{name}"]))
    if not pairs:
        raise DataError(f"{folder} holds no pictures ({', '.join(ENDINGS)}).")
    return pairs


def _words(part: str) -> str:
    return part.replace("_", " ").replace("-", " ").strip()
