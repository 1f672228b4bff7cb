"""Occlusion: blurring the subject, beside blurring as much elsewhere ([ID] arXiv 2601.12626, Figure 8 b; D-RISE)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxid.data.coco_spatial import SpatialItem
from jaxid.errors import DataError, InputError
from jaxid.experiments.relations import Case, Compat, RelationBatch, prepare
from jaxid.families.base import Model
from jaxid.interp.forward import forward

RADIUS = 20.0
"""Of the published blur, in pixels of COCO's pictures."""

RANDOM = 10
"""Boxes blurred elsewhere."""

TRIES = 500
"""Places tried for each of them."""

COMPARED = {"none": slice(0, 4), "reference": slice(1, 5)}
"""Random blurs that the sensitivity looks at; the published code skips the first one."""

KINDS = ("original", "object", *["random"] * RANDOM)
"""What was done to the picture of each variant."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Occlusion:
    """Log-probabilities of the right and the wrong answer, of the variants as in `KINDS`.

    Attributes:
        right: of the true answer, Float[B, 12].
        wrong: of the other one, Float[B, 12].
        compat: which random blurs `sensitivity` looks at.
        unknown: the words of every item's question that the vocabulary does not hold, length B.
    """

    right: Float[np.ndarray, "B V"]
    wrong: Float[np.ndarray, "B V"]
    compat: Compat = "none"
    unknown: tuple[tuple[str, ...], ...] = ()

    @property
    def drop(self) -> Float[np.ndarray, "B"]:
        """How much log p(correct) falls when the subject is blurred."""
        return self.right[:, 0] - self.right[:, 1]

    @property
    def random_drop(self) -> Float[np.ndarray, "B"]:
        """How much it falls when as much is blurred elsewhere, the mean over all random boxes."""
        return self.right[:, 0] - self.right[:, 2:].mean(axis=1)

    @property
    def sensitivity(self) -> Float[np.ndarray, "B"]:
        """Log p(correct) of the worst of four random blurs, less that of the blurred subject."""
        return self.right[:, 2:][:, COMPARED[self.compat]].min(axis=1) - self.right[:, 1]


def pixels(boxes: Float[np.ndarray, "*B 4"], size: tuple[int, int]) -> Int[np.ndarray, "*B 4"]:
    """Left, upper, right and lower pixel edge of boxes (x, y, width, height): every pixel that they touch."""
    limits = np.array(size)
    low = np.clip(np.floor(boxes[..., :2]), 0, limits - 1)
    high = np.clip(np.ceil(boxes[..., :2] + boxes[..., 2:]), low + 1, limits)
    return np.concatenate([low, high], axis=-1).astype(np.int64)


def random_boxes(
    rng: np.random.Generator,
    size: tuple[int, int],
    like: Int[np.ndarray, "4"],
    avoid: Int[np.ndarray, "M 4"],
    count: int = RANDOM,
    tries: int = TRIES,
) -> Int[np.ndarray, "N 4"]:
    """Boxes at random places of a picture that touch none of some boxes; they may overlap each other.

    Args:
        rng: chooses the places.
        size: width and height of the picture.
        like: the box whose size they have; all boxes are left, upper, right and lower pixel edges.
        avoid: the boxes that they keep clear of.
        count: how many.
        tries: places tried for each.

    Raises:
        DataError: if there is no room for one within its tries.
    """
    extent = like[2:] - like[:2]
    room = np.array(size) - extent
    found = []
    for _ in range(count):
        for _ in range(tries):
            corner = rng.integers(0, room + 1)
            if not (((corner < avoid[:, 2:]) & (corner + extent > avoid[:, :2])).all(axis=1)).any():
                found.append([*corner, *(corner + extent)])
                break
        else:
            raise DataError(
                f"the picture of {size[0]} x {size[1]} pixels is too crowded: no place for a box of {extent[0]} x "
                f"{extent[1]} beside the two objects' boxes was found in {tries} tries; leave the item out."
            )
    return np.array(found, np.int64).reshape(-1, 4)


def blurred(
    picture: UInt8[np.ndarray, "Y X 3"], boxes: Int[np.ndarray, "M 4"], radius: float = RADIUS
) -> list[UInt8[np.ndarray, "Y X 3"]]:
    """Copies of a picture, each with one box (left, upper, right, lower edge) of it blurred.

    The box gets that part of the wholly blurred picture, so that colours from around it run in.

    Raises:
        InputError: for a radius that is not above 0.
    """
    from PIL import Image, ImageFilter

    if not (math.isfinite(radius) and radius > 0):
        raise InputError(f"a blur's radius is a number of pixels above 0, not {radius}.")
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))
    copies = []
    for left, upper, right, lower in boxes.tolist():
        copy = picture.copy()
        copy[upper:lower, left:right] = soft[upper:lower, left:right]
        copies.append(copy)
    return copies


def variants(
    picture: UInt8[np.ndarray, "Y X 3"],
    subject: Int[np.ndarray, "4"],
    elsewhere: Int[np.ndarray, "N 4"],
    radius: float = RADIUS,
) -> list[UInt8[np.ndarray, "Y X 3"]]:
    """The picture, then with the subject blurred, then with each of the other boxes blurred."""
    return [picture, *blurred(picture, np.concatenate([subject[None], elsewhere]), radius)]


def run(
    model: Model,
    items: Sequence[SpatialItem],
    pictures: Sequence[Sequence[Any]],
    *,
    template: str = "{query}",
    case: Case = "lower",
    together: int | None = None,
    compat: Compat = "none",
) -> Occlusion:
    """Reads the answers about all variants of every item.

    Args:
        model: the model.
        items: of one axis.
        pictures: each item's variants, as many as `KINDS` has.
        template: the user's text with a place for the {query}.
        case: which form of the answer words is read.
        together: prompts that run in one pass; all by default.
        compat: "reference" compares with the second to fifth random blur instead of the first four.

    Raises:
        InputError: if the items are of both axes, or have another number of variants.
        PromptError: if a question does not hold a word, or an answer has no token of its own.
    """
    if len(pictures) != len(items) or any(len(own) != len(KINDS) for own in pictures):
        raise InputError(
            f"{len(items)} items need {len(KINDS)} pictures each, not {[len(own) for own in pictures]} pictures."
        )
    shown = [
        dataclasses.replace(item, picture=picture) for item, own in zip(items, pictures, strict=True) for picture in own
    ]
    size = len(shown) if together is None else together
    found, truth, unknown = [], [], []
    for start in range(0, len(shown), size):
        some = shown[start : start + size]
        # A short last pass is filled up, so that all run the same program.
        batch = prepare(model, [*some, *some[:1] * (size - len(some))], template=template, case=case)
        found.append(read(model, batch)[: len(some)])
        truth.append(batch.truth[: len(some)])
        unknown += batch.prompts.unknown[: len(some)]
    logs, right = np.concatenate(found), np.concatenate(truth)
    rows, shape = np.arange(len(shown)), (len(items), len(KINDS))
    return Occlusion(
        right=logs[rows, right].reshape(shape),
        wrong=logs[rows, 1 - right].reshape(shape),
        compat=compat,
        unknown=tuple(unknown[:: len(KINDS)]),
    )


def read(model: Model, batch: RelationBatch) -> Float[np.ndarray, "B 2"]:
    """Log-probabilities of the two answers, from a pass that keeps nothing else."""
    return np.asarray(batch.read(forward(model, batch.prompts)))
