"""Time in video models: swap reversed clips in, and steer scenes to frames ([ID] arXiv 2601.12626, Figure 10)."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from jaxid import plots
from jaxid.data.clips import OrderItem, read_mvbench
from jaxid.data.videos import with_times
from jaxid.errors import PromptError
from jaxid.experiments.activation_swap import TOKEN_SETS, ActivationSwap, Pair, SwapSummary
from jaxid.experiments.base import Experiment, Reading, Summary
from jaxid.experiments.published import fill, is_raw
from jaxid.experiments.relations import Case, RelationBatch
from jaxid.experiments.session import Columns, Later, Session, as_array, require_same_model, rows_where
from jaxid.experiments.steering import Batch, Steered, Steering, SummaryT, steer
from jaxid.families.base import Model
from jaxid.ids.temporal import TemporalIDs, rank_correlation
from jaxid.interp.interventions import add
from jaxid.prompts.pictures import Clip, Picture, open_picture
from jaxid.prompts.processor import Prompts
from jaxid.prompts.words import shown, word_spans

ANSWERS = ("before", "after")

IN_ONE_WORD = "{query} Answer in one word."
"""The published prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderBatch:
    """Prepared questions about the order of scenes.

    Attributes:
        asked: the prompts, how their answers are read, and the position of each scene's last token.
        clips: the clips that they are about.
        first: positions of all tokens of the scene that is named first.
        second: positions of all tokens of the other scene.
    """

    asked: RelationBatch
    clips: Sequence[Clip]
    first: Int[np.ndarray, "B P"]
    second: Int[np.ndarray, "B Q"]

    @property
    def words(self) -> Int[np.ndarray, "B R"]:
        """Positions of both scenes' tokens."""
        return np.concatenate([self.first, self.second], axis=1)


def contact_sheet(clip: Clip, columns: int = 4) -> Picture:
    """A clip's frames as one picture, row by row."""
    frames = [np.asarray(open_picture(frame)) for frame in clip.frames]
    frames += [np.full_like(frames[0], 255)] * (-len(frames) % columns)
    return np.concatenate([np.concatenate(frames[k : k + columns], 1) for k in range(0, len(frames), columns)])


class Wording(NamedTuple):
    """How the order of two scenes is asked about.

    Attributes:
        answers: the words for a scene named first that happens first, and for one that happens last.
        reworded: the query of a manifest in these words.
    """

    answers: tuple[str, str] = ANSWERS
    reworded: Callable[[str], str] = str


AS_IT_IS = Wording()


def earlier_or_later(query: str) -> str:
    """A query of the published manifest in the words of the published temporal swap, which lose two spaces."""
    return query.replace(" before or after the ", "earlier or later than ")


def prepare(
    model: Model,
    items: Sequence[OrderItem],
    *,
    prompt: str = "{query}",
    case: Case = "both",
    wording: Wording = AS_IT_IS,
    answer_ids: tuple[int, int] | None = None,
) -> OrderBatch:
    """Prepares questions about clips, and locates the scenes' words in each question.

    Args:
        model: the model.
        items: the questions; the clip of a repeated item is read once.
        prompt: the user's text after the times, with a place for the {query}.
        case: which form of the answer words is read.
        wording: the words of the questions and answers.
        answer_ids: tokens that are read instead of the answer words.

    Raises:
        DataError: if a video is unreadable or too short.
        PromptError: if a query does not contain a scene's words.
    """
    opened = {key: item.open() for key, item in {id(item): item for item in items}.items()}
    clips = [opened[id(item)] for item in items]
    answers, reworded = wording
    asked = [fill(prompt, reworded(item.query), answers) for item in items]
    texts = [with_times(clip, text) for clip, text in zip(clips, asked, strict=True)]
    prompts = model.prepare(clips, texts, raw=is_raw(prompt))
    scenes = [(item.scene1, item.scene2) for item in items]
    if reworded is str:
        first, second = (
            prompts.word_tokens(column, beside=scenes, occurrence=0) for column in zip(*scenes, strict=True)
        )
    else:  # a scene's words may not stand apart from the next word
        spans = [_spans(item, reworded(item.query), text) for item, text in zip(items, prompts.questions, strict=True)]
        first, second = (prompts.tokens_in(column) for column in zip(*spans, strict=True))
    relation = RelationBatch(
        prompts=prompts,
        words=np.stack([first[:, -1], second[:, -1]], axis=1),
        names=scenes,
        truth=np.array([ANSWERS.index(item.answer) for item in items]),
        axis="time",
        answers=list(answers),
        case=case,
        answer_ids=answer_ids,
    )
    return OrderBatch(asked=relation, clips=clips, first=first, second=second)


def _spans(item: OrderItem, reworded: str, question: str) -> list[tuple[int, int]]:
    """Where the words of both scenes stand in a question whose query is reworded.

    Raises:
        PromptError: if the query does not contain them as whole words.
    """
    scenes = (item.scene1, item.scene2)
    found = word_spans(item.query, scenes)
    for scene, spans in zip(scenes, found, strict=True):
        if not spans:
            raise PromptError(f"the query {shown(item.query)} does not hold the words {scene!r}.")
    # Only the middle of the query changes; a scene may begin or end in it.
    kept, shift = _shared(item.query, reworded), len(reworded) - len(item.query)
    rest = item.query[len(item.query) - _shared(item.query[::-1], reworded[::-1]) :].lstrip()
    start, back = question.index(reworded), len(item.query) - len(rest)
    earlier, later = sorted(own[0] for own in found)
    moved = {
        earlier: (earlier[0] + start, min(earlier[1], kept) + start),
        later: (max(later[0], back) + shift + start, later[1] + shift + start),
    }
    return [moved[own[0]] for own in found]


def _shared(first: str, second: str) -> int:
    """Number of characters with which two texts begin alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def reversed_prompts(model: Model, batch: OrderBatch) -> Prompts:
    """The same questions about the reversed clips; the times in the text stay as they are."""
    prompts = batch.asked.prompts
    return model.prepare([clip.reversed() for clip in batch.clips], list(prompts.questions), raw=prompts.raw)


def frame_vectors(ids: TemporalIDs, layers: Sequence[int]) -> Float[Array, "L F D"]:
    """The ID of every frame less that of the frame mirrored in time, ID[f] - ID[8 - f]."""
    universal = ids.universal[np.asarray(layers)]
    return universal - jnp.flip(universal, axis=1)


def steer_to_frames(
    model: Model,
    batch: OrderBatch,
    ids: TemporalIDs,
    *,
    layers: Sequence[int],
    strength: float = 5.0,
    fetch: bool = True,
) -> Steered:
    """Steers the words of the second scene to every frame, at each layer; see `steering.steer_to_cells`.

    Returns:
        Log-probabilities of "before" and "after", those steered Float[L, F, B, 2].

    Raises:
        InputError: if the IDs are of another model, or a layer is out of range.
    """
    require_same_model(model, ids)
    vectors = frame_vectors(ids, layers)
    sweep = np.broadcast_to(np.asarray(layers)[:, None], vectors.shape[:2])
    return steer(model, batch.asked, add(sweep, batch.second, vectors, strength), fetch=fetch)


# --- the experiments -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class AboutOrder(Experiment[OrderItem, Batch, SummaryT]):
    """What the experiments on questions about order share.

    Attributes:
        data: folder with manifest.csv (or .json, .jsonl), or the manifest itself.
    """

    published_text: ClassVar[str] = IN_ONE_WORD
    published_wording: ClassVar[Wording] = AS_IT_IS
    data: Path
    model: str = "tiny-video"

    def items(self, session: Session) -> list[OrderItem]:
        """The manifest's questions."""
        return session.sample(read_mvbench(self.data, bad=session.bad_rows()))

    def pictured(self, item: OrderItem) -> Picture:
        """The clip's frames in two rows."""
        return contact_sheet(item.open())

    def questions(self, session: Session, items: Sequence[OrderItem]) -> OrderBatch:
        """The questions about the clips."""
        published = session.prompt == self.published_text
        return prepare(
            session.model,
            items,
            prompt=session.prompt,
            case=session.case,
            wording=self.published_wording if published else AS_IT_IS,
            answer_ids=self.answer_ids_of(session.model) if published else None,
        )

    def answer_ids_of(self, model: Model) -> tuple[int, int] | None:
        """Tokens that are read with the published prompt, instead of the answer words."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalSwapSummary(SwapSummary):
    """Summary of a temporal swap.

    Attributes:
        accuracy: accuracy of the answers about the clips.
        accuracy_backwards: accuracy about the reversed clips, where the other answer is true.
    """

    accuracy: float
    accuracy_backwards: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalSwap(
    AboutOrder[Pair[OrderBatch], TemporalSwapSummary], ActivationSwap[OrderItem, OrderBatch, TemporalSwapSummary]
):
    """Swap activations of the reversed clip into the control run (Figure 10 a)."""

    name: ClassVar[str] = "temporal-swap"
    changed_to: ClassVar[str] = "the clip played backwards"
    published_wording: ClassVar[Wording] = Wording(("earlier", "later"), earlier_or_later)

    def changed(self, session: Session, items: Sequence[OrderItem], batch: OrderBatch) -> Prompts:
        """The questions about reversed clips."""
        return reversed_prompts(session.model, batch)

    def asked(self, batch: Pair[OrderBatch]) -> list[RelationBatch]:
        """The questions about the clips."""
        return [batch.questions.asked]

    def words(self, batch: Pair[OrderBatch]) -> Int[np.ndarray, "B R"]:
        """Both scenes' words."""
        return batch.questions.words

    def columns(self, items: Sequence[OrderItem]) -> dict[str, Sequence[str]]:
        """The true answers."""
        return {"answer": [item.answer for item in items]}

    def summarise(self, session: Session, table: Columns) -> TemporalSwapSummary:
        """Scores by token set, layer and word; and the accuracies."""
        # Control and intervened run are repeated for every token set and layer.
        rows = rows_where(table, (table["tokens"] == TOKEN_SETS[0]) & (table["layer"] == session.layers[0]))
        axes = {name: list(dict.fromkeys(rows[name].tolist())) for name in ("item", "word")}
        truth = rows["answer"][:: len(ANSWERS)]

        def accuracy(run: str) -> float:
            return float((np.array(ANSWERS)[as_array(rows, run, axes).argmax(axis=1)] == truth).mean())

        return TemporalSwapSummary(
            **self.facts(session, table),
            accuracy=accuracy("control"),
            accuracy_backwards=1 - accuracy("intervened"),
        )

    def report(self, summary: TemporalSwapSummary) -> Iterator[str]:
        """The scores, and the accuracy."""
        yield from super().report(summary)
        yield f"{summary.accuracy:.1%} answered correctly"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalSteerSummary(Summary):
    """Summary of steering to every frame.

    Attributes:
        layers: the steered layers, ascending.
        words: the answers.
        frames: the frames steered to.
        change_mean: change of the answers' log-probabilities by layer, frame and word: mean over items.
        change_std: standard deviation of the change over items.
        rank_correlation: Spearman's rank correlation of the lead of "before" with the frame, by layer.
    """

    layers: list[int]
    words: list[str]
    frames: list[int]
    change_mean: Float[np.ndarray, "L F 2"]
    change_std: Float[np.ndarray, "L F 2"]
    rank_correlation: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalSteer(
    AboutOrder[OrderBatch, TemporalSteerSummary], Steering[OrderItem, OrderBatch, TemporalSteerSummary]
):
    """Steer the second scene's words to every frame (Figure 10 c).

    Attributes:
        ids: the model's temporal IDs; `jaxid ids temporal` makes them.
    """

    name: ClassVar[str] = "temporal-steer"
    reading: ClassVar[Reading] = Reading(axes=("layer", "frame"), before="control", after="steered")

    ids: Path

    def read_ids(self) -> TemporalIDs:
        """The temporal IDs."""
        return TemporalIDs.load(self.ids)

    def default_layers(self, model: Model) -> Sequence[int]:
        """The layer as deep as the published 13 of 28."""
        return [min(model.num_layers - 1, round(13 * model.num_layers / 28))]

    def swept(self, session: Session) -> dict[str, Sequence[int]]:
        """Every frame."""
        return {"frame": session.ids.frames}

    def prepare(self, session: Session, items: Sequence[OrderItem]) -> OrderBatch:
        """The questions about the clips."""
        return self.questions(session, items)

    def asked(self, batch: OrderBatch) -> list[RelationBatch]:
        """The questions."""
        return [batch.asked]

    def edited(self, batch: OrderBatch) -> dict[str, Int[np.ndarray, "B P"]]:
        """The words of the second scene."""
        return {"": batch.second}

    def compute(self, session: Session, items: Sequence[OrderItem], batch: OrderBatch) -> Later:
        """A row for each layer, frame, item and word."""
        options = {"layers": session.layers, "strength": self.strength}
        found = steer_to_frames(session.model, batch, session.ids, **options, fetch=False)
        return partial(self.rows_of, session, items, ANSWERS, found)

    def summarise(self, session: Session, table: Columns) -> TemporalSteerSummary:
        """Changes by layer and frame, and their rank correlation with the frame."""
        frames = session.ids.frames
        found = self.changes(session, table, ANSWERS)
        means = found.mean(axis=-2)
        return TemporalSteerSummary(
            **session.facts,
            layers=session.layers,
            words=list(ANSWERS),
            frames=list(frames),
            change_mean=means,
            change_std=found.std(axis=-2),
            rank_correlation=[rank_correlation(lead, np.array(frames)) for lead in means[..., 0] - means[..., 1]],
        )

    def figures(self, session: Session, table: Columns, summary: TemporalSteerSummary) -> Iterator[tuple[str, Figure]]:
        """The changes by frame, at the middle layer."""
        shown = len(session.layers) // 2
        figure = plots.temporal_steering(
            np.array(summary.frames),
            self.changes(session, table, ANSWERS)[shown],
            summary.words,
            f"{summary.model}, layer {session.layers[shown]}",
            about=summary.about(self.strength),
        )
        yield "temporal_steering", figure

    def report(self, summary: TemporalSteerSummary) -> Iterator[str]:
        """The change of log p(before) - log p(after), by frame."""
        for layer, change in zip(summary.layers, summary.change_mean, strict=True):
            lead = ", ".join(f"{before - after:+.2f}" for before, after in change)
            yield f"layer {layer}: change of log p(before) - log p(after) by frame {lead}"
        yield f"{summary.items} items{summary.skipped_note}"
