"""Evaluation of tiny-llava on held-out scenes."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import UInt8

from jaxid.checks import check_finite
from jaxid.data import scenes as drawn
from jaxid.data.coco_spatial import ANSWERS, SpatialItem
from jaxid.data.scenes import OBJECTS, Scenes
from jaxid.families.base import Model
from jaxid.interp.forward import forward
from jaxid.prompts.pictures import Clip
from jaxid.stats import confidence_interval
from jaxid.zoo import llava_texts
from jaxid.zoo import tiny_llava as recipe
from jaxid.zoo.llava_texts import COLUMN_WORDS, MIN_GAP, ROW_WORDS, VOCABULARY, Seen, Text
from jaxid.zoo.tiny_llava import World

Shown = Sequence[np.ndarray] | Sequence[Clip] | UInt8[np.ndarray, "N Y X 3"]
"""Pictures or clips."""

QUESTIONS = 512
"""Number of questions of each kind in the evaluation after training."""


def held_out_scenes(rng: np.random.Generator, count: int) -> Scenes:
    """Two-object scenes, half on the grid and half free, each with a held-out pair of objects or of places."""
    grid = recipe.grid_scenes(rng, 8 * count)
    grid = grid[np.flatnonzero(recipe.is_held_out(grid))[: count // 2]]
    free = drawn.sample_free(rng, 10 * count, num_objects=(2, 2), size_range=(0.17, 0.25))
    free = free[np.flatnonzero(recipe.is_held_out(free))[: count - count // 2]]
    return drawn.concatenate([grid, free])


def relation_items(
    rng: np.random.Generator, count: int, axis: str
) -> tuple[list[SpatialItem], UInt8[np.ndarray, "N Y X 3"]]:
    """Held-out scenes with a question about one axis; the subject is either object with equal probability."""
    along = list(ANSWERS).index(axis)
    scenes = held_out_scenes(rng, 2 * count)
    gap = scenes.centers[:, 0, along] - scenes.centers[:, 1, along]
    chosen = np.flatnonzero(np.abs(gap) >= MIN_GAP)
    scenes = scenes[rng.permutation(chosen)[:count]]
    pictures = drawn.render(scenes, recipe.IMAGE_SIZE)
    items = []
    for row, picture in enumerate(pictures):
        first = int(rng.integers(2))
        subject, other = scenes.objects[row, first], scenes.objects[row, 1 - first]
        after = scenes.centers[row, first, along] > scenes.centers[row, 1 - first, along]
        items.append(
            SpatialItem(
                image_id=row,
                picture=picture,
                subject=OBJECTS[subject],
                object=OBJECTS[other],
                relation=ANSWERS[axis][int(after)],
            )
        )
    return items, pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A share of correct answers with its 95 % interval."""

    value: float
    low: float
    high: float
    count: int


def answers(model: Model, shown: Shown, questions: Sequence[str], batch_size: int = 128) -> list[str]:
    """The model's one-word answers about pictures or clips: the most probable token of the whole vocabulary."""
    found: list[str] = []
    for start in range(0, len(questions), batch_size):
        rows = slice(start, start + batch_size)
        logits = np.asarray(forward(model, model.prepare(list(shown[rows]), list(questions[rows]))).logits)
        check_finite(f"logits of {model.name}", logits)
        found += [model.processor.decode([int(token)]) for token in logits.argmax(-1)]
    return found


def accuracy(
    model: Model, shown: Shown, questions: Sequence[str], truths: Sequence[str], batch_size: int = 128
) -> Accuracy:
    """Share of questions that are answered with exactly the true word."""
    given = answers(model, shown, questions, batch_size)
    right = sum(answer == truth for answer, truth in zip(given, truths, strict=True))
    low, high = confidence_interval(right, len(truths))
    return Accuracy(value=right / len(truths), low=low, high=high, count=len(truths))


def held_out_worlds(rng: np.random.Generator, count: int, sample: Callable[[int], World]) -> World:
    """Scenes of a sampler with a held-out pair of objects or of places each."""
    kept: list[World] = []
    while sum(len(world.scenes) for world in kept) < count:
        found = sample(4 * count)
        chosen = recipe.is_held_out(found.scenes)
        kept.append(World(scenes=found.scenes[chosen], depths=found.depths[chosen]))
    world = recipe.joined(kept)
    order = rng.permutation(len(world.scenes))[:count]
    return World(scenes=world.scenes[order], depths=world.depths[order])


def texts_about(
    world: World, ask: Callable[[np.random.Generator, Seen], Text | None], rng: np.random.Generator
) -> list[tuple[int, Text]]:
    """The questions of one kind about scenes that allow them, each with its scene's index."""
    return [(row, text) for row in range(len(world.scenes)) if (text := ask(rng, world.seen(row))) is not None]


def knows_words(model: Model, texts: Sequence[str]) -> bool:
    """Whether a model's vocabulary holds all words of texts, whose tokens are separated by spaces."""
    return {word for text in texts for word in text.split()} <= set(model.processor.tokenizer.get_vocab())


def relations(model: Model, rng: np.random.Generator, count: int) -> dict[str, Accuracy]:
    """Accuracy on left or right, and on above or below, in held-out scenes."""
    results: dict[str, Accuracy] = {}
    for axis, name in (("horizontal", "left_right"), ("vertical", "above_below")):
        items, pictures = relation_items(rng, count, axis)
        questions = [item.query for item in items]
        results[name] = accuracy(model, pictures, questions, [item.relation for item in items])
    return results


def relation_share(model: Model, *, count: int) -> float:
    """Share of questions about both relations that are answered correctly, on scenes of their own."""
    found = relations(model, np.random.default_rng((977, 0, 3)), count)
    return float(np.mean([one.value for one in found.values()]))


def evaluate(model: Model, *, count: int = 256, seed: int = 1) -> dict[str, Accuracy]:
    """Accuracy on held-out scenes, by kind of question.

    left_right, above_below, where, exists, color; near_far, statement and between; depth, and depth by one cue alone
    (depth_size, depth_height, depth_overlap). Kinds with words that the model does not know are skipped.
    """
    rng = np.random.default_rng((977, seed))
    results = relations(model, rng, count)

    scenes = held_out_scenes(rng, count)
    pictures = drawn.render(scenes, recipe.IMAGE_SIZE)
    asked = rng.integers(2, size=len(pictures))
    rows = np.arange(len(pictures))
    objects, places = scenes.objects[rows, asked], recipe.cells(scenes)[rows, asked]
    names = [OBJECTS[index] for index in objects]
    places_words = [COLUMN_WORDS[place % 4] + ROW_WORDS[place // 4] for place in places]
    # The cell of a centre within half a pixel of a border is ambiguous.
    distance = np.abs(scenes.centers[rows, asked] * 4 - np.round(scenes.centers[rows, asked] * 4)).min(axis=-1)
    sure = np.flatnonzero(distance >= 4 * 0.5 / recipe.IMAGE_SIZE)
    results["where"] = accuracy(
        model,
        pictures[sure],
        [f"Where is the {names[row]}?" for row in sure],
        [places_words[row] for row in sure],
    )
    absent = [
        OBJECTS[rng.choice([index for index in range(len(OBJECTS)) if index not in scenes.objects[row]])]
        for row in rows
    ]
    half = len(rows) // 2
    results["exists"] = accuracy(
        model,
        pictures,
        [f"Is there a {name}?" for name in [*names[:half], *absent[half:]]],
        ["yes"] * half + ["no"] * (len(rows) - half),
    )
    colors = [list(drawn.COLORS)[index] for index in scenes.colors[rows, asked]]
    results["color"] = accuracy(model, pictures, [f"What color is the {name}?" for name in names], colors)

    pairs = recipe.flat(scenes)
    threes = held_out_worlds(rng, count, lambda size: recipe.flat(recipe.between_scenes(rng, size)))
    kinds = {
        "near_far": (pairs, llava_texts.near_far),
        "statement": (pairs, llava_texts.statement),
        "between": (threes, llava_texts.between),
    }
    for cues in recipe.CUES:
        world = held_out_worlds(rng, count, partial(recipe.perspective, rng, cues))
        kinds["depth" if cues == "all" else f"depth_{cues}"] = (world, llava_texts.depth)
    for name, (world, ask) in kinds.items():
        found = texts_about(world, ask, rng)
        if knows_words(model, [text for _, (text, _) in found]):
            pictures = drawn.render(world.scenes[[row for row, _ in found]], recipe.IMAGE_SIZE)
            truths = [VOCABULARY[label] for _, (_, label) in found]
            results[name] = accuracy(model, pictures, [text for _, (text, _) in found], truths)
    return results
