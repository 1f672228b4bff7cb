"""Mirror and attribute swap: another picture's activations in the control run ([ID] arXiv 2601.12626, Figure 4)."""

import abc
import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from matplotlib.figure import Figure

from jaxid import plots
from jaxid.data.coco_spatial import SpatialItem
from jaxid.data.pictures import Recolouring, mirrored, recoloured
from jaxid.errors import DataError
from jaxid.experiments.base import Reading, Summary, WithLayers
from jaxid.experiments.published import RAW
from jaxid.experiments.relations import RelationBatch, prepare
from jaxid.experiments.session import Columns, Keyed, Later, Session, as_array, on_host, spread
from jaxid.families.base import Model
from jaxid.interp.interventions import replace
from jaxid.interp.trace import rerun, residuals_at, swap, trace
from jaxid.io import tidy
from jaxid.nn.sites import AnyArray
from jaxid.prompts.pictures import Picture, open_picture
from jaxid.prompts.processor import Prompts
from jaxid.stats import centre_and_spread

TOKEN_SETS = ("image", "text", "words")
"""The swapped tokens: of the image, of the text after it, or of the words that are asked about."""

PUBLISHED_ITEMS = 100

Item = TypeVar("Item", bound=Keyed)
Batch = TypeVar("Batch")
SummaryT = TypeVar("SummaryT", bound="SwapSummary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patched:
    """Log-probabilities of the two answers.

    Attributes:
        control: for the picture itself.
        intervened: for the changed picture.
        patched: for the picture itself with swapped activations, by token set and layer.
        layers: the layers after which activations are swapped.
    """

    control: Float[AnyArray, "B 2"]
    intervened: Float[AnyArray, "B 2"]
    patched: Float[AnyArray, "P L B 2"]
    layers: Int[np.ndarray, "L"]

    @property
    def scores(self) -> dict[str, Float[np.ndarray, "L B 2"]]:
        """How far the swap of each token set carries the answers.

        NaN where the changed picture does not change an answer. The published code counts this as 0.
        """
        scores = np.asarray(swap_score(*map(jnp.asarray, (self.control, self.patched, self.intervened))))
        defined = np.where(np.equal(self.control, self.intervened), np.nan, scores)
        return dict(zip(TOKEN_SETS, defined.astype(scores.dtype), strict=True))


def swap_score(
    control: Float[Array, "B n"], patched: Float[Array, "*S B n"], intervened: Float[Array, "B n"]
) -> Float[Array, "*S B n"]:
    """How far a patch carries the answers towards those for the changed picture: 0 not at all, 1 all the way.

    This is (log p_control - log p_patched) / (log p_control - log p_intervened), and 0 where that is not finite.
    """
    score = (control - patched) / (control - intervened)
    return jnp.where(jnp.isfinite(score), score, 0.0)


def swap_activations(
    model: Model,
    batch: RelationBatch,
    intervened: Prompts,
    *,
    words: Int[np.ndarray, "B P"] | None = None,
    text: Int[np.ndarray, "B Q"] | None = None,
    pictures: Int[np.ndarray, "B I"] | None = None,
    layers: Sequence[int] | None = None,
    chunk: int | None = None,
    fetch: bool = True,
) -> Patched:
    """Swaps each token set at every layer.

    Args:
        model: the model.
        batch: prepared questions about the control pictures or clips.
        intervened: the same questions about the changed ones, for example mirrored.
        words: positions of the words that are swapped; those of subject and object by default.
        text: positions of the text tokens that are swapped; all after the picture by default.
        pictures: positions of the picture tokens that are swapped; all by default.
        layers: decoder layers after which values are swapped; all by default.
        chunk: edits that run side by side.
        fetch: copy the results to the host. If not, they are on the device, where they may still be computed.

    Raises:
        InputError: if the two differ in their questions, or a layer is out of range.
    """
    chosen = np.arange(model.num_layers) if layers is None else np.asarray(layers)
    recorded, changed = trace(model, batch.prompts), trace(model, intervened)
    outputs = []
    for positions in (pictures, "text" if text is None else text, batch.words[:, :2] if words is None else words):
        if positions is None:
            outputs.append(rerun(model, recorded, pictures_of=changed, after=chosen, chunk=chunk))
            continue
        if isinstance(positions, str) or (positions >= intervened.text_start()[:, None]).all():
            edit = swap(changed, chosen, positions)
        else:  # traces hold no activations of the picture
            edit = replace(chosen, positions, residuals_at(model, intervened, positions)[1:][chosen])
        outputs.append(rerun(model, recorded, edit, chunk=chunk))
    found = Patched(
        control=batch.read(recorded),
        intervened=batch.read(changed),
        patched=jnp.stack([batch.read(output) for output in outputs]),
        layers=chosen,
    )
    return on_host(found) if fetch else found


# --- the experiments -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Swap scores over items, by token set, layer and word.

    Attributes:
        score_items: items whose scores are all finite.
        score_median: medians.
        score_quartiles: lower and upper quartiles.
        score_mean: means, as published.
        score_std: standard deviations (unbiased), as published.
    """

    score_items: int
    score_median: Mapping[str, Float[np.ndarray, "L 2"]]
    score_quartiles: Mapping[str, Float[np.ndarray, "L 2 2"]]
    score_mean: Mapping[str, Float[np.ndarray, "L 2"]]
    score_std: Mapping[str, Float[np.ndarray, "L 2"]]


def statistics(scores: Mapping[str, Float[np.ndarray, "L B 2"]]) -> Scores:
    """Statistics of the scores, over the items whose scores are all finite.

    Raises:
        DataError: if there is no such item.
    """
    known = np.logical_and.reduce([np.isfinite(values).all(axis=(0, 2)) for values in scores.values()])
    if not known.any():
        raise DataError(
            f"no swap score of the {len(known)} items is finite: do the changed pictures change the answers?"
        )
    robust = {name: centre_and_spread(values[:, known], 1) for name, values in scores.items()}
    published = {name: centre_and_spread(values[:, known], 1, robust=False) for name, values in scores.items()}
    return Scores(
        score_items=int(known.sum()),
        score_median={name: centre for name, (centre, _, _) in robust.items()},
        score_quartiles={name: np.stack([low, high], axis=-1) for name, (_, low, high) in robust.items()},
        score_mean={name: mean for name, (mean, _, _) in published.items()},
        score_std={name: mean - low for name, (mean, low, _) in published.items()},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwapSummary(Scores, Summary):
    """Summary of an activation swap.

    Attributes:
        statistic: the statistic in the figure, "median" or "mean".
        layers: ascending.
        words: the two answers.
        mean_change_of_answers: mean absolute difference of the answers' log-probabilities for the two pictures.
    """

    statistic: str
    layers: list[int]
    words: list[str]
    mean_change_of_answers: float


@dataclasses.dataclass(frozen=True)
class Pair(Generic[Batch]):
    """Questions about pictures or clips, and the same ones about the changed pictures or clips."""

    questions: Batch
    changed: Prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSwap(WithLayers[Item, Pair[Batch], SummaryT], Generic[Item, Batch, SummaryT]):
    """Base class of the activation swaps. A subclass gives the items, their questions, and the changed prompts."""

    changed_to: ClassVar[str]
    """Description of the changed picture or clip, such as "the mirrored picture"."""
    reading: ClassVar[Reading] = Reading(
        axes=("tokens", "layer"),
        before="control",
        after="patched",
        values={"score": "swap score: 0 as without a swap, 1 as for the changed picture"},
    )
    statistic: ClassVar[str] = "median"
    """Statistic that figure and report show: "median", or the published "mean"."""

    def rows(self, session: Session) -> int:
        """One token set at every layer."""
        return len(session.layers)

    @abc.abstractmethod
    def questions(self, session: Session, items: Sequence[Item]) -> Batch:
        """The questions about the pictures or clips."""

    @abc.abstractmethod
    def changed(self, session: Session, items: Sequence[Item], batch: Batch) -> Prompts:
        """The same questions about the changed pictures or clips."""

    def prepare(self, session: Session, items: Sequence[Item]) -> Pair[Batch]:
        """The questions about the pictures or clips, and about the changed ones."""
        batch = self.questions(session, items)
        return Pair(batch, self.changed(session, items, batch))

    def words(self, batch: Pair[Batch]) -> Int[np.ndarray, "B P"]:
        """Positions of the words that are swapped."""
        return self.asked(batch)[0].words[:, :2]

    def text(self, batch: Pair[Batch]) -> Int[np.ndarray, "B Q"] | None:
        """Positions of the text that is swapped; None for all after the picture."""
        return None

    def pictures(self, batch: Pair[Batch]) -> Int[np.ndarray, "B I"] | None:
        """Positions of the picture or clip that are swapped; None for all."""
        return None

    def edited(self, batch: Pair[Batch]) -> dict[str, Int[np.ndarray, "B P"]]:
        """The swapped tokens, by token set."""
        prompts, text, pictures = self.asked(batch)[0].prompts, self.text(batch), self.pictures(batch)
        found = (
            prompts.image_tokens() if pictures is None else pictures,
            prompts.text_tokens() if text is None else text,
            self.words(batch),
        )
        return dict(zip(TOKEN_SETS, found, strict=True))

    def scores(self, found: Patched) -> Float[np.ndarray, "P L B 2"]:
        """How far the swaps carry the answers."""
        return np.stack(list(found.scores.values()))

    def columns(self, items: Sequence[Item]) -> Mapping[str, Sequence[object]]:
        """Further columns of the table, with a value for each item."""
        return {}

    def compute(self, session: Session, items: Sequence[Item], batch: Pair[Batch]) -> Later:
        """A row for each token set, layer, item and answer word."""
        asked = self.asked(batch)[0]
        sets = {"words": self.words(batch), "text": self.text(batch), "pictures": self.pictures(batch)}
        found = swap_activations(session.model, asked, batch.changed, **sets, layers=session.layers, fetch=False)
        return partial(self.rows_of, session, items, asked.answers, found)

    def rows_of(self, session: Session, items: Sequence[Item], answers: Sequence[str], found: Patched) -> Columns:
        """The table's rows of items, once they are computed."""
        count, found = len(items), on_host(found)
        patched = found.patched[:, :, :count]
        axes = {
            "tokens": TOKEN_SETS,
            "layer": session.layers,
            "item": [item.key for item in items],
            "word": answers,
        }
        return tidy(patched, axes, name="patched") | {
            "model": spread(session.model.name, patched.shape),
            **{name: spread(values, patched.shape, 2) for name, values in self.columns(items).items()},
            "control": spread(found.control[:count], patched.shape),
            "intervened": spread(found.intervened[:count], patched.shape),
            "score": self.scores(found)[:, :, :count].ravel(),
        }

    def facts(self, session: Session, table: Columns) -> dict[str, Any]:
        """The fields of every activation swap's summary."""
        return {
            **session.facts,
            **vars(statistics(scores_of(table))),
            "statistic": self.statistic,
            "layers": session.layers,
            "words": list(dict.fromkeys(table["word"].tolist())),
            "mean_change_of_answers": float(np.abs(table["control"] - table["intervened"]).mean()),
        }

    def figures(self, session: Session, table: Columns, summary: SummaryT) -> Iterator[tuple[str, Figure]]:
        """Scores by layer."""
        yield (
            self.name.replace("-", "_"),
            plots.swap_scores(
                scores_of(table),
                summary.words,
                layers=np.array(summary.layers),
                robust=self.statistic == "median",
                about=summary.about(note=f"activations of {self.changed_to}"),
            ),
        )

    def report(self, summary: SummaryT) -> Iterator[str]:
        """The statistic that the figure shows, for each token set and word."""
        yield (
            f"{summary.statistic} score of {summary.score_items} items by layer: "
            f"0 without a swap, 1 as for {self.changed_to}"
        )
        for tokens, scores in getattr(summary, f"score_{summary.statistic}").items():
            for word, by_layer in zip(summary.words, scores.T, strict=True):
                # Adding 0.0 avoids "-0.00".
                values = ", ".join(f"{round(float(value), 2) + 0.0:.2f}" for value in by_layer)
                yield f"{tokens:6s} {word:7s} {values}"
        yield f"{summary.items} items{summary.skipped_note}"


def scores_of(table: Columns) -> dict[str, Float[np.ndarray, "L B 2"]]:
    """Scores by token set, from a table."""
    axes = {name: list(dict.fromkeys(table[name].tolist())) for name in ("tokens", "layer", "item", "word")}
    return dict(zip(axes["tokens"], as_array(table, "score", axes), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureSwap(ActivationSwap[SpatialItem, RelationBatch, SwapSummary]):
    """Left/right questions about pictures and changed ones; 100 items are drawn by default, as published."""

    published_text: ClassVar[str] = RAW

    def items(self, session: Session) -> list[SpatialItem]:
        """Questions of left and right."""
        items = session.spatial_items("horizontal")
        return items if self.limit else session.sample(items, PUBLISHED_ITEMS)

    def questions(self, session: Session, items: Sequence[SpatialItem]) -> RelationBatch:
        """The published questions."""
        return prepare(session.model, items, prompt=session.prompt, case=session.case)

    def asked(self, batch: Pair[RelationBatch]) -> list[RelationBatch]:
        """The questions about the pictures."""
        return [batch.questions]

    def pictured(self, item: SpatialItem) -> Picture:
        """The item's picture, before it is changed."""
        return item.picture

    def summarise(self, session: Session, table: Columns) -> SwapSummary:
        """Scores by token set, layer and word."""
        return SwapSummary(**self.facts(session, table))

    @abc.abstractmethod
    def change(self, item: SpatialItem, picture: UInt8[np.ndarray, "Y X 3"]) -> UInt8[np.ndarray, "Y X 3"]:
        """The changed picture of an item."""

    def changed(self, session: Session, items: Sequence[SpatialItem], batch: RelationBatch) -> Prompts:
        """The questions about changed pictures."""
        pictures = [self.change(item, np.asarray(open_picture(item.picture))) for item in items]
        return session.model.prepare(pictures, list(batch.prompts.questions), raw=batch.prompts.raw)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirrorSwap(PictureSwap):
    """Put activations of the mirrored picture into the control run (Figure 4)."""

    name: ClassVar[str] = "mirror-swap"
    changed_to: ClassVar[str] = "the mirrored picture"

    def change(self, item: SpatialItem, picture: UInt8[np.ndarray, "Y X 3"]) -> UInt8[np.ndarray, "Y X 3"]:
        """The picture reversed left to right."""
        return mirrored(picture)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributeSwap(PictureSwap):
    """Put activations of the recoloured picture into the control run (Figure 4)."""

    name: ClassVar[str] = "attribute-swap"
    changed_to: ClassVar[str] = "the recoloured picture"
    recoloured: ClassVar[Recolouring] = staticmethod(recoloured)

    def change(self, item: SpatialItem, picture: UInt8[np.ndarray, "Y X 3"]) -> UInt8[np.ndarray, "Y X 3"]:
        """The picture in the hues of a rainbow, the item's own."""
        return self.recoloured(picture, np.random.default_rng((self.seed, zlib.crc32(item.key.encode()))))
