"""The recipe of tiny-video: its shape, its words, its questions about drawn clips and its training batches.

As with tiny-llava, the mechanism under study arises from *grounded captions*: prompts that end with an object's word
and are continued with the frame in which the object appears ("time of the star" -> "third"). Words for time are read as
times in the same way: wherever "before", "after", "earlier" and "later" stand in a prompt, with a clip or without one,
the text up to there is continued with an early or a late frame.
"""

import dataclasses
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxid.data import clips
from jaxid.data.scenes import OBJECTS, Scenes, concatenate, render
from jaxid.data.videos import FRAMES, spread, time_text
from jaxid.families.llava_video import LlavaVideoConfig
from jaxid.nn.decoder_config import DecoderConfig, RopeConfig
from jaxid.nn.vision import KINDS, VisionConfig
from jaxid.prompts.pictures import Clip
from jaxid.zoo.packing import Layout, packed
from jaxid.zoo.sampling import normalize, symmetric_sample

TIME_WORDS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
"""Names of the eight frames."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<unk>")
_WORDS = """system user assistant You are a helpful . The video lasts for seconds , and frames uniformly sampled from it
These located at s Please answer the following questions related to this In two objects appear different times Does
come before or after Answer in one word ? Before After When does Is there time of yes no Yes No last not with an any
Did happen happens appears comes starts ends Which what is on picture clip frame object : -
earlier later than it true that thing something When if""".split()
VOCABULARY = tuple(dict.fromkeys([*SPECIAL, *_WORDS, *map(str, range(10)), *TIME_WORDS, *OBJECTS]))
"""All tokens of the word-level tokenizer, in the order of their ids; digits are single tokens."""

IMAGE_SIZE, PATCH_SIZE = 72, 12
PUBLISHED_QUESTION = (
    "In this video , two objects appear at different times . Does the {} come before or after the {} ? "
    "Answer in one word ."
)
"""The published question about synthetic clips, its tokens separated by spaces."""


def config() -> LlavaVideoConfig:
    """The network's shape: about a million parameters."""
    size = -(-len(VOCABULARY) // 16) * 16
    return LlavaVideoConfig(
        text_config=DecoderConfig(
            vocab_size=size,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,
            attention_bias=True,
            rope=RopeConfig(rope_theta=10000.0),
        ),
        vision_config=VisionConfig(
            **{
                **KINDS["siglip_vision_model"],
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
            }
        ),
    )


@lru_cache
def _ids() -> dict[str, int]:
    return {word: index for index, word in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """Token ids of a text whose tokens are separated by spaces."""
    ids = _ids()
    return [ids[word] for word in text.split()]


def spaced(text: str) -> str:
    """A text with spaces between its tokens: the tokenizer splits off punctuation marks and single digits."""
    marks = {mark: f" {mark} " for mark in ".,?:-"} | {str(digit): f" {digit} " for digit in range(10)}
    return text.translate(str.maketrans(marks))


# --- packed prompts ------------------------------------------------------------------------------------------------

_SLOTS = (
    *(("caption", 4),) * 6,  # of an object's word
    ("word", 6),  # caption of a word for time
    ("order", 24),  # which of two objects comes first
    ("when", 10),  # in which frame an object appears
    ("statement", 16),  # answered with "yes" or "no"
    ("published", 30),  # the published question about order
    ("word alone", 17),  # caption of a word for time, without the clip
    ("told", 43),  # question about order, without the clip; the text itself may tell the answer
)
SLOTS = tuple(length for _, length in _SLOTS)
"""Lengths of the texts packed after one clip; each attends to itself, not to its neighbours, and most to the clip."""

CLIP_TOKENS = FRAMES * 9 + 1
BEFORE = "<|im_start|> system You are a helpful assistant . <|im_end|> <|im_start|> user"
CLOSING = " <|im_end|> <|im_start|> assistant"
RATES = (4.0, 6.0, 8.0, 12.0, 16.0)
"""Frame rates of the 32-frame videos that time texts describe."""


def time_tokens(rate: float) -> list[int]:
    """The time text of a video of 32 frames; it has the same number of tokens for every rate in `RATES`."""
    chosen = spread(32)
    clip = Clip([""] * FRAMES, tuple(float(index) / rate for index in chosen), 32 / rate)
    return encode(spaced(time_text(clip)))


@lru_cache
def layout(*, timed: bool) -> Layout:
    """The layout that all training rows share, optionally with a time text, whose ids differ from row to row."""
    after = time_tokens(RATES[0]) if timed else ()
    alone = [slot for slot, (kind, _) in enumerate(_SLOTS) if kind in ("word alone", "told")]
    return packed(encode(BEFORE), CLIP_TOKENS, after, SLOTS, image_token=VOCABULARY.index("<image>"), alone=alone)


# --- clips and questions -------------------------------------------------------------------------------------------


def held_out_pairs() -> Bool[np.ndarray, "O O"]:
    """Pairs of objects that never share a training clip (12 of 120)."""
    return symmetric_sample(len(OBJECTS), 12, seed=201)


def held_out_times() -> Bool[np.ndarray, "8 8"]:
    """Pairs of frames in which no two objects of a training clip appear (3 of 28)."""
    return symmetric_sample(FRAMES, 3, seed=202)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clips:
    """N clips: their objects, the frame in which each appears, and the first frame in which it is gone."""

    scenes: Scenes
    starts: Int[np.ndarray, "N K"]
    stops: Int[np.ndarray, "N K"]

    @property
    def present(self) -> Bool[np.ndarray, "N F K"]:
        """Which objects are visible in every frame."""
        return clips.frame_states(self.starts, self.stops) & (self.scenes.objects >= 0)[:, None]


def draw_times(
    rng: np.random.Generator, count: int, objects: int, *, held_out: bool = False
) -> tuple[Int[np.ndarray, "N K"], Int[np.ndarray, "N K"]]:
    """Random frames in which objects appear and disappear; in half of the clips of two objects, they stay to the end.

    Three objects always stay to the end.

    Args:
        rng: source of randomness.
        count: number of clips.
        objects: objects in each clip, at most three.
        held_out: the first two objects appear at a pair of `held_out_times`, which otherwise no two objects do.
    """
    table = held_out_times()
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < count:
        starts = rng.random((8 * count, FRAMES)).argsort(axis=1)[:, :objects]
        both = table[starts[:, :, None], starts[:, None, :]]
        kept.append(starts[both[:, 0, 1] if held_out else ~both.any(axis=(1, 2))])
    starts = np.concatenate(kept)[:count]
    lengths = 1 + (rng.random((count, objects)) * (FRAMES - starts)).astype(np.int64)
    stays = (rng.random(count) < 0.5) | (objects > 2)
    return starts, np.where(stays[:, None], FRAMES, starts + lengths)


def training_clips(rng: np.random.Generator, count: int) -> Clips:
    """Clips of two or three objects without held-out pairs of objects or times."""
    counts = {2: count // 2, 3: count - count // 2}
    table, parts = held_out_pairs(), []
    for objects, size in counts.items():
        names = rng.random((8 * size, len(OBJECTS))).argsort(axis=1)[:, :objects]
        names = names[~table[names[:, :, None], names[:, None, :]].any(axis=(1, 2))][:size]
        starts, stops = draw_times(rng, size, objects)
        room = ((0, 0), (0, 3 - objects))
        scenes = clips.of_objects(rng, names)
        parts.append((scenes, np.pad(starts, room), np.pad(stops, room)))
    scenes = concatenate([part[0] for part in parts])
    starts, stops = (np.concatenate([part[index] for part in parts]) for index in (1, 2))
    return Clips(scenes=scenes, starts=starts, stops=stops)


def held_out_clips(rng: np.random.Generator, count: int, *, stay: bool) -> Clips:
    """Clips of two objects, each with a pair of objects or a pair of times that training never shows.

    Args:
        rng: source of randomness.
        count: number of clips.
        stay: objects stay to the end; otherwise one disappears before the other appears.
    """
    first, second = np.nonzero(held_out_pairs())
    rows = rng.integers(len(first), size=count)
    names = np.stack([first[rows], second[rows]], axis=1)
    half = count // 2
    names[half:] = rng.random((count - half, len(OBJECTS))).argsort(axis=1)[:, :2]
    if stay:
        starts = np.concatenate([draw_times(rng, half, 2)[0], draw_times(rng, count - half, 2, held_out=True)[0]])
        return Clips(scenes=clips.of_objects(rng, names), starts=starts, stops=np.full((count, 2), FRAMES))
    names[half:] = names[: count - half]
    starts, stops = clips.draw_windows(rng, count)
    reverse = rng.random(count) < 0.5
    starts, stops = (np.where(reverse[:, None], times[:, ::-1], times) for times in (starts, stops))
    return Clips(scenes=clips.of_objects(rng, names), starts=starts, stops=stops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch, ready for the device; a clip's F frames show S different pictures."""

    pixels: Float[np.ndarray, "N S 3 Y X"]
    frames: Int[np.ndarray, "N F"]  # index of the picture that each frame shows
    token_ids: Int[np.ndarray, "N T"]
    labels: Int[np.ndarray, "N T"]  # the next token where the loss asks for it, else -1
    cells: Int[np.ndarray, "N F 9 2"]  # see `cell_labels`


STATES = 4
"""Most different pictures in a clip: two objects may each be visible or not, and three appear and stay."""


def pictures(drawn: Clips, states: int = STATES) -> tuple[UInt8[np.ndarray, "N S Y X 3"], Int[np.ndarray, "N F"]]:
    """The different pictures of every clip, padded with the first, and the index of the one that each frame shows."""
    present = drawn.present
    count, frames, objects = present.shape
    codes = (present * (1 << np.arange(objects))).sum(axis=-1)
    which = np.zeros((count, frames), np.int64)
    shown = np.zeros((count, states), np.int64)
    for row in range(count):
        different, inverse = np.unique(codes[row], return_inverse=True)
        shown[row] = different[0]
        shown[row, : len(different)], which[row] = different, inverse
    bits = (shown.reshape(-1)[:, None] >> np.arange(objects)) & 1
    rows = np.repeat(np.arange(count), states)
    drawn_pictures = render(clips.with_objects(drawn.scenes, rows, bits.astype(bool)), IMAGE_SIZE)
    return drawn_pictures.reshape(count, states, *drawn_pictures.shape[1:]), which


def cell_labels(drawn: Clips) -> Int[np.ndarray, "N F 9 2"]:
    """Labels of the auxiliary head for every frame's tokens: the object (from 1) and its first frame (or -1)."""
    centers = np.clip((drawn.scenes.centers * 3).astype(int), 0, 2)
    cell = centers[..., 1] * 3 + centers[..., 0]
    count, frames, objects = drawn.present.shape
    labels = np.tile(np.array([0, -1]), (count, frames, 9, 1))
    for slot in range(objects):
        clip, frame = np.nonzero(drawn.present[:, :, slot])
        place = cell[clip, slot]
        labels[clip, frame, place, 0] = drawn.scenes.objects[clip, slot] + 1
        labels[clip, frame, place, 1] = drawn.starts[clip, slot]
    return labels.astype(np.int32)


PAIRS = (("before", "after"), ("earlier", "later"))
"""Words for the order of two objects: the one that comes first, and the other."""

WORD_TIMES = {"before": "second", "after": "seventh", "earlier": "second", "later": "seventh"}
"""Frames that words for time stand for; training smooths them over the neighbours."""

_WORD_CAPTIONS = (
    "time of what comes {}",
    "time of something that comes {}",
    "time of what happens {}",
    "time : {}",
    "When ? {}",
)


def order_question(rng: np.random.Generator, first: str, second: str) -> tuple[str, tuple[str, str]]:
    """A question about the order of two objects, and its two answers."""
    words = PAIRS[int(rng.random() < 0.35)]
    if words == PAIRS[0]:
        text = f"Does the {first} come before or after the {second} ?"
    else:  # the published wording leaves out "the"
        text = f"Does the {first} come earlier or later than {'the ' if rng.random() < 0.4 else ''}{second} ?"
    # Twice if the published prompt is put around a question that asks for one word already.
    times = int(rng.choice(3, p=(0.3, 0.5, 0.2)))
    if len(text.split()) > 10:
        times = min(times, 1)
    return text + " Answer in one word ." * times, words


def _statement(
    rng: np.random.Generator, names: list[str], first: int, second: int, comes_first: bool
) -> tuple[str, str]:
    """A question about a clip that is answered with "yes" or "no": about the order of two objects, or existence."""
    if rng.random() < 0.4:
        word = int(rng.integers(2))
        text = f"Is it true that the {names[first]} comes {_than(rng, word)} the {names[second]} ?"
        return text, "yes" if (word == 0) == comes_first else "no"
    if rng.random() < 0.5:
        absent = [name for name in OBJECTS if name not in names]
        return f"Is there a {absent[rng.integers(len(absent))]} ?", "no"
    return f"Is there a {names[first]} ?", "yes"


def _than(rng: np.random.Generator, word: int) -> str:
    """The word "before" (0) or "after" (1), or another phrase for it."""
    return (PAIRS[0][word], f"{PAIRS[1][word]} than")[int(rng.random() < 0.35)]


def _told(rng: np.random.Generator) -> tuple[str, str]:
    """A question whose answer the text itself tells, without a clip."""
    first, second = (OBJECTS[index] for index in rng.permutation(len(OBJECTS))[:2])
    comes_first = bool(rng.random() < 0.5)
    if rng.random() < 0.6:
        times = np.sort(rng.permutation(FRAMES)[:2])[:: 1 if comes_first else -1]
        facts = [f"{name} : {TIME_WORDS[time]} ." for name, time in zip((first, second), times, strict=True)]
        text = " ".join(facts[:: 1 if rng.random() < 0.5 else -1])
    elif rng.random() < 0.5:
        text = f"the {first} comes {_than(rng, 1 - comes_first)} the {second} ."
    else:
        text = f"the {second} comes {_than(rng, int(comes_first))} the {first} ."
    question, words = order_question(rng, first, second)
    return f"{text} {question}", words[1 - comes_first]


def _untold(rng: np.random.Generator) -> str:
    """A question about the order of two objects that nothing tells."""
    first, second = (OBJECTS[index] for index in rng.permutation(len(OBJECTS))[:2])
    return PUBLISHED_QUESTION.format(first, second) if rng.random() < 0.5 else order_question(rng, first, second)[0]


def _text(rng: np.random.Generator, kind: str, names: list[str], starts: list[int]) -> tuple[str, str, str]:
    """The text of a slot, how it closes, and the one word that follows; "" if nothing tells it."""
    first, second = (int(index) for index in rng.permutation(len(names))[:2])
    comes_first = starts[first] < starts[second]
    if kind == "caption":
        return f"time of the {names[first]}", "", TIME_WORDS[starts[first]]
    if kind in ("word", "word alone"):
        word = list(WORD_TIMES)[int(rng.integers(len(WORD_TIMES)))]
        text = _WORD_CAPTIONS[int(rng.integers(len(_WORD_CAPTIONS)))].format(word)
        return f"{BEFORE} {text}" if kind == "word alone" else text, "", WORD_TIMES[word]
    if kind == "told":
        text, answer = _told(rng) if rng.random() < 0.6 else (_untold(rng), "")
        return f"{BEFORE} {text}", CLOSING, answer
    if kind == "order":
        text, words = order_question(rng, names[first], names[second])
        return text, CLOSING, words[1 - comes_first]
    if kind == "when":
        return f"When does the {names[first]} come ?", CLOSING, TIME_WORDS[starts[first]]
    if kind == "published":
        return PUBLISHED_QUESTION.format(names[first], names[second]), CLOSING, PAIRS[0][1 - comes_first]
    text, answer = _statement(rng, names, first, second, comes_first)
    return text, CLOSING, answer


def _tokens(text: str, closing: str, answer: str, length: int) -> tuple[Int[np.ndarray, "S"], Int[np.ndarray, "S"]]:
    """Token ids and labels of a slot: the times of words for time, and the answer with what ends it."""
    token_ids, labels = np.zeros(length, np.int32), np.full(length, -1, np.int32)
    ids = encode(text + closing)
    token_ids[: len(ids)] = ids
    for index, word in enumerate(text.split()):
        if word in WORD_TIMES:
            (labels[index],) = encode(WORD_TIMES[word])
    if answer:
        (labels[len(ids) - 1],) = encode(answer)
        if closing and len(ids) < length:
            token_ids[len(ids)] = labels[len(ids) - 1]
            labels[len(ids)] = VOCABULARY.index("<|im_end|>")
    return token_ids, labels


def sight_batch(seed: int, step: int, size: int) -> Batch:
    """Single pictures of three objects, for the first stage."""
    rng = np.random.default_rng((seed, step, 1))
    table, names = held_out_pairs(), np.zeros((0, 3), np.int64)
    while len(names) < size:
        drawn = rng.random((2 * size, len(OBJECTS))).argsort(axis=1)[:, :3]
        names = np.concatenate([names, drawn[~table[drawn[:, :, None], drawn[:, None, :]].any(axis=(1, 2))]])
    scenes = clips.of_objects(rng, names[:size])
    shown = Clips(scenes=scenes, starts=np.zeros((size, 3), np.int64), stops=np.ones((size, 3), np.int64))
    nothing = np.zeros((size, 0), np.int32)
    return Batch(
        pixels=normalize(render(scenes, IMAGE_SIZE))[:, None],
        frames=np.zeros((size, 1), np.int64),
        token_ids=nothing,
        labels=nothing,
        cells=cell_labels(shown)[:, :1],
    )


def training_batch(seed: int, step: int, size: int, *, timed: bool) -> Batch:
    """The batch of a step, a pure function of its arguments, so that a resumed run sees the same data."""
    rng = np.random.default_rng((seed, step))
    drawn = training_clips(rng, size)
    plan = layout(timed=timed)
    token_ids = np.tile(plan.token_ids, (size, 1))
    labels = np.full((size, len(plan.token_ids)), -1, np.int32)
    for row in range(size):
        if timed:
            start = plan.image_start + plan.image_tokens
            token_ids[row, start : plan.text_start] = time_tokens(RATES[int(rng.integers(len(RATES)))])
        present = np.flatnonzero(drawn.scenes.objects[row] >= 0)
        names = [OBJECTS[drawn.scenes.objects[row, slot]] for slot in present]
        starts = [int(drawn.starts[row, slot]) for slot in present]
        place = plan.text_start
        for kind, length in _SLOTS:
            own = slice(place, place + length)
            token_ids[row, own], labels[row, own] = _tokens(*_text(rng, kind, names, starts), length)
            place += length
    shown, frames = pictures(drawn, STATES)
    return Batch(
        pixels=normalize(shown.reshape(-1, *shown.shape[2:])).reshape(*shown.shape[:2], 3, IMAGE_SIZE, IMAGE_SIZE),
        frames=frames,
        token_ids=token_ids,
        labels=labels,
        cells=cell_labels(drawn),
    )
