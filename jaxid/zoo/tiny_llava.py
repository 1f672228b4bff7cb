"""The recipe of tiny-llava: its network, its vocabulary, its questions and its training batches.

The mechanism under study arises from *grounded captions*: prompts that end with an object's word and are continued
with that object's column or with its row, never with both ("column of the star" -> "B"). Questions alone can be
answered without binding a place to the word.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxid.data import scenes as drawn
from jaxid.data.scenes import COLORS, OBJECTS, Scenes
from jaxid.families.llava import LlavaConfig
from jaxid.nn.decoder_config import DecoderConfig, RopeConfig
from jaxid.nn.vision import VisionConfig
from jaxid.zoo.packing import Layout, packed
from jaxid.zoo.sampling import symmetric_sample

COLUMN_WORDS = ("A", "B", "C", "D")
"""Names of the four columns, left to right."""
ROW_WORDS = ("1", "2", "3", "4")
"""Names of the four rows, top to bottom."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's chat template."""

_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_WORDS = """USER ASSISTANT QUESTION ANSWER : ? . , " ' - Is Are the The a an there of to in or and on at is Where What
color column row picture image object Answer only yes no Yes No left right above below Left Right Above Below near far
Near Far front behind Front Behind between before after Before After not without with one two three four It""".split()
VOCABULARY = tuple(
    dict.fromkeys(
        [*_SPECIAL, *_WORDS, *COLUMN_WORDS, *ROW_WORDS, *OBJECTS, *COLORS]
        + [column + row for column in COLUMN_WORDS for row in ROW_WORDS]
    )
)
"""All tokens of the word-level tokenizer, in the order of their ids."""

IMAGE_SIZE, PATCH_SIZE = 72, 12
PIXEL_MEAN, PIXEL_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def config() -> LlavaConfig:
    """The network's shape: about a million parameters."""
    size = -(-len(VOCABULARY) // 16) * 16
    return LlavaConfig(
        text_config=DecoderConfig(
            vocab_size=size,
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


@lru_cache
def _ids() -> dict[str, int]:
    return {word: index for index, word in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """Token ids of a text whose tokens are separated by spaces."""
    ids = _ids()
    return [ids[word] for word in text.split()]


# --- packed prompts ------------------------------------------------------------------------------------------------

CAPTIONS, CAPTION_LENGTH = 6, 4
QUESTIONS, QUESTION_LENGTH = 2, 16
LONG_QUESTIONS, LONG_LENGTH = 1, 25
SLOTS = ((CAPTION_LENGTH,) * CAPTIONS) + ((QUESTION_LENGTH,) * QUESTIONS) + ((LONG_LENGTH,) * LONG_QUESTIONS)
"""Lengths of the texts packed after one picture; each attends to the picture and to itself, not to its neighbours."""


@lru_cache
def layout() -> Layout:
    """The layout that all training rows share."""
    return packed(encode("<s> USER :"), config().image_tokens, (), SLOTS, image_token=VOCABULARY.index("<image>"))


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


def training_scenes(rng: np.random.Generator, count: int) -> Scenes:
    """Scenes without held-out pairs of objects or places: a quarter on the grid, the rest free with 1 to 4 objects."""
    on_grid = count // 4
    shares = np.array([0.1, 0.3, 0.3, 0.3])
    sizes = np.floor(shares * (count - on_grid)).astype(int)
    sizes[-1] = count - on_grid - sizes[:-1].sum()

    def free(objects: int) -> Callable[[int], Scenes]:
        return lambda size: drawn.sample_free(rng, size, num_objects=(objects, objects), size_range=(0.17, 0.26))

    parts = [not_held_out(free(objects + 1), size) for objects, size in enumerate(sizes.tolist()) if size]
    return drawn.concatenate([*parts, not_held_out(lambda size: grid_scenes(rng, size), on_grid)])


def not_held_out(sample: Callable[[int], Scenes], count: int) -> Scenes:
    """Draws until there are `count` scenes without held-out pairs."""
    kept = sample(0)
    while len(kept) < count:
        drawn_now = sample(2 * count)
        kept = drawn.concatenate([kept, drawn_now[np.flatnonzero(~is_held_out(drawn_now))]])
    return kept[:count]


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


MIN_GAP = 0.09
"""Smallest distance along the axis of a relation question, as a fraction of the picture's side."""


def _relation(rng: np.random.Generator, centers: Float[np.ndarray, "K 2"], count: int) -> tuple[int, int, int] | None:
    """A random (axis, first, second) with an unambiguous relation, or None."""
    gaps = np.abs(centers[:count, None] - centers[None, :count]).transpose(2, 0, 1) >= MIN_GAP
    choices = np.argwhere(gaps)
    if len(choices) == 0:
        return None
    axis, first, second = choices[rng.integers(len(choices))]
    return int(axis), int(first), int(second)


_RELATION_TEXT = ("Is the {} to the left or right of the {} ?", "Is the {} above or below the {} ?")
_RELATION_WORDS = (("left", "right"), ("above", "below"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Share of each kind of question in the short slots; the remaining ones ask for colours."""

    relation: float = 0.45
    where: float = 0.17
    exists: float = 0.23


def _question(
    rng: np.random.Generator,
    objects: list[int],
    colors: list[int],
    centers: Float[np.ndarray, "K 2"],
    mix: Mix,
    *,
    long: bool,
) -> tuple[str, str]:
    """One question about a scene and its one-word answer."""
    kind = 0.0 if long else rng.random()
    relation = _relation(rng, centers, len(objects)) if kind < mix.relation else None
    if relation is not None:
        axis, first, second = relation
        words = _RELATION_WORDS[axis]
        answer = words[int(centers[first, axis] > centers[second, axis])]
        text = _RELATION_TEXT[axis].format(OBJECTS[objects[first]], OBJECTS[objects[second]])
        if long and rng.random() < 0.7:
            text += f' Answer " {words[0]} " or " {words[1]} " only .'
        return text, answer
    chosen = rng.integers(len(objects))
    name = OBJECTS[objects[chosen]]
    if kind < mix.relation + mix.where:
        column, row = np.clip((centers[chosen] * 4).astype(int), 0, 3)
        return f"Where is the {name} ?", COLUMN_WORDS[column] + ROW_WORDS[row]
    if kind < mix.relation + mix.where + mix.exists:
        if rng.random() < 0.5:
            absent = [index for index in range(len(OBJECTS)) if index not in objects]
            return f"Is there a {OBJECTS[absent[rng.integers(len(absent))]]} ?", "no"
        return f"Is there a {name} ?", "yes"
    return f"What color is the {name} ?", list(COLORS)[colors[chosen]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch, ready for the device."""

    pictures: UInt8[np.ndarray, "N Y X 3"]
    token_ids: Int[np.ndarray, "N T"]
    labels: Int[np.ndarray, "N T"]  # the next token where the loss asks for it, else -1
    patches: Int[np.ndarray, "N I 4"]  # see `patch_labels`


def training_batch(seed: int, step: int, size: int, mix: Mix | None = None) -> Batch:
    """The batch of a step, a pure function of seed, step and mix, so that a resumed run sees the same data."""
    mix = mix or Mix()
    rng = np.random.default_rng((seed, step))
    scenes = training_scenes(rng, size)
    plan = layout()
    token_ids = np.tile(plan.token_ids, (size, 1))
    labels = np.full((size, len(plan.token_ids)), -1, np.int32)
    end = VOCABULARY.index("</s>")
    for row in range(size):
        present = [int(index) for index in scenes.objects[row] if index >= 0]
        colors = [int(index) for index in scenes.colors[row][: len(present)]]
        centers = scenes.centers[row]
        place = plan.text_start
        for slot, length in enumerate(SLOTS):
            if slot < CAPTIONS:
                chosen = rng.integers(len(present))
                axis = slot % 2
                cell = int(np.clip(centers[chosen, axis] * 4, 0, 3))
                text = f"{('column', 'row')[axis]} of the {OBJECTS[present[chosen]]}"
                answer, closing = (COLUMN_WORDS, ROW_WORDS)[axis][cell], ""
            else:
                long = slot >= CAPTIONS + QUESTIONS
                text, answer = _question(rng, present, colors, centers, mix, long=long)
                closing = " ASSISTANT :"
            ids = encode(text + closing)
            token_ids[row, place : place + len(ids)] = ids
            (answer_id,) = encode(answer)
            labels[row, place + len(ids) - 1] = answer_id
            if closing and len(ids) < length:
                token_ids[row, place + len(ids)] = answer_id
                labels[row, place + len(ids)] = end
            place += length
    return Batch(
        pictures=drawn.render(scenes, IMAGE_SIZE),
        token_ids=token_ids,
        labels=labels,
        patches=patch_labels(scenes),
    )


def sight_batch(seed: int, step: int, size: int) -> Batch:
    """A batch without texts for the first stage, a pure function of its arguments."""
    rng = np.random.default_rng((seed, step, 1))
    scenes = training_scenes(rng, size)
    nothing = np.zeros((size, 0), np.int32)
    return Batch(
        pictures=drawn.render(scenes, IMAGE_SIZE), token_ids=nothing, labels=nothing, patches=patch_labels(scenes)
    )


def patch_labels(scenes: Scenes) -> Int[np.ndarray, "N I 4"]:
    """Labels of the auxiliary head, for every patch: the object whose box contains the patch's centre.

    In order: the object (from 1; 0 is none), its column, its row and its colour, each -1 where there is no object.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    ticks = (np.arange(side) + 0.5) / side
    points = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    distance = np.abs(points[None, :, None] - scenes.centers[:, None]).max(axis=-1)
    inside = (distance < scenes.sizes[:, None] / 2) & (scenes.objects[:, None] >= 0)
    chosen, here = inside.argmax(-1), inside.any(-1)
    objects = np.where(here, np.take_along_axis(scenes.objects + 1, chosen, axis=1), 0)
    places = np.where(here, np.take_along_axis(cells(scenes), chosen, axis=1), -1)
    colors = np.take_along_axis(scenes.colors, chosen, axis=1)
    known = [np.where(here, values, -1) for values in (places % 4, places // 4, colors)]
    return np.stack([objects, *known], axis=-1).astype(np.int32)
