"""Extracts temporal IDs from a folder of clips ([ID] arXiv 2601.12626, Figure 10 b)."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from jaxid import jobs, plots
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checks import Count, check_finite
from jaxid.data.clips import AppearItem, read_appear_folder
from jaxid.errors import DataError
from jaxid.experiments.base import SkippedItems, write_config
from jaxid.experiments.spatial_ids import Extraction
from jaxid.experiments.temporal import ANSWERS
from jaxid.ids.extract import TEMPORAL_QUESTION, centred_words, extract_temporal
from jaxid.ids.temporal import TemporalIDs, accumulate_temporal_ids
from jaxid.io import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalExtraction:
    """What temporal IDs were extracted from, and coordinates along each layer's line from early to late.

    Attributes:
        model: name of the model.
        fingerprint: fingerprint of its checkpoint.
        clips: number of clips used.
        pairs: number of ordered pairs of objects.
        skipped: clips that could not be used: their count, keys and reasons.
        frames: the frames at which objects appear.
        rank_correlation: Spearman's rank correlation of an ID's coordinate with its frame, by layer.
        share_of_variance: share of the IDs' variance along the line, by layer.
        coordinates: coordinates of the IDs by layer and frame; 0 is the earliest, 1 the latest.
        words: coordinates of "before" and "after" in the question without a clip, less their mean, by layer.
        best_layer: the layer with the highest rank correlation.
    """

    model: str
    fingerprint: str
    clips: int
    pairs: int
    skipped: SkippedItems
    frames: list[int]
    rank_correlation: Float[np.ndarray, "L"]
    share_of_variance: Float[np.ndarray, "L"]
    coordinates: Float[np.ndarray, "L F"]
    words: dict[str, Float[np.ndarray, "L"]]
    best_layer: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractTemporalIDs(Extraction[TemporalExtraction]):
    """Extract temporal IDs from clips in which objects appear, appear_{A}{i}_{B}{j}.mp4 (Figure 10 b).

    The coordinates along each layer's line from early to late are written beside the IDs, as .json and .png.

    Attributes:
        skip_bad: skip clips that are misnamed, unreadable or too short, and list them.
        reference_bugs: reproduce the bugs of the published code.
    """

    name: ClassVar[str] = "ids temporal"

    model: str = "tiny-video"
    batch_size: Count = 16
    skip_bad: bool = False
    reference_bugs: bool = False

    def run(self) -> TemporalExtraction:
        """Extracts the IDs; writes them, the coordinates along each layer's line, and the figure.

        Raises:
            DataError: for a bad clip, unless bad clips are skipped; or if none is left.
            OutputError: if a file cannot be written.
        """
        if self.reference_bugs:
            from jaxid.experiments.reference import with_bugs  # it knows all experiments

            return with_bugs(self)._run()
        return self._run()

    accumulate: ClassVar[Callable[..., TemporalIDs]] = staticmethod(accumulate_temporal_ids)
    """Makes IDs from the words' activations."""

    def _run(self) -> TemporalExtraction:
        self.check_output()
        bad: list[tuple[str, DataError]] = []
        items = read_appear_folder(self.data, bad=bad if self.skip_bad else None)
        misnamed = len(bad)
        checkpoint = open_checkpoint(self.model, dtype=self.dtype).on(self.mesh)
        first = next(self.opened(items, []))
        question = TEMPORAL_QUESTION.format(a=first.object_a, b=first.object_b)
        checkpoint.model.prepare([first.video], question).word(first.object_a)
        model = checkpoint.load()
        pairs = list(dict.fromkeys((item.object_a, item.object_b) for item in items))
        ids = extract_temporal(
            model,
            self.opened(self.with_bar(items, "clip"), bad),
            pairs=pairs,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
        )
        check_finite(f"the IDs of {self.model} in {self.dtype}", np.asarray(ids.values), DataError)
        ids.save(self.out)
        line, centred = ids.line(), centred_words(model, question, ANSWERS)
        found = TemporalExtraction(
            model=model.name,
            fingerprint=model.fingerprint,
            clips=len(items) - len(bad) + misnamed,
            pairs=len(pairs),
            skipped={"count": len(bad), "items": [{"key": key, "reason": str(error)} for key, error in bad]},
            frames=list(ids.frames),
            rank_correlation=line.order,
            share_of_variance=line.share,
            coordinates=line.coordinates(np.asarray(ids.universal)),
            words=dict(zip(ANSWERS, line.coordinates(centred, centred=True).T, strict=True)),
            best_layer=int(np.lexsort((line.share, line.order))[-1]),
        )
        write_json(self.out.with_suffix(".json"), found)
        plots.save(draw(found), self.out.with_suffix(".png"))
        write_config(self, self.out.parent, f"{self.out.stem}.yaml")
        return found

    def opened(self, items: Iterable[AppearItem], bad: list[tuple[str, DataError]]) -> Iterator[AppearItem]:
        """The items with their clips opened; the bad ones are noted if they are to be skipped.

        Raises:
            DataError: for a bad clip, unless bad clips are skipped; or if none is left.
        """
        some = False
        for item in items:
            try:
                clip = item.open()
            except DataError as error:
                if not self.skip_bad:
                    raise jobs.bad_item(item.key, error) from error
                bad.append((item.key, error))
                continue
            some = True
            yield dataclasses.replace(item, video=clip)
        if not some:
            raise DataError(f"no clip of {self.data} could be used: {bad[-1][1] if bad else 'there are none'}")

    def report(self, result: TemporalExtraction) -> Iterator[str]:
        """Counts of clips and pairs, the rank correlation of IDs and frames, and how far apart the words lie."""
        order = ", ".join(f"{value:.2f}" for value in result.rank_correlation)
        count = result.skipped["count"]
        yield (
            f"{self.out}: {result.clips} clips, {result.pairs} pairs; rank correlation with the frame, by layer: "
            f"{order}{f'; {count} bad clips skipped' if count else ''}"
        )
        first, last = ANSWERS
        apart = ", ".join(f"{value:+.2f}" for value in result.words[last] - result.words[first])
        yield f'"{last}" beyond "{first}", as a share of the line from the first to the last frame, by layer: {apart}'


def draw(found: TemporalExtraction) -> Figure:
    """The best layer's IDs along its line, and the rank correlation with the frames by layer."""
    return plots.temporal_line(
        found.coordinates,
        np.array(found.frames),
        found.words,
        found.rank_correlation,
        found.best_layer,
        title=found.model,
        about=plots.About(
            items=found.clips, unit="clips", note="layer of the highest rank correlation, of the same clips"
        ),
    )
