"""What the published code of the deviation and the occlusion does: words, boxes, blurs, places and judged texts."""

import random
import zlib
from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxid.data.coco_boxes import Boxes, Instances, PlacedItem
from jaxid.experiments.occlusion import RANDOM, TRIES, OcclusionItem
from jaxid.prompts.processor import Prompts

with_crowds: Boxes = partial(Instances.boxes, crowds=True)
"""All boxes of a category, crowds included, among which the occlusion chooses."""


def answer_inside(text: str, words: Sequence[str]) -> int:
    """Index of the answer word in a text, also as a part of another word; -1 if the text contains none or both."""
    found = [index for index, word in enumerate(words) if word.lower() in text.lower()]
    return found[0] if len(found) == 1 else -1


def first_tokens(prompts: Prompts, names: Sequence[tuple[str, ...]]) -> Int[np.ndarray, "B W"]:
    """Where the last sub-token of each name first occurs in the prompt: a "bear" may be found inside a "teddy bear"."""
    token_ids = np.asarray(prompts.inputs.token_ids)
    tokens = np.take_along_axis(token_ids, prompts.words(names), axis=1)
    return (token_ids[:, :, None] == tokens[:, None]).argmax(axis=1).astype(np.int32)


def rounded(boxes: Float[np.ndarray, "*B 4"], size: tuple[int, int]) -> Int[np.ndarray, "*B 4"]:
    """Left, upper, right and lower pixel edge of boxes whose corner, width and height are rounded to integers.

    Halves are rounded to even numbers. The edges are limited to the picture, and a box holds one pixel at least.
    """
    limits, near = np.array(size), np.round(boxes).astype(np.int64)
    low = np.clip(near[..., :2], 0, limits - 1)
    extent = np.clip(near[..., 2:], 1, limits - low)
    return np.concatenate([low, low + extent], axis=-1)


def blurred_crops(
    picture: UInt8[np.ndarray, "Y X 3"], boxes: Int[np.ndarray, "M 4"], radius: float
) -> list[UInt8[np.ndarray, "Y X 3"]]:
    """Copies of a picture, each with one box cut out, blurred by itself and put back: nothing runs in from outside."""
    from PIL import Image, ImageFilter

    copies = []
    for left, upper, right, lower in boxes.tolist():
        copy = picture.copy()
        crop = Image.fromarray(picture[upper:lower, left:right])
        copy[upper:lower, left:right] = np.asarray(crop.filter(ImageFilter.GaussianBlur(radius)))
        copies.append(copy)
    return copies


def random_places(
    rng: random.Random,
    size: tuple[int, int],
    like: Float[np.ndarray, "4"],
    avoid: Float[np.ndarray, "M 4"],
    count: int = RANDOM,
    tries: int = TRIES,
) -> Float[np.ndarray, "N 4"]:
    """Boxes at random places; all places together have one budget of tries, and missing ones repeat others.

    Args:
        rng: chooses the places.
        size: width and height of the picture.
        like: a box, whose rounded width and height all boxes have; boxes are (x, y, width, height).
        avoid: the boxes that none of them overlaps, not rounded.
        count: how many boxes.
        tries: how many places are tried.

    Returns:
        The boxes; if no place was found, all are in the upper left corner.
    """
    width, height = (round(side) for side in like[2:].tolist())
    found: list[tuple[int, int]] = []
    for _ in range(tries):
        x, y = rng.randint(0, max(0, size[0] - width)), rng.randint(0, max(0, size[1] - height))
        if all(
            x + width <= left or left + across <= x or y + height <= upper or upper + down <= y
            for left, upper, across, down in avoid.tolist()
        ):
            found.append((x, y))
        if len(found) == count:
            break
    while found and len(found) < count:
        found.append(rng.choice(found))
    return np.array([(x, y, width, height) for x, y in found or [(0, 0)] * count], np.float64)


def with_random_places(placed: PlacedItem, seed: int) -> OcclusionItem:
    """An item with its boxes, as `occlusion.with_boxes`, but by the published rules.

    The published code draws from a generator whose seed depends on Python's hash of the item's words, which differs
    from run to run, so its very places cannot be drawn again. Ours depend on the seed and the item's key.
    """
    rng = random.Random(zlib.crc32(f"{seed} {placed.key}".encode()))
    elsewhere = random_places(rng, placed.size, placed.boxes[0], placed.boxes)
    return OcclusionItem(
        **vars(placed), objects=rounded(placed.boxes, placed.size), elsewhere=rounded(elsewhere, placed.size)
    )
