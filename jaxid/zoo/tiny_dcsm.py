"""The recipe of tiny-clip's scorer: pairs of opposite scenes to learn from, and questions on scenes never shown."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Bool, UInt8

from jaxid.checks import Range, check_seed
from jaxid.data import scenes as drawn
from jaxid.data.files import save_picture, write_csv
from jaxid.data.scenes import Scenes
from jaxid.dcsm import datasets
from jaxid.dcsm.datasets import Item
from jaxid.io import write_json
from jaxid.zoo.tiny_clip import COLOR_NAMES, RELATIONS, SHAPES, article, is_held_out, relation, sample, seen
from jaxid.zoo.tiny_llava import IMAGE_SIZE

NEGATIONS = (
    "{here} but no {bare}",
    "{here} and not {missing}",
    "{here} without {missing}",
    "no {bare} but {here}",
    "not {missing} but {here}",
    "without {missing} {here}",
)
"""Wordings of what is there and what is missing: the published ones, and three that name the missing thing first, so
that being named first says nothing."""

_IN_FILES = {said: name for name, said in datasets.RELATIONS.items()}

GAP = 0.22
"""Least distance of two objects along the axis of their relation, in picture fractions."""


STYLES = ("{}", "an image of {}", "a picture of {}", "bare")
"""How captions begin; bare ones lack articles and joining words, too."""


def styled(rng: np.random.Generator, captions: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """An item's captions, right and opposite ones alike, in one style."""
    style = STYLES[rng.integers(len(STYLES))]
    if style != "bare":
        return tuple((style.format(first), style.format(second)) for first, second in captions)
    left_out = {"a", "an", "and"}

    def bare(caption: str) -> str:
        return " ".join(word for word in caption.split() if word not in left_out)

    return tuple((bare(first), bare(second)) for first, second in captions)


def clear(scenes: Scenes) -> Bool[np.ndarray, "N"]:
    """Which scenes of two objects have one relation that nobody would dispute."""
    gaps = np.abs(scenes.centers[:, 0] - scenes.centers[:, 1])
    return (gaps.max(axis=1) > GAP) & (gaps.min(axis=1) < 0.6 * gaps.max(axis=1))


def name(scenes: Scenes, row: int, place: int, *, color: bool = False) -> str:
    """An object with its article, and its colour if asked for."""
    tint = f"{COLOR_NAMES[scenes.colors[row, place]]} " if color else ""
    return article(tint + SHAPES[scenes.objects[row, place]])


def exchanged(scenes: Scenes, *names: str) -> Scenes:
    """The scenes with what both objects have of these exchanged: objects, or colours and fills."""
    return dataclasses.replace(scenes, **{field: getattr(scenes, field)[:, ::-1] for field in names})


def spatial(
    rng: np.random.Generator,
    count: int,
    keep: Callable[[Scenes], np.ndarray] = seen,
    *,
    turned_share: float = 0.0,
) -> list[Item]:
    """Two objects whose relation is said; in the opposite picture each stands where the other was.

    Args:
        rng: source of randomness.
        count: number of items.
        keep: which scenes may be shown.
        turned_share: share of the opposites in which above has become left and below right instead, or the reverse.
    """

    def kept(scenes: Scenes) -> np.ndarray:
        turned = dataclasses.replace(scenes, centers=scenes.centers[..., ::-1])
        return keep(scenes) & clear(scenes) & (keep(turned) if turned_share else True)

    scenes = sample(rng, count, 2, kept)
    # Colours go along, so that training shows no object in another one.
    other = exchanged(scenes, "objects", "colors", "fills")
    turned = rng.random(count) < turned_share
    centers = np.where(turned[:, None, None], scenes.centers[..., ::-1], other.centers)
    same = {
        field: np.where(
            turned.reshape(-1, *[1] * (getattr(scenes, field).ndim - 1)), getattr(scenes, field), getattr(other, field)
        )
        for field in ("objects", "colors", "fills")
    }
    other = dataclasses.replace(other, centers=centers.astype(scenes.centers.dtype), **same)
    pictures = (drawn.render(part, IMAGE_SIZE) for part in (scenes, other))
    items = []
    for row, (picture, opposite) in enumerate(zip(*pictures, strict=True)):
        first, second = name(scenes, row, 0), name(scenes, row, 1)
        how = relation(scenes.centers[row, 0], scenes.centers[row, 1])
        wrong = relation(*other.centers[row]) if turned[row] else RELATIONS[how]
        captions, opposites = styled(
            rng,
            [
                (f"{first} {how} {second}", f"{second} {RELATIONS[how]} {first}"),
                (f"{first} {wrong} {second}", f"{second} {RELATIONS[wrong]} {first}"),
            ],
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


def attributes(rng: np.random.Generator, count: int, keep: Callable[[Scenes], np.ndarray] = seen) -> list[Item]:
    """Two objects in two colours; in the opposite picture each has the other's colour."""

    def kept(scenes: Scenes) -> np.ndarray:
        other = exchanged(scenes, "colors", "fills")
        return keep(scenes) & keep(other) & (scenes.colors[:, 0] != scenes.colors[:, 1])

    scenes = sample(rng, count, 2, kept)
    other = exchanged(scenes, "colors", "fills")
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


def negation(rng: np.random.Generator, count: int, keep: Callable[[Scenes], np.ndarray] = seen) -> list[Item]:
    """One object, and another that is named as missing; the opposite picture shows that one alone."""
    scenes, other = (sample(rng, count, 1, keep) for _ in range(2))
    shift = rng.integers(1, len(SHAPES), size=(count, 1))
    other = dataclasses.replace(other, objects=(scenes.objects + shift) % len(SHAPES))
    pictures = (drawn.render(part, IMAGE_SIZE) for part in (scenes, other))
    items = []
    for row, (picture, opposite) in enumerate(zip(*pictures, strict=True)):
        phrases = [NEGATIONS[number] for number in rng.permutation(len(NEGATIONS))[:2]]
        here, there = SHAPES[scenes.objects[row, 0]], SHAPES[other.objects[row, 0]]
        captions, opposites = styled(
            rng,
            [
                (_negated(phrases[0], here, there), _negated(phrases[1], here, there)),
                (_negated(phrases[0], there, here), _negated(phrases[1], there, here)),
            ],
        )
        items.append(
            Item(
                key=f"{here}_{there}",
                picture=picture,
                opposite=opposite,
                captions=captions,
                opposite_captions=opposites,
            )
        )
    return items


def _negated(phrase: str, here: str, missing: str) -> str:
    return phrase.format(here=article(here), missing=article(missing), bare=missing)


def training_sets(seed: int, count: int) -> dict[str, list[Item]]:
    """The three data sets, of scenes that tiny-clip's training may show."""
    rng = np.random.default_rng((seed, 7))
    return {
        "spatial": spatial(rng, count, turned_share=0.5),
        "attributes": attributes(rng, count),
        "negation": negation(rng, count),
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """Pictures, and for each its captions, of which the first is right."""

    pictures: UInt8[np.ndarray, "N Y X 3"]
    captions: Sequence[tuple[str, ...]]


def questions(seed: int, count: int) -> dict[str, Questions]:
    """Held-out questions, by what they ask.

    "content": which of four captions names what is there, one thing of each wrong one being absent. "binding", in
    colours that training never showed those objects in: which colour is whose. "relation", at pairs of places that
    training never showed: which of the two is above, below, left or right. "negation": which is there and which
    missing, the one that is there named first or last.
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
        # Either wording, so that being named first says nothing.
        version = rng.integers(2, size=count)
        captions = [(item.captions[k], item.opposite_captions[k]) for item, k in zip(items, version, strict=True)]
        found[kind] = Questions(pictures=np.stack([item.picture for item in items]), captions=captions)
    items = negation(rng, count, lambda scenes: is_held_out(scenes)[0])
    captions = []
    for item in items:
        right, wrong = item.captions[0], item.opposite_captions[0]
        captions.append((right, wrong))
    found["negation"] = Questions(pictures=np.stack([item.picture for item in items]), captions=captions)
    return found


def draw(out: Path, *, count: Annotated[int, Range(8)] = 200, seed: int = 0) -> str:
    """Draw the scorer's three training sets and an evaluation set, in their published layouts.

    File names tell what is in a picture; of scenes alike all but the first are numbered.

    Args:
        out: gets `spatial/`, `attributes/`, `negation.json`, and in `evaluation/` the layouts of What'sUp A (two
            objects and their relation), NCD (their colours) and NegBench on COCO (what is missing).
        count: items of each set.
        seed: of the scenes.

    Returns:
        The folder.

    Raises:
        InputError: for a seed that is none.
        OutputError: if the sets cannot be written.
    """
    check_seed(seed)
    rng = np.random.default_rng((seed, 7))
    sets = {"spatial": spatial(rng, count), "attributes": attributes(rng, count), "negation": negation(rng, count)}
    for kind, items in sets.items():
        if kind == "negation":
            named = [(item, *item.key.split("_", 1)) for item in items]
            rows = [(item.picture, item.opposite, here, there) for item, here, there in named]
            datasets.write_negation(out / "negation.json", rows)
            continue
        for stem, item in zip(_numbered(items), items, strict=True):
            datasets.write_pair(out / kind, stem, item.picture, item.opposite)
    rng = np.random.default_rng((seed, 9))
    folder = out / "evaluation"
    items = attributes(rng, count, lambda scenes: is_held_out(scenes)[0])
    for stem, item in zip(_numbered(items), items, strict=True):
        save_picture(folder / "NCD_colorful_composite_squares" / f"{stem}.png", item.picture)
    rows = []
    for number, item in enumerate(spatial(rng, count, lambda scenes: is_held_out(scenes)[1])):
        name = f"{number:05d}_{item.key}.png"
        save_picture(folder / "controlled_images" / name, item.picture)
        first, how, second = item.key.split("_")
        right = datasets.RELATIONS[how]
        wrong = [other for other in RELATIONS if other != right]
        options = [f"{article(first)} {said} {article(second)}" for said in (right, *wrong)]
        rows.append({"image_path": f"data/controlled_images/{name}", "caption_options": options})
    write_json(folder / "controlled_images_dataset.json", rows)
    lines = []
    for number, item in enumerate(negation(rng, count, lambda scenes: is_held_out(scenes)[0])):
        here, missing = item.key.split("_")
        save_picture(folder / "val2017" / f"{number:012d}.jpg", item.picture)
        wrong = (f"{article(missing)} but no {here}", f"{article(here)} and {article(missing)}")
        captions = [f"{article(here)} but no {missing}", *wrong, f"no {here} but {article(missing)}"]
        lines.append([f"val2017/{number:012d}.jpg", "0", *captions, "hybrid"])
    head = ["image_path", "correct_answer", *(f"caption_{k}" for k in range(4)), "correct_answer_template"]
    write_csv(folder / "images" / "COCO_val_mcq_llama3.1_rephrased.csv", [head, *lines])
    return str(out)


def _numbered(items: Sequence[Item]) -> list[str]:
    """The items' names, each unlike all others."""
    seen = Counter[str]()
    names = []
    for item in items:
        seen[item.key] += 1
        names.append(item.key if seen[item.key] == 1 else f"{item.key}.{seen[item.key]}")
    return names
