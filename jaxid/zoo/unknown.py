"""tiny-llava on pictures and words that its training never shows."""

import collections
import dataclasses
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxid.data import scenes as drawn
from jaxid.data.backgrounds import BACKGROUNDS
from jaxid.data.cutouts import read_grounds
from jaxid.data.scenes import COLORS, OBJECTS, Scenes
from jaxid.errors import JaxidWarning
from jaxid.families.base import Model
from jaxid.prompts.pictures import PILImage, open_picture
from jaxid.zoo import drawings, evaluation
from jaxid.zoo import tiny_llava as recipe
from jaxid.zoo.evaluation import Accuracy, Shown
from jaxid.zoo.llava_texts import MIN_GAP, RELATION_WORDS

Pictures = UInt8[np.ndarray, "N Y X 3"]

QUESTIONS = {
    "left_right": "Is the {} to the left or right of the {}?",
    "above_below": "Is the {} above or below the {}?",
    "exists": "Is there a {}?",
    "color": "What color is the {}?",
}
"""The questions, by kind."""

KINDS = tuple(QUESTIONS)

UNKNOWN_WORDS = ("dog", "car", "banana", "umbrella")
"""Names of things that are not in the vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """Pictures of one sort, with the scenes that they show.

    Attributes:
        name: in tables.
        about: what the pictures are, in a sentence.
        scenes: what there is to see and where; these places are the truth.
        pictures: the scenes as drawn.
        kinds: the kinds of question that have an answer.
        stranger: whether the first object of every scene is drawn as something else, and is never asked about.
    """

    name: str
    about: str
    scenes: Scenes
    pictures: Pictures
    kinds: Sequence[str] = KINDS
    stranger: bool = False


# --- pictures ------------------------------------------------------------------------------------------------------


def conditions(count: int, seed: int, photographs: Sequence[Path] = ()) -> Iterator[Condition]:
    """The clean pictures first, then every other sort; most of them show the same scenes.

    Args:
        count: number of scenes of each sort.
        seed: seed of the scenes.
        photographs: files that serve as backgrounds; by default the one photograph that Matplotlib ships.
    """
    rng = np.random.default_rng((979, seed))
    size = recipe.IMAGE_SIZE
    scenes = _scenes(rng, count)
    clean = drawn.render(scenes, size)
    same = partial(Condition, scenes=scenes)
    yield same(name="clean", about="drawn as in training, with held-out pairs of objects or places", pictures=clean)

    told = {
        "flat": "shapes drawn with Pillow in other proportions, filled, without an outline",
        "outline": "the same shapes as thin coloured outlines, one pixel wide",
        "hatched": "the same shapes, hatched within a thin outline",
        "thick": "the same shapes, filled, with a dark outline of two pixels",
    }
    ground = _ground(scenes, size)
    for style in drawings.STYLES:
        yield same(
            name=f"Pillow, {style}", about=told[style], pictures=drawings.redraw(scenes, ground, drawings.shape, style)
        )
    for font, glyphs in drawings.FONTS.items():
        names = [OBJECTS.index(name) for name in glyphs]
        some = _scenes(rng, count, lambda found, names=names: np.asarray(np.isin(found.objects, names).all(axis=1)))
        shown = drawings.redraw(some, _ground(some, size), drawings.glyphs(font))
        about = f"glyphs of {font.removesuffix('.ttf')}, filled, without an outline: {', '.join(glyphs)}"
        yield Condition(name=f"font {font.split('.')[0].split('-')[0]}", about=about, scenes=some, pictures=shown)
    letters = {row: str(rng.choice(list(drawings.STRANGERS))) for row in range(count)}
    yield same(
        name="a stranger beside it",
        about="one of the two objects is an arrow, a letter, a digit or another sign; the other one is asked about, "
        "and objects that are not there",
        pictures=drawings.redraw(scenes, ground, drawings.shape, strangers=letters),
        kinds=("exists", "color"),
        stranger=True,
    )

    files = photographs or (_sample_photograph(),)
    photos = np.stack([_crop(rng, open_picture(files[row % len(files)]), size) for row in range(count)])
    about = f"objects drawn as in training, over cut-outs of {len(files)} photographs"
    if not photographs:
        about = "objects drawn as in training, over cut-outs of the one photograph that Matplotlib ships (a portrait)"
    yield same(name="photograph", about=about, pictures=over(scenes, photos))
    textures = np.stack([_texture(rng, size) for _ in range(count)])
    about = "objects drawn as in training, over coloured noise with the spectrum of photographs (no photographs)"
    yield same(name="photograph-like noise", about=about, pictures=over(scenes, textures))

    spread = 0.15
    noisy = clean / 255 + rng.normal(0, spread, clean.shape)
    noisy = (255 * np.clip(noisy, 0, 1)).astype(np.uint8)
    yield same(name="noise", about=f"clean pictures with Gaussian noise of {spread} of the range", pictures=noisy)
    yield same(
        name="blur", about="clean pictures, blurred with a radius of 1.5 of 72 pixels", pictures=_each(clean, _blur)
    )
    yield same(name="JPEG", about="clean pictures, saved as JPEG of quality 20", pictures=_each(clean, _jpeg))
    yield same(
        name="grey",
        about="clean pictures without colours",
        pictures=_each(clean, lambda picture: picture.convert("L").convert("RGB")),
        kinds=("left_right", "above_below", "exists"),
    )
    turned = dataclasses.replace(
        scenes, centers=np.stack([scenes.centers[..., 1], 1 - scenes.centers[..., 0]], axis=-1)
    )
    pictures = np.ascontiguousarray(np.rot90(clean, axes=(1, 2)))
    yield Condition(
        name="rotated",
        about="clean pictures, rotated by 90 degrees; objects lie on a side",
        scenes=turned,
        pictures=pictures,
    )
    large = drawn.render(scenes, 4 * size)
    yield same(
        name="four times larger", about="drawn with 288 pixels, and reduced by the image processor", pictures=large
    )
    for side in (0.1, 0.4):
        about = f"objects of {side} of the picture's side; in scenes without depth, training shows 0.17 to 0.28"
        some = _scenes(rng, count, side=side)
        yield Condition(name=f"objects of {side}", about=about, scenes=some, pictures=drawn.render(some, size))


def _scenes(
    rng: np.random.Generator,
    count: int,
    allowed: Callable[[Scenes], np.ndarray] = lambda found: np.ones(len(found), bool),
    side: float | None = None,
) -> Scenes:
    """Held-out scenes of two objects that are clearly left or right of, and above or below each other."""
    kept: list[Scenes] = []
    while sum(map(len, kept)) < count:
        if side is None:
            found = evaluation.held_out_scenes(rng, 2 * count)
        else:
            found = drawn.sample_free(rng, 10 * count, num_objects=(2, 2), size_range=(side, side))
            found = found[recipe.is_held_out(found)]
        apart = (np.abs(found.centers[:, 0] - found.centers[:, 1]) >= MIN_GAP).all(axis=1)
        kept.append(found[apart & allowed(found)])
    scenes = drawn.concatenate(kept)
    return scenes[rng.permutation(len(scenes))[:count]]


def _ground(scenes: Scenes, size: int) -> Pictures:
    """The backgrounds of scenes."""
    nothing = np.full_like(scenes.objects, -1)
    return drawn.render(dataclasses.replace(scenes, objects=nothing, colors=nothing), size)


def over(scenes: Scenes, pictures: Pictures) -> Pictures:
    """The objects of scenes, drawn as in training, over pictures instead of their own backgrounds."""
    plain = np.full_like(scenes.background_kinds, BACKGROUNDS.index("plain"))

    def on(tone: float) -> Float[np.ndarray, "N Y X 3"]:
        colors = np.full_like(scenes.background_colors, tone)
        same = dataclasses.replace(scenes, background_kinds=plain, background_colors=colors)
        return drawn.render(same, pictures.shape[1]).astype(float)

    black, white = on(0), on(1)
    uncovered = (white - black) / 255
    return np.rint(black + uncovered * pictures).astype(np.uint8)


def _sample_photograph() -> Path:
    from matplotlib import get_data_path

    return Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"


def _crop(rng: np.random.Generator, picture: PILImage, size: int) -> UInt8[np.ndarray, "Y X 3"]:
    """A random square of a picture, at least half as wide as possible, in either orientation."""
    from PIL import Image

    side = rng.uniform(0.5, 1) * min(picture.size)
    left, top = (rng.uniform(0, length - side) for length in picture.size)
    picture = picture.convert("RGB").resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    pixels = np.asarray(picture)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _texture(rng: np.random.Generator, size: int) -> UInt8[np.ndarray, "Y X 3"]:
    """Noise whose amplitude falls with frequency as in photographs, and whose colours vary less than its brightness."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    spectrum = np.where(frequency > 0, 1 / np.maximum(frequency, 1 / size), 0)
    layers = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((4, size, size))) * spectrum, s=(size, size))
    layers /= layers.std(axis=(1, 2), keepdims=True)
    values = rng.uniform(0.35, 0.65) + 0.2 * layers[0][..., None] + 0.06 * np.moveaxis(layers[1:], 0, -1)
    return (255 * np.clip(values, 0, 1)).astype(np.uint8)


def _each(pictures: Pictures, change: Callable[[PILImage], PILImage]) -> Pictures:
    from PIL import Image

    return np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])


def _blur(picture: PILImage) -> PILImage:
    from PIL import ImageFilter

    return picture.filter(ImageFilter.GaussianBlur(1.5))


def _jpeg(picture: PILImage) -> PILImage:
    from PIL import Image

    file = io.BytesIO()
    picture.save(file, "JPEG", quality=20)
    return Image.open(file).convert("RGB")


# --- questions -----------------------------------------------------------------------------------------------------


def asked(condition: Condition, kind: str, seed: int) -> tuple[list[str], list[str]]:
    """A question of one kind about every scene, and the true answers; the same ones in all sorts of pictures.

    The questions about existence name in turn an object that is there and one that is not.
    """
    rng = np.random.default_rng((980, seed))
    scenes = condition.scenes
    rows = np.arange(len(scenes))
    first = np.full(len(scenes), 1) if condition.stranger else rng.integers(2, size=len(scenes))
    names = _names(scenes.objects[rows, first])
    if kind in ("left_right", "above_below"):
        axis = int(kind == "above_below")
        further = scenes.centers[rows, first, axis] > scenes.centers[rows, 1 - first, axis]
        pairs = zip(names, _names(scenes.objects[rows, 1 - first]), strict=True)
        return [QUESTIONS[kind].format(*pair) for pair in pairs], [
            RELATION_WORDS[axis][int(after)] for after in further
        ]
    if kind == "color":
        colors = [list(COLORS)[index] for index in scenes.colors[rows, first]]
        return [QUESTIONS[kind].format(name) for name in names], colors
    absent = [_names(rng.permutation(np.setdiff1d(np.arange(len(OBJECTS)), own))[:1])[0] for own in scenes.objects]
    named = [(name, "yes") if row % 2 == 0 else (absent[row], "no") for row, name in enumerate(names)]
    return [QUESTIONS[kind].format(name) for name, _ in named], [truth for _, truth in named]


def _names(objects: Int[np.ndarray, "N"]) -> list[str]:
    return [OBJECTS[index] for index in objects]


def unknown_words(model: Model, scenes: Scenes, pictures: Shown, seed: int) -> dict[str, dict[str, float]]:
    """Shares of the answers to questions about things whose names the model does not know, by kind of question.

    None of these things is in a picture: "no" is right where existence is asked, and no other answer is.
    """
    rng = np.random.default_rng((981, seed))
    known = _names(scenes.objects[np.arange(len(scenes)), rng.integers(2, size=len(scenes))])
    found: dict[str, dict[str, float]] = {}
    for kind, text in QUESTIONS.items():
        words = [UNKNOWN_WORDS[row % len(UNKNOWN_WORDS)] for row in range(len(scenes))]
        questions = [text.format(*pair) for pair in zip(words, known, strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", JaxidWarning)  # of words that are not in the vocabulary
            given = collections.Counter(evaluation.answers(model, pictures, questions))
        found[kind] = {answer: times / len(scenes) for answer, times in given.most_common()}
    return found


# --- measurement ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured on pictures of one sort.

    Attributes:
        name: of the sort.
        about: what the pictures are.
        accuracy: by kind of question.
    """

    name: str
    about: str
    accuracy: Mapping[str, Accuracy]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unknown:
    """The whole measurement, as it is stored.

    Attributes:
        model: name of the model.
        fingerprint: of its files.
        count: scenes of each sort.
        seed: seed of the scenes.
        rows: one for each sort of pictures, the clean ones first.
        words: shares of the answers to questions about things whose names the model does not know.
    """

    model: str
    fingerprint: str
    count: int
    seed: int
    rows: Sequence[Row]
    words: Mapping[str, Mapping[str, float]]


def measure(
    model: Model, *, count: int, seed: int, photographs: Path | None = None, sheet: Path | None = None
) -> Unknown:
    """Measures accuracy on clean pictures and on those that training never shows.

    Args:
        model: tiny-llava, or a model that was trained like it.
        count: scenes of each sort.
        seed: seed of the scenes.
        photographs: folder of photographs; by default the one that Matplotlib ships.
        sheet: file for some pictures of each sort.

    Raises:
        DataError: if the folder holds no photographs.
        OutputError: if the sheet cannot be written.
    """
    files = () if photographs is None else read_grounds(photographs)
    rows: list[Row] = []
    samples: list[Pictures] = []
    words: dict[str, dict[str, float]] = {}
    for condition in conditions(count, seed, files):
        if not rows:
            words = unknown_words(model, condition.scenes, condition.pictures, seed)
        found = {
            kind: evaluation.accuracy(model, condition.pictures, *asked(condition, kind, seed))
            for kind in condition.kinds
        }
        rows.append(Row(name=condition.name, about=condition.about, accuracy=found))
        step = condition.pictures.shape[1] // recipe.IMAGE_SIZE
        samples.append(condition.pictures[:12, ::step, ::step])
    if sheet is not None:
        from jaxid.data.files import save_picture

        save_picture(sheet, np.concatenate([np.concatenate(list(row), axis=1) for row in samples]))
    return Unknown(model=model.name, fingerprint=model.fingerprint, count=count, seed=seed, rows=rows, words=words)


def table(found: Mapping[str, Any]) -> list[str]:
    """The measurement, as it is stored, as lines in Markdown: a table, what its rows are, and the unknown words."""
    lines = [
        f"| pictures | {' | '.join(kind.replace('_', ' ') for kind in KINDS)} |",
        "| --- " * (len(KINDS) + 1) + "|",
    ]
    for row in found["rows"]:
        shown = [_cell(row["accuracy"].get(kind)) for kind in KINDS]
        lines.append(f"| {row['name']} | {' | '.join(shown)} |")
    lines += ["", *(f"- {row['name']}: {row['about']}." for row in found["rows"]), ""]
    lines += [
        f"Asked about things that are not there and whose names it does not know ({', '.join(UNKNOWN_WORDS)}):",
        "",
    ]
    for kind, shares in found["words"].items():
        said = ", ".join(f'"{answer}" {share:.0%}' for answer, share in list(shares.items())[:4])
        lines.append(f'- "{QUESTIONS[kind].format("dog", "star")}": {said}.')
    return lines


def _cell(share: Mapping[str, float] | None) -> str:
    return "" if share is None else f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
