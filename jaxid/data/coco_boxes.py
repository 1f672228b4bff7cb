"""Boxes of the two objects of COCO-Spatial items, from COCO's instances file, read by pycocotools."""

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxid.data.coco_spatial import INSTANCES_FILE, SpatialItem
from jaxid.errors import DataError, InputError
from jaxid.io import read_json, reading
from jaxid.prompts.pictures import Stored, stored

if TYPE_CHECKING:
    import pycocotools.coco

_SIGNS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
_ROUNDING = 1.0
"""Pixels by which a box may leave its picture, as COCO's are rounded. Such boxes are clipped at the edge."""
_FAR = 1e9
"""Coordinates must be smaller than this, which no picture reaches."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PlacedItem:
    """An item and the boxes of its two objects.

    Attributes:
        item: the item.
        boxes: (x, y, width, height) of the subject and of the object, in pixels from the upper left corner of the
            upright picture.
        size: width and height of the upright picture in pixels.
    """

    item: SpatialItem
    boxes: Float[np.ndarray, "2 4"]
    size: tuple[int, int]

    @property
    def key(self) -> str:
        """The item's key."""
        return self.item.key

    @property
    def shares(self) -> Float[np.ndarray, "2 4"]:
        """The boxes as fractions of the picture's width and height."""
        return self.boxes / np.array([*self.size, *self.size], self.boxes.dtype)

    @property
    def against_relation(self) -> bool:
        """Whether the boxes' centres contradict the item's relation."""
        return bool(apart(self.boxes[:1], self.boxes[1:], self.item.relation)[0, 0] < 0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Instances:
    """A COCO instances file and its contents, as pycocotools indexes them."""

    path: Path
    coco: "pycocotools.coco.COCO"

    def boxes(self, item: SpatialItem, name: str, *, crowds: bool = False) -> Float[np.ndarray, "M 4"]:
        """Boxes of a category's instances in an item's picture, in the file's order.

        The category is the one of exactly this name, in upper or lower case: "teddy bear" does not match "bear".

        Args:
            item: the item.
            name: the category's name.
            crowds: whether boxes of crowds are among them.

        Raises:
            DataError: if the file lacks the picture, the category or an instance of it, or has a malformed box.
        """
        where, found = self._where(item), self._annotations(item)
        known = [category for category, known in self._names() if known == name.lower()]
        if not known:
            raise DataError(f"{where}: the file has no category {name!r}; add it, or correct the caption.")
        own = [entry for entry in found if entry.get("category_id") in known]
        chosen = own if crowds else [entry for entry in own if not entry.get("iscrowd")]
        if not chosen:
            what = "only a crowd" if own else "no box"
            raise DataError(f"{where}: there is {what} for the object {name!r}; add its box, or remove the item.")
        return np.array([_box(entry, name, where) for entry in chosen], np.float64)

    def first_box(self, item: SpatialItem, name: str) -> Float[np.ndarray, "1 4"]:
        """Box of the first annotation whose category's name contains a name, as the published code chooses it.

        That of a "bear" may be a teddy bear's, or a crowd's.

        Raises:
            DataError: if the file lacks the picture or such an annotation, or its box is malformed.
        """
        where = self._where(item)
        known = [category for category, known in self._names() if name.lower() in known]
        for entry in self._annotations(item):
            if entry.get("category_id") in known:
                return np.array([_box(entry, name, where)], np.float64)
        raise DataError(f"{where}: there is no box for the object {name!r}; add its box, or remove the item.")

    def locate(self, item: SpatialItem, boxes: "Boxes | None" = None) -> PlacedItem:
        """The item with the boxes of its objects; of several instances, the pair that fits the relation best.

        Args:
            item: the item.
            boxes: the boxes from which each object's is chosen; all instances of its category by default.

        Raises:
            DataError: if an object has no box, a box is malformed or outside the picture, or the picture cannot be
                read or its size differs from the file's. The message names the file and the item.
        """
        where, boxes = self._where(item), Instances.boxes if boxes is None else boxes
        subjects, objects = (boxes(self, item, name) for name in (item.subject, item.object))
        entry, picture = self.coco.imgs[item.image_id], stored(item.picture, DataError)
        stated = (entry.get("width"), entry.get("height"))
        both = upright_boxes(np.concatenate([subjects, objects]), picture, where, stated)
        subjects, objects = (
            _inside(boxes, picture.upright, name, where)
            for boxes, name in zip(np.split(both, [len(subjects)]), (item.subject, item.object), strict=True)
        )
        first, second = best_pair(subjects, objects, item.relation)
        return PlacedItem(item=item, boxes=np.stack([subjects[first], objects[second]]), size=picture.upright)

    def _where(self, item: SpatialItem) -> str:
        """What begins the messages of errors about an item."""
        return f"{self.path}, picture {item.image_id} of item {item.key!r}"

    def _names(self) -> list[tuple[object, str]]:
        """The categories and their names, in lower case."""
        return [(category, str(entry.get("name")).lower()) for category, entry in self.coco.cats.items()]

    def _annotations(self, item: SpatialItem) -> Sequence[Mapping[str, Any]]:
        """The annotations of an item's picture, in the file's order.

        Raises:
            DataError: if the file lacks the picture.
        """
        if item.image_id not in self.coco.imgs:
            raise DataError(
                f"{self._where(item)}: the file does not list this picture. Give the instances file of these pictures."
            )
        return self.coco.imgToAnns.get(item.image_id, [])


Boxes = Callable[[Instances, SpatialItem, str], Float[np.ndarray, "M 4"]]
"""The boxes of an object of an item, by its name, from which one is chosen."""


def find_instances(folder: str | Path) -> Path:
    """`instances_val2017.json` in a folder, or in `annotations` inside it, where COCO's archive has it.

    Raises:
        DataError: if it is in neither folder.
    """
    folder = Path(folder)
    for path in (folder / INSTANCES_FILE, folder / "annotations" / INSTANCES_FILE):
        if path.is_file():
            return path
    raise DataError(
        f"{folder} holds no {INSTANCES_FILE}, nor does {folder / 'annotations'}; put COCO's file of boxes there."
    )


def read_instances(path: str | Path) -> Instances:
    """Reads a COCO instances file with pycocotools, whose printing is suppressed.

    Raises:
        DataError: if pycocotools is not installed, or the file is missing or not in COCO's instances format.
    """
    path = Path(path)
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise DataError(
            f"{path} cannot be read without pycocotools ({error}); install it: pip install 'jaxid-vlm[coco]'."
        ) from error
    content = read_json(path, DataError)
    missing = [name for name in ("images", "annotations", "categories") if not isinstance(content.get(name), list)]
    if missing:
        raise DataError(f"{path} is not in COCO's instances format: it lacks the lists {', '.join(missing)}.")
    coco = COCO()
    coco.dataset = content
    expected = "COCO's instances format (images, annotations with image_id, category_id and bbox, and categories)"
    with reading(path, expected, DataError), contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return Instances(path=path, coco=coco)


def upright_boxes(
    boxes: Float[np.ndarray, "M 4"], picture: Stored, where: str, stated: tuple[object, object] = (None, None)
) -> Float[np.ndarray, "M 4"]:
    """Boxes in the coordinates of the upright picture, which is what models see (see `open_picture`).

    If a picture's orientation tag rotates it, boxes may refer to the pixels as stored or to the upright picture. The
    size stated in their file decides; without one, the boxes must fit into only one of the two. If both are possible,
    as for tags that keep the size, the boxes are taken to refer to the upright picture, with a warning: the usual
    picture readers, with which people draw boxes, apply the tag.

    Args:
        boxes: (x, y, width, height) in pixels.
        picture: how the picture is stored.
        where: begins error messages; names what the boxes belong to.
        stated: width and height of the picture according to the boxes' file, or None.

    Raises:
        DataError: if neither the upright nor the stored picture has the stated size.
    """
    if stated == (None, None):
        low, high = boxes[:, :2] + _ROUNDING, boxes[:, :2] + boxes[:, 2:] - _ROUNDING
        fits = [bool(((low >= 0) & (high <= size)).all()) for size in (picture.size, picture.upright)]
    else:
        fits = [stated == size for size in (picture.size, picture.upright)]
        if not any(fits):
            (width, height), orientation = picture
            tag = f" (orientation {orientation})" if orientation > 1 else ""
            raise DataError(
                f"{where}: the picture has {width} x {height} pixels{tag}, but the boxes are for {stated[0]} x "
                f"{stated[1]}. Give the picture in its original size."
            )
    if picture.orientation == 1:
        return boxes
    if fits == [True, False]:
        return picture.rotated(boxes)
    if fits != [False, True]:
        warnings.warn(
            f"{where}: the picture's orientation tag {picture.orientation} leaves open whether its boxes refer to the "
            "stored or to the upright picture; the upright one is assumed.",
            stacklevel=3,
        )
    return boxes


def centers(boxes: Float[np.ndarray, "*B 4"]) -> Float[np.ndarray, "*B 2"]:
    """Centres (x, y) of boxes (x, y, width, height)."""
    return boxes[..., :2] + boxes[..., 2:] / 2


def best_pair(subjects: Float[np.ndarray, "M 4"], objects: Float[np.ndarray, "N 4"], relation: str) -> tuple[int, int]:
    """The instances of subject and object that fit a relation best.

    They are the two whose centres are furthest apart in the relation's direction: for "left", the pair with the
    subject furthest to the left of the object. Ties go to the first pair in the file's order.

    Args:
        subjects: boxes of the subject's instances.
        objects: boxes of the object's instances.
        relation: of the subject to the object: left, right, above or below.

    Raises:
        InputError: if the relation is none of the four, or an object has no instance.
    """
    if relation not in _SIGNS or not len(subjects) or not len(objects):
        raise InputError(
            f"best_pair needs one of the relations {', '.join(_SIGNS)} and an instance of each object; got "
            f"{relation!r}, {len(subjects)} and {len(objects)}."
        )
    first, second = divmod(int(apart(subjects, objects, relation).argmax()), len(objects))
    return first, second


def apart(
    subjects: Float[np.ndarray, "M 4"], objects: Float[np.ndarray, "N 4"], relation: str
) -> Float[np.ndarray, "M N"]:
    """Signed distances in pixels from each object's centre to each subject's, along a relation's direction."""
    axis, sign = _SIGNS[relation]
    return sign * (centers(subjects)[:, None, axis] - centers(objects)[None, :, axis])


def _box(annotation: Mapping[str, object], name: str, where: str) -> list[float]:
    """The four checked numbers of an annotation's box."""
    box = annotation.get("bbox")
    numbers = isinstance(box, list) and all(type(value) in (int, float) and abs(value) < _FAR for value in box)
    if not isinstance(box, list) or not numbers or len(box) != 4 or min(box[2:]) <= 0:
        raise DataError(
            f"{where}: annotation {annotation.get('id')} of {name!r} has the box {box!r}; expected four numbers x, y, "
            "width, height, the last two above 0. Correct it, or remove the item."
        )
    return [float(value) for value in box]


def _inside(boxes: Float[np.ndarray, "M 4"], size: tuple[int, int], name: str, where: str) -> Float[np.ndarray, "M 4"]:
    """The boxes, clipped at the picture's edge where rounding makes them leave it.

    Raises:
        DataError: if a box leaves the picture by more than rounding explains.
    """
    limits = np.array(size, np.float64)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    outside = ((low < -_ROUNDING) | (high > limits + _ROUNDING)).any(axis=1)
    low, high = np.clip(low, 0, limits), np.clip(high, 0, limits)
    outside |= (high <= low).any(axis=1)
    if outside.any():
        box = boxes[int(outside.argmax())].tolist()
        raise DataError(
            f"{where}: the box {box} of {name!r} is outside the picture of {size[0]} x {size[1]} pixels. Correct it, "
            "or remove the item."
        )
    return np.concatenate([low, high - low], axis=1)
