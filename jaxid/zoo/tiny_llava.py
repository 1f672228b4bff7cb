"""The recipe of tiny-llava: its network, its training scenes and its training batches."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxid.data import scenes as drawn
from jaxid.data.perspective import sample_perspective
from jaxid.data.relations import is_between
from jaxid.data.scenes import COLORS, OBJECTS, Scenes
from jaxid.families.llava import LlavaConfig
from jaxid.nn.decoder_config import DecoderConfig, RopeConfig
from jaxid.nn.vision import VisionConfig
from jaxid.zoo.llava_texts import (
    BINS,
    VOCABULARY,
    VOCABULARY_SIZE,
    Mix,
    Seen,
    Text,
    caption,
    caption_alone,
    color_caption,
    encode,
    exists,
    long_relation,
    question,
    spoken,
    without_picture,
    word_label,
    word_places,
)
from jaxid.zoo.packing import Layout, packed
from jaxid.zoo.sampling import symmetric_sample

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's chat template."""

IMAGE_SIZE, PATCH_SIZE = 72, 12
PIXEL_MEAN, PIXEL_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def config() -> LlavaConfig:
    """The network's shape: about a million parameters."""
    return LlavaConfig(
        text_config=DecoderConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,
            rope=RopeConfig(rope_theta=10000.0),
        ),
        vision_config=VisionConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        image_token_index=VOCABULARY.index("<image>"),
        vision_feature_layer=(-1,),
    )


# --- packed prompts ------------------------------------------------------------------------------------------------

Kind = Literal["column", "row", "color", "question", "long question", "alone", "caption alone"]
"""What a slot holds; the last two are prompts of their own, without the picture."""

LENGTHS: dict[Kind, int] = {
    "column": 5,
    "row": 5,
    "color": 4,
    "question": 16,
    "long question": 25,
    "alone": 28,
    "caption alone": 12,
}
"""Number of tokens of each kind of slot."""

_BOUND: tuple[Kind, ...] = ("column", "row", "color")
_ASKED: tuple[Kind, ...] = ("question",)
SLOTS: dict[str, tuple[Kind, ...]] = {
    "binding": (*4 * _BOUND, "caption alone", "caption alone"),
    "language": ("column", "row", *5 * _ASKED, "long question", "alone"),
}
"""The texts packed after one picture, by stage; each attends to the picture and to itself, not to its neighbours."""

BEFORE = "<s> USER :"


@lru_cache
def layout(stage: str = "language") -> Layout:
    """The layout that all training rows of a stage share."""
    kinds = SLOTS[stage]
    return packed(
        encode(BEFORE),
        config().image_tokens,
        (),
        [LENGTHS[kind] for kind in kinds],
        image_token=VOCABULARY.index("<image>"),
        alone=[index for index, kind in enumerate(kinds) if kind.endswith("alone")],
    )


# --- scenes and questions ------------------------------------------------------------------------------------------


def held_out_pairs() -> Bool[np.ndarray, "O O"]:
    """Pairs of objects that never share a training picture (8 of 120)."""
    return symmetric_sample(len(OBJECTS), 8, seed=101)


def held_out_places() -> Bool[np.ndarray, "16 16"]:
    """Pairs of cells (y * 4 + x) that no two objects of a training picture occupy (12 of 120)."""
    return symmetric_sample(16, 12, seed=102)


def cells(scenes: Scenes) -> Int[np.ndarray, "N K"]:
    """Index y * 4 + x of the cell of every object's centre."""
    column, row = np.moveaxis(np.clip((scenes.centers * 4).astype(int), 0, 3), -1, 0)
    return row * 4 + column


def is_held_out(scenes: Scenes) -> Bool[np.ndarray, "N"]:
    """Which scenes contain a pair of objects or a pair of places that training never shows."""
    present = scenes.objects >= 0
    both = present[:, :, None] & present[:, None, :] & ~np.eye(scenes.objects.shape[1], dtype=bool)
    objects, places = np.maximum(scenes.objects, 0), cells(scenes)
    forbidden = held_out_pairs()[objects[:, :, None], objects[:, None, :]]
    forbidden |= held_out_places()[places[:, :, None], places[:, None, :]]
    return np.any(forbidden & both, axis=(1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Scenes, and the distance of every object from the viewer: 0 in scenes without depth."""

    scenes: Scenes
    depths: Float[np.ndarray, "N K"]

    def seen(self, row: int) -> Seen:
        """The objects of one scene."""
        scenes = self.scenes
        present = np.flatnonzero(scenes.objects[row] >= 0)
        return Seen(
            names=[OBJECTS[index] for index in scenes.objects[row][present]],
            colors=[list(COLORS)[index] for index in scenes.colors[row][present]],
            centers=scenes.centers[row][present],
            depths=self.depths[row][present],
        )


CUES = {"all": 0.45, "size": 0.15, "height": 0.15, "overlap": 0.25}
"""Share of each set of cues among the scenes with depth."""


def training_world(rng: np.random.Generator, count: int) -> World:
    """Scenes without held-out pairs of objects or places.

    A fifth are on the grid, three in ten have depth, a fifth have an object in between two others, and the rest are
    free with 1 to 4 objects.
    """
    on_grid, deep, inside = count // 5, 3 * count // 10, count // 5
    parts = [not_held_out(lambda size: flat(grid_scenes(rng, size)), on_grid)]
    for size, (cues, _) in zip(_split(deep, list(CUES.values())), CUES.items(), strict=True):
        parts.append(not_held_out(partial(perspective, rng, cues), size))
    parts.append(not_held_out(lambda size: flat(between_scenes(rng, size)), inside))
    for index, size in enumerate(_split(count - on_grid - deep - inside, (0.1, 0.3, 0.3, 0.3))):
        draw = partial(drawn.sample_free, rng, num_objects=(index + 1, index + 1), size_range=(0.17, 0.26))
        parts.append(not_held_out(lambda size, draw=draw: flat(draw(size)), size))
    return joined(parts)


def _split(count: int, shares: Sequence[float]) -> list[int]:
    """Divides a number by shares that sum to 1; the last part takes what rounding leaves."""
    sizes = [int(share * count) for share in shares]
    return [*sizes[:-1], count - sum(sizes[:-1])]


def flat(scenes: Scenes) -> World:
    """Scenes without depth."""
    return World(scenes=scenes, depths=np.zeros(scenes.objects.shape, np.float32))


def perspective(rng: np.random.Generator, cues: str, count: int) -> World:
    """Scenes of two or three objects with depth."""
    scenes, depths = sample_perspective(rng, count, cues=cues)
    return World(scenes=scenes, depths=depths)


def joined(parts: Sequence[World]) -> World:
    """All scenes of the parts in order."""
    scenes = drawn.concatenate([part.scenes for part in parts])
    slots = scenes.objects.shape[1]
    depths = [np.pad(part.depths, ((0, 0), (0, slots - part.depths.shape[1]))) for part in parts]
    return World(scenes=scenes, depths=np.concatenate(depths).astype(np.float32))


def between_scenes(rng: np.random.Generator, count: int) -> Scenes:
    """Free scenes of three objects, one of which is in between the others."""
    kept = drawn.sample_free(rng, 0, num_objects=(3, 3))
    while len(kept) < count:
        scenes = drawn.sample_free(rng, 6 * count, num_objects=(3, 3), size_range=(0.17, 0.24))
        orders = ([1, 2, 0], [0, 2, 1], [0, 1, 2])
        chosen = np.array([any(is_between(centers[order]) for order in orders) for centers in scenes.centers])
        kept = drawn.concatenate([kept, scenes[chosen]])
    return kept[:count]


def not_held_out(sample: Callable[[int], World], count: int) -> World:
    """Draws until there are `count` scenes without held-out pairs."""
    kept = []
    while sum(len(world.scenes) for world in kept) < count or not kept:
        found = sample(2 * count)
        allowed = ~is_held_out(found.scenes)
        kept.append(World(scenes=found.scenes[allowed], depths=found.depths[allowed]))
    world = joined(kept)
    return World(scenes=world.scenes[:count], depths=world.depths[:count])


def grid_scenes(rng: np.random.Generator, count: int, *, jitter: float = 1.0) -> Scenes:
    """Two-object scenes on the grid, with jittered sizes, angles and centres."""
    pairs = rng.random((count, len(OBJECTS))).argsort(axis=1)[:, :2]
    places = rng.random((count, 16)).argsort(axis=1)[:, :2]
    places = np.stack([places % 4, places // 4], axis=-1)
    return drawn.sample_grid(
        rng,
        pairs[:, 0],
        places[:, 0],
        pairs[:, 1],
        places[:, 1],
        jitter_size=0.1 * jitter,
        jitter_angle=15.0 * jitter,
        jitter_center=0.15 * jitter,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch, ready for the device."""

    pictures: UInt8[np.ndarray, "N Y X 3"]
    token_ids: Int[np.ndarray, "N T"]
    labels: Int[np.ndarray, "N T"]  # what comes next where the loss asks for it (`targets`), else -1
    patches: Int[np.ndarray, "N I 6"]  # see `patch_labels`


def training_batch(seed: int, step: int, size: int, *, stage: str = "language") -> Batch:
    """The batch of a step, a pure function of its arguments, so that a resumed run sees the same data."""
    rng = np.random.default_rng((seed, step))
    world, plan = training_world(rng, size), layout(stage)
    token_ids = np.tile(plan.token_ids, (size, 1))
    labels = np.full((size, len(plan.token_ids)), -1, np.int32)
    end = word_label("</s>")
    for row in range(size):
        seen, place = world.seen(row), plan.text_start
        for kind in SLOTS[stage]:
            before, (text, label), closing = _text(rng, seen, kind)
            ids, length = encode(before + text + closing), LENGTHS[kind]
            token_ids[row, place : place + len(ids)] = ids
            if kind.endswith("alone") or rng.random() < PLACED:
                for index, region in word_places(ids).items():
                    labels[row, place + index] = region
            labels[row, place + len(ids) - 1] = label
            if closing and len(ids) < length:
                token_ids[row, place + len(ids)] = spoken(label)
                labels[row, place + len(ids)] = end
            place += length
    return Batch(
        pictures=drawn.render(world.scenes, IMAGE_SIZE),
        token_ids=token_ids,
        labels=labels,
        patches=patch_labels(world.scenes),
    )


PLACED = 0.25
"""Share of the texts about a picture in which words for places are continued with their columns or rows.

In texts without a picture they always are. Without that, the words lose their places as questions are learned.
"""

_CLOSING = " ASSISTANT :"


def _text(rng: np.random.Generator, seen: Seen, kind: Kind) -> tuple[str, Text, str]:
    """What a slot holds: tokens before a text, the text and its label, and tokens after it."""
    match kind:
        case "column" | "row":
            return "", caption(rng, seen, int(kind == "row")), ""
        case "color":
            return "", color_caption(rng, seen), ""
        case "question":
            return "", question(rng, seen, Mix()), _CLOSING
        case "long question":
            return "", long_relation(rng, seen) or exists(rng, seen), _CLOSING
        case "alone":
            text, asked = without_picture(rng)
            return f"{BEFORE} ", text, _CLOSING * asked
        case "caption alone":
            return f"{BEFORE} ", caption_alone(rng), ""


def sight_batch(seed: int, step: int, size: int) -> Batch:
    """A batch without texts for the first stage, a pure function of its arguments."""
    rng = np.random.default_rng((seed, step, 1))
    scenes = training_world(rng, size).scenes
    nothing = np.zeros((size, 0), np.int32)
    return Batch(
        pictures=drawn.render(scenes, IMAGE_SIZE), token_ids=nothing, labels=nothing, patches=patch_labels(scenes)
    )


def patch_labels(scenes: Scenes) -> Int[np.ndarray, "N I 6"]:
    """Labels of the auxiliary head, for every patch: the nearest object whose box contains the patch's centre.

    In order: the object (from 1; 0 is none), its place along x and along y (one of `BINS`), its colour, whether it
    overlaps another in front of it (1), only ones behind it (0), or none (-1), and its size (one of `SIZES`); each -1
    where there is no object.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    ticks = (np.arange(side) + 0.5) / side
    points = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    present = scenes.objects >= 0
    distance = np.abs(points[None, :, None] - scenes.centers[:, None]).max(axis=-1)
    inside = (distance < scenes.sizes[:, None] / 2) & present[:, None]
    slots = np.arange(scenes.objects.shape[1])
    # Later objects are drawn over earlier ones.
    chosen, here = np.where(inside, slots, -1).argmax(axis=-1), inside.any(-1)

    def of(values: Int[np.ndarray, "N K"]) -> Int[np.ndarray, "N I"]:
        return np.where(here, np.take_along_axis(values, chosen, axis=1), -1)

    bins = np.clip((scenes.centers * BINS).astype(np.int64), 0, BINS - 1)
    apart = np.abs(scenes.centers[:, :, None] - scenes.centers[:, None]).max(axis=-1)
    overlap = apart < (scenes.sizes[:, :, None] + scenes.sizes[:, None]) / 2
    overlap &= present[:, :, None] & present[:, None]
    front = (overlap & (slots[:, None] > slots)).any(axis=-1)
    behind = (overlap & (slots[:, None] < slots)).any(axis=-1)
    sizes = np.clip((scenes.sizes - 0.14) / 0.05, 0, SIZES - 1).astype(np.int64)
    objects = np.where(here, of(scenes.objects + 1), 0)
    others = (bins[..., 0], bins[..., 1], scenes.colors, np.where(behind, 1, np.where(front, 0, -1)), sizes)
    return np.stack([objects, *map(of, others)], axis=-1).astype(np.int32)


SIZES = 6
"""Number of sizes that the auxiliary head tells apart."""
