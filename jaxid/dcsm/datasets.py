"""The scorer's data sets in the published layouts, read and written ([DCSM] arXiv 2503.08723, section 5).

| set | on disk | opposite picture |
| --- | --- | --- |
| spatial | `star_above_fish.png`; relations above, below, leftof, rightof | `CUTMIX_star_above_fish.png` |
| attributes | `red_star_blue_fish.png`, or `small_star_big_fish.png` | `MIRROR_red_star_blue_fish.png` |
| negation | a JSON list of rows with two pictures and two names of what each shows | the row's other picture |
| COCO | COCO-Spatial's rows [id, right caption, wrong caption] | none |

Every item has its caption in two versions. Names of several words are joined by hyphens or further underscores.
Further pictures of the same things have a number after a full stop, as in `star_above_fish.2.png`. Captions are the
published ones: "A picture of a star above a fish", "A picture of a red star and a blue fish", "An image of a cat but no
a house"; names that begin with a vowel get "an".
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
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
Named = Callable[[str], str]
"""Gives a name its article."""

Negated = Callable[[int, int, int], str]
"""One of `NEGATIONS`, given the row, the version, and 0 for the picture's caption or 1 for its opposite's."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """A picture and its opposite, with their captions in two versions.

    Attributes:
        key: a unique name.
        picture: a path, or UInt8[Y, X, 3].
        opposite: the opposite picture, for which the captions are wrong, or None.
        captions: the correct caption of the picture, in two versions.
        opposite_captions: the caption that is wrong for it and correct for its opposite, in the same versions.
        alternatives: the item with other words that say the same; every step draws each caption from all of them.
    """

    key: str
    picture: Picture
    opposite: Picture | None
    captions: tuple[str, str]
    opposite_captions: tuple[str, str]
    alternatives: "tuple[Item, ...]" = ()


def named(stem: str) -> str:
    """A picture's name without the number that marks further pictures of the same things."""
    return re.sub(r"\.[0-9]+$", "", stem)


def alternating(row: int, version: int, side: int) -> str:
    """Negations that change from row to row and from version to version; an item's two captions share them."""
    del side
    return NEGATIONS[(row + version) % len(NEGATIONS)]


def read_spatial(folder: str | Path, named_as: Named = article) -> list[Item]:
    """Reads pictures of two objects and the relation of the first to the second.

    Args:
        folder: of the pictures.
        named_as: gives a name its article.

    Raises:
        DataError: for a name in another form, a missing opposite, or a folder without pictures.
    """
    items = []
    for path, opposite in _pairs(Path(folder), "CUTMIX_"):
        match = _SPATIAL.fullmatch(named(path.stem))
        if match is None:
            raise DataError(f"{path}: the name must be A_{{{'|'.join(RELATIONS)}}}_B, such as star_above_fish.")
        first, second = named_as(_words(match["first"])), named_as(_words(match["second"]))
        how, inverse = RELATIONS[match["relation"]], RELATIONS[INVERSE[match["relation"]]]
        items.append(
            Item(
                key=path.stem,
                picture=path,
                opposite=opposite,
                captions=_versions(f"{first} {how} {second}", f"{second} {inverse} {first}"),
                opposite_captions=_versions(f"{second} {how} {first}", f"{first} {inverse} {second}"),
            )
        )
    return items


def read_attributes(folder: str | Path, named_as: Named = article) -> list[Item]:
    """Reads pictures of two objects, each with an attribute: a colour, or small and big.

    A name has four parts. In longer names the first part is an attribute, and so is the part that other names of the
    folder use as an attribute.

    Args:
        folder: of the pictures.
        named_as: gives a name its article.

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
        own = [named_as(f"{attribute} {name}") for attribute, name in zip(attributes, names, strict=True)]
        other = [named_as(f"{attribute} {name}") for attribute, name in zip(attributes[::-1], names, strict=True)]
        items.append(
            Item(
                key=path.stem,
                picture=path,
                opposite=opposite,
                captions=_versions(f"{own[0]} and {own[1]}", f"{own[1]} and {own[0]}"),
                opposite_captions=_versions(f"{other[0]} and {other[1]}", f"{other[1]} and {other[0]}"),
            )
        )
    return items


def read_negation(
    path: str | Path, named_as: Named = article, negation: Negated = alternating, folder: str | Path | None = None
) -> list[Item]:
    """Reads pairs of pictures of one thing each, which is missing in the other picture.

    The file lists rows {"img1_path", "img2_path", "img1_obj", "img2_obj"}: two pictures, and two names of what each
    shows, one for each version of the captions.

    Args:
        path: the file.
        named_as: gives a name its article.
        negation: the words between the thing that is there and the thing that is missing.
        folder: what the paths of pictures are relative to; the file's own folder by default.

    Raises:
        DataError: for a file that is not such a list, a row without a field, or a missing picture.
    """
    path = Path(path)
    folder = path.parent if folder is None else Path(folder)
    items = []
    for index, row in enumerate(read_json(path, DataError, expected=list)):
        where = f"{path}, row {index}"
        row = row if isinstance(row, dict) else {}
        pictures = [row.get(name) for name in ("img1_path", "img2_path")]
        names = [_two_names(row.get(name)) for name in ("img1_obj", "img2_obj")]
        missing = [f"img{k + 1}_path" for k, value in enumerate(pictures) if not isinstance(value, str) or not value]
        missing += [f"img{k + 1}_obj" for k, value in enumerate(names) if not value]
        if missing:
            raise DataError(f"{where} lacks {', '.join(missing)}; paths must be texts, and names lists of two texts.")
        found = [existing(folder, str(value).replace("\\", "/"), where) for value in pictures]
        shown = [
            tuple(
                f"An image of {named_as(here[version])} {negation(index, version, side)} {named_as(there[version])}"
                for version in range(2)
            )
            for side, (here, there) in enumerate((names, names[::-1]))
        ]
        items.append(
            Item(
                key=f"{path.stem}-{index}",
                picture=found[0],
                opposite=found[1],
                captions=(shown[0][0], shown[0][1]),
                opposite_captions=(shown[1][0], shown[1][1]),
            )
        )
    if not items:
        raise DataError(f"{path} lists no rows.")
    return items


def _two_names(value: object) -> list[str]:
    """Two names of a thing, or nothing."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(one, str) and one.strip() for one in value):
        return []
    return [one.strip() for one in value]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of the data sets in a folder.

    Attributes:
        spatial: folder of `A_above_B` pictures.
        attributes: folder of `c1_A_c2_B` pictures.
        sizes: folder of `small_A_big_B` pictures, which belong to the attributes.
        negation: file of the negation set's rows.
    """

    spatial: str = "spatial"
    attributes: str = "attributes"
    sizes: str = "sizes"
    negation: str = "negation.json"


def read_sets(
    folder: str | Path, layout: Layout | None = None, named_as: Named = article, negation: Negated = alternating
) -> dict[str, list[Item]]:
    """Reads the data sets in a folder, those of `layout` and COCO-Spatial's rows.

    Args:
        folder: holds the sets.
        layout: their names.
        named_as: gives a name its article.
        negation: the words between a thing that is there and one that is missing.

    Raises:
        DataError: if there are none, one whose name is not the default does not exist, or one is not in its layout.
    """
    folder, names, default = Path(folder), layout or Layout(), Layout()
    present = {}
    for field in dataclasses.fields(Layout):
        path = folder / getattr(names, field.name)
        present[field.name] = path.is_file() if field.name == "negation" else path.is_dir()
        if not present[field.name] and getattr(names, field.name) != getattr(default, field.name):
            raise DataError(f"{path}, the data set {field.name!r}, does not exist.")
    found: dict[str, list[Item]] = {}
    if present["spatial"]:
        found["spatial"] = read_spatial(folder / names.spatial, named_as)
    for kind in ("attributes", "sizes"):  # published as one set
        if present[kind]:
            own = read_attributes(folder / getattr(names, kind), named_as)
            found["attributes"] = [*found.get("attributes", []), *own]
    if present["negation"]:
        found["negation"] = read_negation(folder / names.negation, named_as, negation, folder)
    if (folder / coco_spatial.CAPTIONS_FILE).is_file():
        found["coco"] = read_coco(folder)
    if not found:
        listed = f"{names.spatial}/, {names.attributes}/, {names.sizes}/, {names.negation}"
        raise DataError(f"{folder} holds no data set: {listed} or {coco_spatial.CAPTIONS_FILE}.")
    return found


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
        row = {"img1_path": names[0], "img2_path": names[1], "img1_obj": [here, here], "img2_obj": [there, there]}
        listed.append(row)
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


def _versions(*shown: str) -> tuple[str, str]:
    """Both versions of a caption, from what follows its beginning."""
    first, second = (f"A picture of {text}" for text in shown)
    return first, second


def _words(part: str) -> str:
    return part.replace("_", " ").replace("-", " ").strip()
