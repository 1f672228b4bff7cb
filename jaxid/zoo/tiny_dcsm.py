"""The recipe of tiny-clip's scorer: training pairs of opposite scenes, and questions about held-out scenes."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Int, UInt8

from jaxid.checks import Range, check_seed
from jaxid.data import scenes as drawn
from jaxid.data.coco_spatial import article
from jaxid.data.files import save_picture, write_csv
from jaxid.data.scenes import Scenes
from jaxid.dcsm import datasets
from jaxid.dcsm.datasets import Item
from jaxid.io import write_json
from jaxid.zoo.tiny_clip import COLOR_NAMES, RELATIONS, SHAPES, is_held_out, relation, sample, seen
from jaxid.zoo.tiny_llava import IMAGE_SIZE

NEGATIONS = (
    "{here} but no {bare}",
    "{here} and not {missing}",
    "{here} without {missing}",
    "no {bare} but {here}",
    "not {missing} but {here}",
    "without {missing} {here}",
)
"""Templates for an object that is present and one that is missing.

These are the published ones, and three that name the missing object first, so that the order of the names carries no
information.
"""

_WITHOUT = (1 / 8, 1 / 8, 3 / 8, 1 / 8, 1 / 8, 1 / 8)
"""Shares of those in the items about a second object: the published demonstration's is the hardest."""

TOGETHER = ("{here} with {missing}", "{here} and {missing}", "{missing} with {here}", "{missing} and {here}")
"""Templates for two objects that are both present."""

_IN_FILES = {said: name for name, said in datasets.RELATIONS.items()}

GAP = 0.22
"""Smallest distance of two objects along the axis of their relation, as a fraction of the picture's side."""

STYLES = ("{}", "an image of {}", "a picture of {}", "bare")
"""How captions begin; bare ones also lack articles and "and"."""


TRAINED = (0.25, 0.2, 0.2, 0.35)
"""Shares of the styles in training: bare captions are the hardest."""


def styled(
    rng: np.random.Generator, captions: Sequence[tuple[str, str]], shares: Sequence[float] | None = None
) -> tuple[tuple[str, str], ...]:
    """An item's captions, correct and opposite ones, in one random style; all are equally frequent by default."""
    style = STYLES[rng.integers(len(STYLES)) if shares is None else rng.choice(len(STYLES), p=shares)]
    if style != "bare":
        return tuple((style.format(first), style.format(second)) for first, second in captions)
    skipped = {"a", "an", "and"}

    def bare(caption: str) -> str:
        return " ".join(word for word in caption.split() if word not in skipped)

    return tuple((bare(first), bare(second)) for first, second in captions)


def clear(scenes: Scenes) -> Bool[np.ndarray, "N"]:
    """Which scenes of two objects show an unambiguous relation."""
    gaps = np.abs(scenes.centers[:, 0] - scenes.centers[:, 1])
    return (gaps.max(axis=1) > GAP) & (gaps.min(axis=1) < 0.6 * gaps.max(axis=1))


def name(scenes: Scenes, row: int, place: int, *, color: bool = False) -> str:
    """An object's name with its article, and optionally its colour."""
    tint = f"{COLOR_NAMES[scenes.colors[row, place]]} " if color else ""
    return article(tint + SHAPES[scenes.objects[row, place]])


def swapped(scenes: Scenes, *names: str) -> Scenes:
    """The scenes with the named fields of their two objects swapped, such as objects, or colours and fills."""
    return dataclasses.replace(scenes, **{field: getattr(scenes, field)[:, ::-1] for field in names})


def spatial(
    rng: np.random.Generator,
    count: int,
    keep: Callable[[Scenes], np.ndarray] = seen,
    *,
    rotated_share: float = 0.0,
    shares: Sequence[float] | None = None,
) -> list[Item]:
    """Items about the relation of two objects; in the opposite picture the two have swapped places.

    Args:
        rng: source of randomness.
        count: number of items.
        keep: filter of the scenes that may be shown.
        rotated_share: share of the opposite pictures that are transposed instead: above becomes left, below becomes
            right, and the reverse.
        shares: of the captions' styles.
    """

    def kept(scenes: Scenes) -> np.ndarray:
        rotated = dataclasses.replace(scenes, centers=scenes.centers[..., ::-1])
        return keep(scenes) & clear(scenes) & (keep(rotated) if rotated_share else True)

    scenes = sample(rng, count, 2, kept)
    # Colours move with the objects, so that training shows no object in a held-out colour.
    other = swapped(scenes, "objects", "colors", "fills")
    rotated = rng.random(count) < rotated_share
    centers = np.where(rotated[:, None, None], scenes.centers[..., ::-1], other.centers)
    same = {
        field: np.where(
            rotated.reshape(-1, *[1] * (getattr(scenes, field).ndim - 1)),
            getattr(scenes, field),
            getattr(other, field),
        )
        for field in ("objects", "colors", "fills")
    }
    other = dataclasses.replace(other, centers=centers.astype(scenes.centers.dtype), **same)
    pictures = (drawn.render(part, IMAGE_SIZE) for part in (scenes, other))
    items = []
    for row, (picture, opposite) in enumerate(zip(*pictures, strict=True)):
        first, second = name(scenes, row, 0), name(scenes, row, 1)
        how = relation(scenes.centers[row, 0], scenes.centers[row, 1])
        wrong = relation(*other.centers[row]) if rotated[row] else RELATIONS[how]
        captions, opposites = styled(
            rng,
            [
                (f"{first} {how} {second}", f"{second} {RELATIONS[how]} {first}"),
                (f"{first} {wrong} {second}", f"{second} {RELATIONS[wrong]} {first}"),
            ],
            shares,
        )
        items.append(
            Item(
                key=f"{SHAPES[scenes.objects[row, 0]]}_{_IN_FILES[how]}_{SHAPES[scenes.objects[row, 1]]}",
                picture=picture,
                opposite=opposite,
                captions=captions,
                opposite_captions=opposites,
            )
        )
    return items


def attributes(
    rng: np.random.Generator,
    count: int,
    keep: Callable[[Scenes], np.ndarray] = seen,
    *,
    shares: Sequence[float] | None = None,
) -> list[Item]:
    """Items about the colours of two objects; in the opposite picture the two have swapped colours."""

    def kept(scenes: Scenes) -> np.ndarray:
        other = swapped(scenes, "colors", "fills")
        return keep(scenes) & keep(other) & (scenes.colors[:, 0] != scenes.colors[:, 1])

    scenes = sample(rng, count, 2, kept)
    other = swapped(scenes, "colors", "fills")
    pictures = (drawn.render(part, IMAGE_SIZE) for part in (scenes, other))
    items = []
    for row, (picture, opposite) in enumerate(zip(*pictures, strict=True)):
        first, second, third, fourth = (name(part, row, k, color=True) for part in (scenes, other) for k in (0, 1))
        captions, opposites = styled(
            rng,
            [
                (f"{first} and {second}", f"{second} and {first}"),
                (f"{third} and {fourth}", f"{fourth} and {third}"),
            ],
            shares,
        )
        items.append(
            Item(
                key="_".join(
                    f"{COLOR_NAMES[scenes.colors[row, place]]}_{SHAPES[scenes.objects[row, place]]}" for place in (0, 1)
                ),
                picture=picture,
                opposite=opposite,
                captions=captions,
                opposite_captions=opposites,
            )
        )
    return items


Said = tuple[str, tuple[str, str], tuple[str, str]]
"""An item's key, the captions of its picture, and those of the opposite one."""


def drawn_items(scenes: Scenes, other: Scenes, said: Callable[[int], Said]) -> list[Item]:
    """Items of scenes and opposite scenes; `said` tells what each row is called."""
    items = []
    pictures = (drawn.render(part, IMAGE_SIZE) for part in (scenes, other))
    for row, (picture, opposite) in enumerate(zip(*pictures, strict=True)):
        key, captions, opposites = said(row)
        items.append(Item(key=key, picture=picture, opposite=opposite, captions=captions, opposite_captions=opposites))
    return items


def negation(
    rng: np.random.Generator,
    count: int,
    keep: Callable[[Scenes], np.ndarray] = seen,
    *,
    shares: Sequence[float] | None = None,
) -> list[Item]:
    """Items about one object that is present and one that is missing; the opposite picture shows only the latter."""
    scenes, other = (sample(rng, count, 1, keep) for _ in range(2))
    shift = rng.integers(1, len(SHAPES), size=(count, 1))
    other = dataclasses.replace(other, objects=(scenes.objects + shift) % len(SHAPES))

    def said(row: int) -> Said:
        phrases = [NEGATIONS[index] for index in rng.permutation(len(NEGATIONS))[:2]]
        here, there = SHAPES[scenes.objects[row, 0]], SHAPES[other.objects[row, 0]]
        captions, opposites = styled(
            rng,
            [
                (_negated(phrases[0], here, there), _negated(phrases[1], here, there)),
                (_negated(phrases[0], there, here), _negated(phrases[1], there, here)),
            ],
            shares,
        )
        return f"{here}_{there}", captions, opposites

    return drawn_items(scenes, other, said)


def presence(
    rng: np.random.Generator,
    count: int,
    keep: Callable[[Scenes], np.ndarray] = seen,
    *,
    shares: Sequence[float] | None = None,
) -> list[Item]:
    """Items about a second object, beside the first one or missing there.

    Both objects are in the picture, and its captions join them ("a star with a fish"). The opposite picture lacks the
    second one, whose place is empty or taken by a third; its captions say so ("a star without a fish", "no fish but a
    star"). So neither the number of objects nor the words alone tell which captions are right.
    """
    kept: list[tuple[Scenes, Scenes]] = []
    while sum(len(part) for part, _ in kept) < count:
        scenes = sample(rng, 2 * count, 2, keep)
        third = absent(rng, scenes)
        other = with_second(scenes, np.where(rng.random(2 * count) < 0.5, third, -1))
        rows = np.flatnonzero(keep(other))
        kept.append((scenes[rows], other[rows]))
    scenes, other = (drawn.concatenate(parts)[slice(count)] for parts in zip(*kept, strict=True))

    def said(row: int) -> Said:
        here, beside = (SHAPES[index] for index in scenes.objects[row])
        together = [TOGETHER[index] for index in rng.permutation(len(TOGETHER))[:2]]
        apart = [NEGATIONS[index] for index in rng.choice(len(NEGATIONS), 2, replace=False, p=_WITHOUT)]
        captions, opposites = styled(
            rng,
            [
                (_negated(together[0], here, beside), _negated(together[1], here, beside)),
                (_negated(apart[0], here, beside), _negated(apart[1], here, beside)),
            ],
            shares,
        )
        return f"{here}_{beside}", captions, opposites

    return drawn_items(scenes, other, said)


def absent(rng: np.random.Generator, scenes: Scenes) -> Int[np.ndarray, "N"]:
    """For each scene an object that it does not show."""
    order = rng.random((len(scenes), len(SHAPES))).argsort(axis=1)
    shown = (order[:, :, None] == scenes.objects[:, None]).any(axis=-1)
    return order[np.arange(len(order)), shown.argmin(axis=1)]


def with_second(scenes: Scenes, objects: Int[np.ndarray, "N"]) -> Scenes:
    """The scenes of two objects with others in the second one's place; -1 leaves it empty."""
    return dataclasses.replace(
        scenes,
        objects=np.stack([scenes.objects[:, 0], objects], axis=1),
        colors=np.stack([scenes.colors[:, 0], np.where(objects < 0, -1, scenes.colors[:, 1])], axis=1),
    )


def _negated(phrase: str, here: str, missing: str) -> str:
    return phrase.format(here=article(here), missing=article(missing), bare=missing)


def training_sets(seed: int, count: int) -> dict[str, list[Item]]:
    """The four training sets, from scenes that may occur in tiny-clip's training."""
    rng = np.random.default_rng((seed, 7))
    return {
        "spatial": spatial(rng, count, rotated_share=0.5, shares=TRAINED),
        "attributes": attributes(rng, count, shares=TRAINED),
        "negation": negation(rng, count, shares=TRAINED),
        "presence": presence(rng, count, shares=TRAINED),
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """Pictures with their captions, of which the first is correct."""

    pictures: UInt8[np.ndarray, "N Y X 3"]
    captions: Sequence[tuple[str, ...]]


def questions(seed: int, count: int) -> dict[str, Questions]:
    """Held-out questions by kind.

    "content" asks which of four captions names the two objects; each wrong one names one absent object. "binding" asks
    which object has which colour, in held-out colours. "relation" asks which object is above, below, left or right, at
    held-out pairs of places. "negation" asks which object is present and which is missing; either is named first.
    "presence" asks whether a second object is there, which is as often as not.
    """
    rng = np.random.default_rng((seed, 8))
    scenes = sample(rng, count, 2, lambda scenes: is_held_out(scenes)[0] | is_held_out(scenes)[1])
    content = []
    for row in range(count):
        absent = [index for index in range(len(SHAPES)) if index not in scenes.objects[row]]
        wrong = [article(SHAPES[index]) for index in rng.choice(absent, 3, replace=False)]
        first = int(rng.integers(2))
        kept = name(scenes, row, first)
        style = STYLES[rng.integers(3)]
        content.append(tuple(style.format(f"{kept} and {other}") for other in (name(scenes, row, 1 - first), *wrong)))
    found = {"content": Questions(pictures=drawn.render(scenes, IMAGE_SIZE), captions=content)}
    for kind, items in (
        ("binding", attributes(rng, count, lambda scenes: is_held_out(scenes)[0])),
        ("relation", spatial(rng, count, lambda scenes: is_held_out(scenes)[1])),
    ):
        # Either wording, so that the order of the names carries no information.
        version = rng.integers(2, size=count)
        captions = [(item.captions[k], item.opposite_captions[k]) for item, k in zip(items, version, strict=True)]
        found[kind] = Questions(pictures=np.stack([np.asarray(item.picture) for item in items]), captions=captions)
    items = negation(rng, count, lambda scenes: is_held_out(scenes)[0])
    captions = [(item.captions[0], item.opposite_captions[0]) for item in items]
    found["negation"] = Questions(pictures=np.stack([np.asarray(item.picture) for item in items]), captions=captions)
    items = presence(rng, count, lambda scenes: is_held_out(scenes)[0])
    # Either picture, so that "with" is right as often as "without".
    asked = [
        (item.picture, (item.captions[0], item.opposite_captions[0]))
        if rng.random() < 0.5
        else (item.opposite, (item.opposite_captions[0], item.captions[0]))
        for item in items
    ]
    found["presence"] = Questions(
        pictures=np.stack([np.asarray(picture) for picture, _ in asked]), captions=[captions for _, captions in asked]
    )
    return found


DEMONSTRATION = ("binding", "relation", "presence")
"""What the three pairs of captions of a demonstration ask."""


def demonstration(seed: int, count: int, shapes: tuple[str, str] | None = None, *, alone: bool = False) -> Questions:
    """Scenes like the published demonstration's, each with six captions in three pairs; the first of a pair is right.

    One object is above the other, in another colour: "red circle blue triangle" and "red triangle blue circle", "circle
    above triangle" and "circle below triangle", "circle with triangle" and "circle without triangle". No filter keeps
    out what tiny-clip or its scorers were trained on, or what they were not.

    Args:
        seed: of the scenes, which no training set shares.
        count: number of scenes.
        shapes: names of the two objects; any two by default.
        alone: remove the second object, so that the third pair is the other way round; the others then have no answer.
    """
    rng = np.random.default_rng((seed, 10))

    def kept(scenes: Scenes) -> np.ndarray:
        across, down = np.moveaxis(np.abs(scenes.centers[:, 0] - scenes.centers[:, 1]), -1, 0)
        return clear(scenes) & (down > across) & (scenes.colors[:, 0] != scenes.colors[:, 1])

    scenes = sample(rng, count, 2, kept)
    if shapes is not None:
        own = np.array([SHAPES.index(shape) for shape in shapes])
        scenes = dataclasses.replace(scenes, objects=own[rng.permuted(np.tile([0, 1], (count, 1)), axis=1)])
    captions = []
    for row in range(count):
        first, second = (SHAPES[index] for index in scenes.objects[row])
        tints = [COLOR_NAMES[index] for index in scenes.colors[row]]
        how = relation(scenes.centers[row, 0], scenes.centers[row, 1])
        presence = (f"{first} with {second}", f"{first} without {second}")
        captions.append(
            (
                f"{tints[0]} {first} {tints[1]} {second}",
                f"{tints[0]} {second} {tints[1]} {first}",
                f"{first} {how} {second}",
                f"{first} {RELATIONS[how]} {second}",
                *(presence[::-1] if alone else presence),
            )
        )
    if alone:
        scenes = with_second(scenes, np.full(count, -1))
    return Questions(pictures=drawn.render(scenes, IMAGE_SIZE), captions=captions)


def draw(out: Path, *, count: Annotated[int, Range(8)] = 200, seed: int = 0) -> str:
    """Draw the scorer's three training sets and an evaluation set, in their published layouts.

    File names say what a picture shows; repeated names get a number.

    Args:
        out: output folder of `spatial/`, `attributes/`, `negation.json`, and of `evaluation/` with the layouts of
            What'sUp A (two objects and their relation), NCD (their colours) and NegBench on COCO (what is missing).
        count: number of items in each set.
        seed: seed of the scenes.

    Returns:
        The folder.

    Raises:
        InputError: if the seed is out of range.
        OutputError: if the sets cannot be written.
    """
    check_seed(seed)
    rng = np.random.default_rng((seed, 7))
    sets = {"spatial": spatial(rng, count), "attributes": attributes(rng, count), "negation": negation(rng, count)}
    for kind, items in sets.items():
        if kind == "negation":
            named = [(item, *item.key.split("_", 1)) for item in items]
            rows = [(np.asarray(item.picture), np.asarray(item.opposite), here, there) for item, here, there in named]
            datasets.write_negation(out / "negation.json", rows)
            continue
        for stem, item in zip(_numbered(items), items, strict=True):
            datasets.write_pair(out / kind, stem, np.asarray(item.picture), np.asarray(item.opposite))
    rng = np.random.default_rng((seed, 9))
    folder = out / "evaluation"
    items = attributes(rng, count, lambda scenes: is_held_out(scenes)[0])
    for stem, item in zip(_numbered(items), items, strict=True):
        save_picture(folder / "NCD_colorful_composite_squares" / f"{stem}.png", np.asarray(item.picture))
    rows = []
    for index, item in enumerate(spatial(rng, count, lambda scenes: is_held_out(scenes)[1])):
        name = f"{index:05d}_{item.key}.png"
        save_picture(folder / "controlled_images" / name, np.asarray(item.picture))
        first, how, second = item.key.split("_")
        right = datasets.RELATIONS[how]
        wrong = [other for other in RELATIONS if other != right]
        options = [f"{article(first)} {said} {article(second)}" for said in (right, *wrong)]
        rows.append({"image_path": f"data/controlled_images/{name}", "caption_options": options})
    write_json(folder / "controlled_images_dataset.json", rows)
    lines = []
    for index, item in enumerate(negation(rng, count, lambda scenes: is_held_out(scenes)[0])):
        here, missing = item.key.split("_")
        save_picture(folder / "val2017" / f"{index:012d}.jpg", np.asarray(item.picture))
        wrong = (f"{article(missing)} but no {here}", f"{article(here)} and {article(missing)}")
        captions = [f"{article(here)} but no {missing}", *wrong, f"no {here} but {article(missing)}"]
        lines.append([f"val2017/{index:012d}.jpg", "0", *captions, "hybrid"])
    head = ["image_path", "correct_answer", *(f"caption_{k}" for k in range(4)), "correct_answer_template"]
    write_csv(folder / "images" / "COCO_val_mcq_llama3.1_rephrased.csv", [head, *lines])
    return str(out)


def _numbered(items: Sequence[Item]) -> list[str]:
    """Unique names of the items."""
    seen = Counter[str]()
    names = []
    for item in items:
        seen[item.key] += 1
        names.append(item.key if seen[item.key] == 1 else f"{item.key}.{seen[item.key]}")
    return names
