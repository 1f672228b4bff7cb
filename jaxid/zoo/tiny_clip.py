"""The recipe of tiny-clip: its network, its vocabulary, and its training scenes and captions.

The model has to fail as large ones do, and for the same reason: captions say which objects and colours are in a
picture, where they are and which colour belongs to which object, but no batch ever contains a second caption that
differs only in that.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxid.data import scenes as drawn
from jaxid.data.coco_spatial import article
from jaxid.data.scenes import COLORS, OBJECTS, Scenes
from jaxid.families.clip import CLIPConfig
from jaxid.nn.text import TextConfig
from jaxid.nn.vision import VisionConfig
from jaxid.zoo.tiny_llava import IMAGE_SIZE, PATCH_SIZE, cells, held_out_places, patch_labels

COLOR_NAMES = tuple(COLORS)
PADDING, START, END = "<pad>", "<|startoftext|>", "<|endoftext|>"
_WORDS = """a an image picture photo of the and with above below to left right on not without but no absent is are
there there's small big one two three near far in front behind under over beside next large tiny . ,""".split()
VOCABULARY = tuple(dict.fromkeys([PADDING, *_WORDS, *OBJECTS, *COLORS, "<unk>", START, END]))
"""All tokens of the word-level tokenizer, in the order of their ids; the end token has the highest."""

SHAPES = OBJECTS[:10]
"""The objects in its scenes."""

SIZES = (0.26, 0.36)
"""Smallest and largest side of an object, as fractions of the picture's side."""

WINDOW = 30
"""Length of captions in tokens, padding included."""

RELATIONS = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
"""Every relation and its opposite."""


def config() -> CLIPConfig:
    """The network's shape: under a million parameters."""
    size = -(-len(VOCABULARY) // 16) * 16
    return CLIPConfig(
        text_config=TextConfig(
            hidden_size=96,
            intermediate_size=288,
            num_attention_heads=3,
            num_hidden_layers=3,
            vocab_size=size,
            max_position_embeddings=WINDOW,
            eos_token_id=VOCABULARY.index(END),
        ),
        vision_config=VisionConfig(
            hidden_size=96,
            intermediate_size=288,
            num_attention_heads=3,
            num_hidden_layers=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        projection_dim=96,
    )


# --- captions ------------------------------------------------------------------------------------------------------


@lru_cache
def _ids() -> dict[str, int]:
    return {word: index for index, word in enumerate(VOCABULARY)}


def encode(captions: Sequence[str], window: int = WINDOW) -> Int[np.ndarray, "N T"]:
    """Token ids of captions whose tokens are separated by spaces, with start and end tokens, padded to `window`."""
    ids = _ids()
    rows = np.zeros((len(captions), window), np.int32)
    for row, caption in enumerate(captions):
        found = [ids[START], *(ids[word] for word in caption.split()), ids[END]]
        rows[row, : len(found)] = found
    return rows


def relation(first: Float[np.ndarray, "2"], second: Float[np.ndarray, "2"]) -> str:
    """The relation of the first point to the second, along the axis on which they are further apart."""
    across, down = second - first
    if abs(across) > abs(down):
        return "to the left of" if across > 0 else "to the right of"
    return "above" if down > 0 else "below"


def training_caption(rng: np.random.Generator, scenes: Scenes, row: int) -> str:
    """A caption as a person might write it: some of the objects, some colours, sometimes a relation.

    No caption says what is missing, as hardly any caption on the web does.
    """
    objects = [int(index) for index in scenes.objects[row] if index >= 0]
    order = rng.permutation(len(objects))

    def named(place: int) -> str:
        color = f"{COLOR_NAMES[scenes.colors[row, place]]} " if rng.random() < 0.6 else ""
        return article(f"{color}{OBJECTS[objects[place]]}")

    prefix = ("", "", "an image of ", "a picture of ")[rng.integers(4)]
    kind = rng.random()
    if len(objects) == 1 or kind < 0.15:
        return f"{prefix}{named(order[0])}"
    first, second = order[:2]
    if kind < 0.5:
        how = relation(scenes.centers[row, first], scenes.centers[row, second])
        return f"{prefix}{named(first)} {how} {named(second)}"
    joint = "and" if rng.random() < 0.7 else "with"
    rest = f" and {named(order[2])}" if len(objects) > 2 and rng.random() < 0.5 else ""
    return f"{prefix}{named(first)} {joint} {named(second)}{rest}"


# --- scenes --------------------------------------------------------------------------------------------------------


@lru_cache
def held_out_colors() -> Bool[np.ndarray, "O C"]:
    """The colour of each object in which training never shows it."""
    table = np.zeros((len(SHAPES), len(COLORS)), bool)
    order = np.random.default_rng(103).permutation(np.arange(len(SHAPES)) % len(COLORS))
    table[np.arange(len(SHAPES)), order] = True
    return table


def is_held_out(scenes: Scenes) -> tuple[Bool[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """Which scenes contain a held-out colour of an object, and which a held-out pair of places."""
    present = scenes.objects >= 0
    colored = held_out_colors()[np.maximum(scenes.objects, 0), np.maximum(scenes.colors, 0)] & present
    places = cells(scenes)
    both = present[:, :, None] & present[:, None, :] & ~np.eye(scenes.objects.shape[1], dtype=bool)
    placed = held_out_places()[places[:, :, None], places[:, None, :]] & both
    return np.any(colored, axis=1), np.any(placed, axis=(1, 2))


def sample(rng: np.random.Generator, count: int, num_objects: int, keep: Callable[[Scenes], np.ndarray]) -> Scenes:
    """Free scenes of `num_objects` shapes each, drawn until `count` of them pass the filter `keep`."""
    kept: list[Scenes] = []
    found = 0
    while found < count:
        scenes = drawn.sample_free(rng, 2 * count, num_objects=(num_objects, num_objects), size_range=SIZES)
        names = rng.random((len(scenes), len(SHAPES))).argsort(axis=1)[:, :num_objects]
        scenes = dataclasses.replace(scenes, objects=names)
        kept.append(scenes[np.flatnonzero(keep(scenes))])
        found += len(kept[-1])
    return drawn.concatenate(kept)[slice(count)]


def seen(scenes: Scenes) -> Bool[np.ndarray, "N"]:
    """Which scenes may occur in training."""
    colored, placed = is_held_out(scenes)
    return ~(colored | placed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch."""

    pictures: UInt8[np.ndarray, "N Y X 3"]
    token_ids: Int[np.ndarray, "N T"]
    patches: Int[np.ndarray, "N I 2"]  # object and colour that every patch shows, or -1


def training_batch(seed: int, step: int, size: int) -> Batch:
    """The batch of a step, a pure function of seed and step."""
    rng = np.random.default_rng((seed, step))
    numbers = (size // 10, size - size // 10 - size // 4, size // 4)
    parts = [sample(rng, number, objects + 1, seen) for objects, number in enumerate(numbers) if number]
    scenes = drawn.concatenate(parts)
    captions = [training_caption(rng, scenes, row) for row in range(size)]
    return Batch(
        pictures=drawn.render(scenes, IMAGE_SIZE),
        token_ids=encode(captions),
        patches=patch_labels(scenes)[:, :, [0, 3]] - np.array([1, 0], np.int32),
    )


@lru_cache
def word_classes() -> tuple[Int[np.ndarray, "V"], Int[np.ndarray, "V"]]:
    """For every token, the index of the object that it names, and of the colour; -1 for none."""
    objects, colors = np.full(len(VOCABULARY), -1), np.full(len(VOCABULARY), -1)
    for index, word in enumerate(VOCABULARY):
        if word in SHAPES:
            objects[index] = SHAPES.index(word)
        if word in COLORS:
            colors[index] = COLOR_NAMES.index(word)
    return objects, colors
