"""Scores of one picture's captions by their dense maps, beside the pooled cosine ([DCSM] arXiv 2503.08723)."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from jaxid import plots
from jaxid.checkpoints.encoders import load_encoder
from jaxid.checks import check_finite
from jaxid.dcsm.embedding import Texts, embed_images, embed_texts
from jaxid.dcsm.own_scorers import find_scorer
from jaxid.dcsm.placement import Placement, place
from jaxid.dcsm.scoring import Scorer, score
from jaxid.errors import InputError, OutputError
from jaxid.experiments.base import Command
from jaxid.io import ensure_output_folder, reading, reporting, whole_file
from jaxid.prompts.pictures import open_picture
from jaxid.viewer.content import Maps

MAPS_FILE = "maps.safetensors"
MAPS_FORMAT = "jaxid.dense_maps.1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionScore:
    """A caption's scores.

    Attributes:
        caption: the text.
        score: score of its dense map.
        cosine: cosine of the pooled picture and caption.
    """

    caption: str
    score: float
    cosine: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreCaptions(Command[list[CaptionScore]]):
    """Score captions of a picture by their dense maps, beside the pooled cosine.

    Attributes:
        picture: the picture.
        captions: the captions.
        model: alias, Hugging Face id, folder, or OpenCLIP file.
        scorer: cnn or mlp for the model's own scorer of that kind; or a file, .safetensors or the authors' .pt; the
            model's default one by default.
        placement: where columns of functional words are put: token, replace or insert; as in training by default, and
            replace with a .pt file, which does not tell.
        group: maps that are standardised together: all maps of the call, as published; a picture's maps; or none.
        mesh: devices that share the work, such as data=8; auto takes all of them; one device by default.
        out: figure of the maps, .png; or a folder for it and for the maps themselves, which `jaxid view` shows.
    """

    name: ClassVar[str] = "dcsm score"

    picture: Path = dataclasses.field(kw_only=False)
    captions: tuple[str, ...] = dataclasses.field(kw_only=False)
    model: str = "tiny-clip"
    scorer: Path | None = None
    placement: Placement | None = None
    group: Literal["call", "row", "pair"] = "call"
    mesh: str | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: for an option out of its range, or a blank caption.
            OutputError: for a file that is not a PNG file.
        """
        super().__post_init__()
        if not self.captions or not all(caption.strip() for caption in self.captions):
            raise InputError("no caption was given, or a blank one; give at least one.")
        if self.out is not None and self.out.suffix.lower() not in ("", ".png"):
            raise OutputError(
                f"{self.out} cannot be written: figures are PNG files, so the name must end in .png; or give a folder."
            )

    def run(self) -> list[CaptionScore]:
        """Scores the captions; draws their maps if `out` is given.

        Raises:
            InputError: if the picture cannot be opened, or the model has no scorer.
            CheckpointError: if the encoder or the scorer cannot be read.
        """
        if self.out is not None:
            ensure_output_folder(self.out.parent if self.out.suffix else self.out)
        open_picture(self.picture)
        scorer = find_scorer(self.model, self.scorer)
        if self.placement is not None:
            scorer = dataclasses.replace(scorer, placement=self.placement)
        encoder = load_encoder(self.model, mesh=self.mesh)
        pictures = embed_images(encoder, [self.picture])
        texts = embed_texts(encoder, self.captions, scorer.map_shape[1])
        scores = score(scorer, pictures, texts, group=self.group, mesh=encoder.mesh)[0]
        cosine = pictures.pooled[0] @ texts.pooled.T
        check_finite("the cosine of picture and captions", cosine)
        if self.out is not None:
            over = "each map alone" if self.group == "pair" else "all these captions"
            about = plots.About(
                model=self.model,
                items=len(texts),
                unit="captions of one picture",
                note=f"scores standardised over {over}",
            )
            picture, maps = (
                encoder.processor.shown(self.picture),
                np.einsum("ie,mte->mit", pictures.tokens[0], texts.tokens),
            )
            tokens = [_token_names(scorer, texts, row) for row in range(len(texts))]
            grid = encoder.processor.grid
            figure = plots.caption_maps(picture, maps, tokens, self.captions, scores, cosine, grid, about=about)
            plots.save(figure, self.out if self.out.suffix else self.out / "maps.png")
            if not self.out.suffix:
                first, side = grid
                patches = maps[:, first:].reshape(len(maps), side, side, -1)
                shown = Maps(
                    title=f"dense maps · {self.out.name}",
                    about={"model": encoder.name, "picture": self.picture.name},
                    picture=picture,
                    captions=self.captions,
                    tokens=tokens,
                    maps=patches,
                    scores=scores,
                    cosines=cosine,
                )
                write_maps(self.out / MAPS_FILE, shown)
        return [
            CaptionScore(caption=caption, score=float(value), cosine=float(near))
            for caption, value, near in zip(self.captions, scores, cosine, strict=True)
        ]

    def report(self, result: list[CaptionScore]) -> Iterator[str]:
        """A line for each caption; the highest score is marked."""
        best = max(result, key=lambda row: row.score)
        width = max(len(row.caption) for row in result)
        yield f"{'caption':{width}s}    score   cosine"
        for row in result:
            yield f"{row.caption:{width}s}  {row.score:+7.3f}  {row.cosine:7.3f}{'  <-' if row is best else ''}"


def write_maps(path: Path, maps: Maps) -> None:
    """Writes maps, their picture, and what they are of as a safetensors file.

    Raises:
        OutputError: if it cannot be written.
    """
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(getattr(maps, name), np.float32) for name in ("maps", "scores", "cosines")}
    arrays["picture"] = np.ascontiguousarray(maps.picture)
    texts = {"captions": list(maps.captions), "tokens": maps.tokens, "about": dict(maps.about), "title": maps.title}
    with whole_file(path) as temporary, reporting(f"cannot write {path}", OutputError):
        save_file(arrays, temporary, {"format": MAPS_FORMAT} | {name: json.dumps(text) for name, text in texts.items()})


def read_maps(path: Path) -> Maps:
    """Reads what `write_maps` wrote.

    Raises:
        InputError: if it is damaged or of another kind.
    """
    from safetensors import safe_open

    with reading(path, "a file of dense maps", InputError), safe_open(path, framework="numpy") as file:
        texts = dict(file.metadata() or {})
        if texts.pop("format", None) != MAPS_FORMAT:
            raise ValueError(f"its format is not {MAPS_FORMAT}")
        arrays = {name: file.get_tensor(name) for name in ("maps", "scores", "cosines", "picture")}
        captions, tokens, about, title = (json.loads(texts[name]) for name in ("captions", "tokens", "about", "title"))
        words = [[(int(column), str(text), bool(fixed)) for column, text, fixed in row] for row in tokens]
        return Maps(**arrays, captions=captions, tokens=words, about=about, title=title)


def _token_names(scorer: Scorer, texts: Texts, row: int) -> list[tuple[int, str, bool]]:
    """Column, text and whether it is functional, of every caption token that has characters."""
    captions = texts.captions
    words = place(captions, scorer.vocabulary).words[row]
    return [
        (column, captions.texts[row][start:stop], bool(words[column] >= 0))
        for column, (start, stop) in enumerate(captions.offsets[row].tolist())
        if captions.valid[row, column] and stop > start
    ]
