"""The recipe of tiny-clip: its shape, its words, its scenes and captions, and the questions that it is asked.

The model under study has to fail as large ones do, by the same cause: captions say which things and colours are in a
picture, how they stand and what is bound to what, but no batch ever holds a caption's twin in which only that is wrong.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxid.data import scenes as drawn
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
"""Every token of the word-level tokenizer; the index is the id, and the end token has the highest."""

SHAPES = OBJECTS[:10]
"""The objects of its scenes."""

SIZES = (0.26, 0.36)
"""Least and greatest side of an object, in picture fractions."""

WINDOW = 30
"""Tokens of the longest caption."""

RELATIONS = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
"""Every relation and its opposite."""


def config() -> CLIPConfig:
    """The network's shape: under a million parameters."""
    blocks: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 288, "num_attention_heads": 3}
    size = -(-len(VOCABULARY) // 16) * 16
    return CLIPConfig(
        text_config=TextConfig(
            **blocks,
            num_hidden_layers=3,
            vocab_size=size,
            max_position_embeddings=WINDOW,
            eos_token_id=VOCABULARY.index(END),
        ),
        vision_config=VisionConfig(**blocks, num_hidden_layers=4, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
        projection_dim=96,
    )


# --- captions ------------------------------------------------------------------------------------------------------


@lru_cache
def _ids() -> dict[str, int]:
    return {word: index for index, word in enumerate(VOCABULARY)}


def encode(captions: Sequence[str], window: int = WINDOW) -> Int[np.ndarray, "N T"]:
    """Token ids of captions whose tokens are separated by spaces, with start, end and padding."""
    ids = _ids()
    rows = np.zeros((len(captions), window), np.int32)
    for row, caption in enumerate(captions):
        found = [ids[START], *(ids[word] for word in caption.split()), ids[END]]
        rows[row, : len(found)] = found
    return rows


def article(name: str) -> str:
    """The name with "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def relation(first: Float[np.ndarray, "2"], second: Float[np.ndarray, "2"]) -> str:
    """How the first place lies to the second, along the axis on which they are further apart."""
    across, down = second - first
    if abs(across) > abs(down):
        return "to the left of" if across > 0 else "to the right of"
    return "above" if down > 0 else "below"


def training_caption(rng: np.random.Generator, scenes: Scenes, row: int) -> str:
    """A caption as a person might write it: some of the objects, some colours, now and then how two of them stand.

    What is missing is never said, as hardly any caption of the web does.
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
    """Colours in which training never shows an object: one for each of them."""
    table = np.zeros((len(SHAPES), len(COLORS)), bool)
    order = np.random.default_rng(103).permutation(np.arange(len(SHAPES)) % len(COLORS))
    table[np.arange(len(SHAPES)), order] = True
    return table


def is_held_out(scenes: Scenes) -> tuple[Bool[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """Which scenes hold a colour of an object, and which a pair of places, that training never shows."""
    present = scenes.objects >= 0
    colored = held_out_colors()[np.maximum(scenes.objects, 0), np.maximum(scenes.colors, 0)] & present
    places = cells(scenes)
    both = present[:, :, None] & present[:, None, :] & ~np.eye(scenes.objects.shape[1], dtype=bool)
    placed = held_out_places()[places[:, :, None], places[:, None, :]] & both
    return np.any(colored, axis=1), np.any(placed, axis=(1, 2))


def sample(rng: np.random.Generator, count: int, num_objects: int, keep: Callable[[Scenes], np.ndarray]) -> Scenes:
    """Free scenes of so many of the shapes, drawn until `count` are kept."""
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
    """Which scenes training may show."""
    colored, placed = is_held_out(scenes)
    return ~(colored | placed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch."""

    pictures: UInt8[np.ndarray, "N Y X 3"]
    token_ids: Int[np.ndarray, "N T"]
    patches: Int[np.ndarray, "N I 2"]  # object and colour of every patch, -1 is none


def training_batch(seed: int, step: int, size: int) -> Batch:
    """The batch of a step: a pure function of seed and step."""
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
    """For every token: which object it names, and which colour; -1 for none."""
    objects, colors = np.full(len(VOCABULARY), -1), np.full(len(VOCABULARY), -1)
    for index, word in enumerate(VOCABULARY):
        if word in SHAPES:
            objects[index] = SHAPES.index(word)
        if word in COLORS:
            colors[index] = COLOR_NAMES.index(word)
    return objects, colors
