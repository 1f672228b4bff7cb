"""The demo: finds the spatial IDs of tiny-llava, draws them, and shows that they are causal."""

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from tqdm import tqdm

from jaxid import io, plots
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checks import Count, check_finite
from jaxid.data import scenes as drawn
from jaxid.data.coco_spatial import ANSWERS, query
from jaxid.data.grid import CELL_SIZE, GridItem, placements
from jaxid.data.objects import OBJECTS
from jaxid.data.pictures import mirrored
from jaxid.errors import DataError
from jaxid.experiments.activation_swap import statistics, swap_activations
from jaxid.experiments.base import Command, write_config
from jaxid.experiments.belief_swap import Swapped, swap_beliefs
from jaxid.experiments.compare import CONDITIONS
from jaxid.experiments.demo_report import render
from jaxid.experiments.demo_view import mirror_run, steering_run, swap_run
from jaxid.experiments.relations import prepare
from jaxid.experiments.session import Columns, spread
from jaxid.experiments.steering import CELLS, steer_to_cells
from jaxid.families.base import Model
from jaxid.ids.extract import centred_words, extract_spatial
from jaxid.ids.spatial import SpatialIDs
from jaxid.io import joined, tidy
from jaxid.kernels import probing
from jaxid.stats import confidence_interval, mean_interval
from jaxid.viewer.content import Content
from jaxid.viewer.page import write_page
from jaxid.zoo import evaluation
from jaxid.zoo import tiny_llava as recipe

STEERING = 1.0
"""Strength of the steering vectors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Command[dict[str, Any]]):
    """Find the spatial IDs of the model that ships with jaxid, draw them, and show that they are causal.

    Attributes:
        out: folder for report, page, summary, tables and figures.
        model: tiny-llava, or the folder of a model that was trained like it.
        mesh: devices that share the model and the work, such as data=4,model=2; auto takes all of them. By default one.
        seed: seed of the scenes and of the noise.
        accuracy_questions: number of questions of each kind.
        partners: number of objects that each object is paired with to extract IDs.
        swap_items: questions of each relation whose beliefs are swapped.
        steer_items: questions of each relation that are steered.
        strengths: norms of the swap's vectors in units of the words' activations; 5 as published.
        progress: show progress bars, on terminals.
    """

    name: ClassVar[str] = "demo"

    out: Path = Path("demo")
    model: str = "tiny-llava"
    mesh: str | None = None
    seed: int = 0
    accuracy_questions: Count = 256
    partners: Count = 2
    swap_items: Count = 160
    steer_items: Count = 32
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 2.0, 5.0)
    progress: bool = True

    def run(self) -> dict[str, Any]:
        """Runs the demo and writes report, summary, tables and figures.

        Returns:
            The content of `summary.json`.

        Raises:
            OutputError: if `out` cannot be written.
            CheckpointError: if the model cannot be loaded.
        """
        for folder in (self.out, self.out / "results", self.out / "figures"):
            io.ensure_output_folder(folder)
        started = time.perf_counter()
        # The bar is closed before an error is printed, so that the error starts on a new line.
        with tqdm(
            total=1 + len(PARTS),
            disable=self.no_bar,
            bar_format="{l_bar}{bar}| {n}/{total} [{elapsed}]",
            desc="loading",
        ) as bar:
            work = _Work(self)
            bar.update()
            for name, part in PARTS.items():
                bar.set_description(name)
                part(work)
                bar.update()
        summary = work.summary | {
            "seeds": {"demo": self.seed},
            "versions": _versions(),
            "seconds": round(time.perf_counter() - started, 1),
        }
        io.write_text(self.out / "report.md", render(summary))
        write_page(self.out / "view.html", work.contents)
        io.write_json(self.out / "summary.json", summary)
        write_config(self, self.out)
        return summary

    @property
    def no_bar(self) -> bool | None:
        """The value of tqdm's `disable`: None draws bars on terminals only."""
        return None if self.progress else True

    def report(self, result: dict[str, Any]) -> Iterator[str]:
        """The main numbers."""
        layer, belief, noise = result["best_layer"], result["belief_swap"], result["noise_swap"]
        yield (
            f"{result['model']}: left/right {result['accuracy']['left_right']:.1%} correct; layer {layer}, strength "
            f"{result['best_factor']}: beliefs swapped {belief[layer]:.1%} by IDs, {noise[layer]:.1%} by noise."
        )
        yield f"Report: {self.out / 'report.md'}, to explore: {self.out / 'view.html'} ({result['seconds']} s)"


class _Work:
    """The model, its questions, and the results that later parts read."""

    ids: SpatialIDs
    best_layer: int

    def __init__(self, demo: Demo):
        self.demo = demo
        self.summary: dict[str, Any] = {}
        self.contents: list[Content] = []
        checkpoint = open_checkpoint(demo.model).on(demo.mesh)
        rng = np.random.default_rng((55, demo.seed))
        self.items = {axis: evaluation.relation_items(rng, demo.swap_items, axis)[0] for axis in ANSWERS}
        for items in self.items.values():  # errors in questions are raised before the weights are read
            asked = prepare(checkpoint.model, items[:4])
            asked.forms(checkpoint.model.processor)
        self.model = checkpoint.load()
        self.layers = list(range(self.model.num_layers))
        self.batches = {axis: prepare(self.model, items) for axis, items in self.items.items()}

    def table(self, name: str, columns: Columns) -> None:
        io.write_table(self.demo.out / "results" / f"{name}.parquet", dict(columns))

    def figure(self, name: str, figure: Figure) -> None:
        plots.save(figure, self.demo.out / "figures" / f"{name}.png")

    def about(
        self, items: int | None = None, *, unit: str = "items", strength: float | None = None, note: str = ""
    ) -> plots.About:
        return plots.About(model=self.model.name, items=items, unit=unit, strength=strength, note=note)

    def ask(self) -> None:
        """The model's answers on scenes that it was not trained on."""
        accuracy = evaluation.evaluate(self.model, count=self.demo.accuracy_questions, seed=self.demo.seed + 1)
        fields = ("value", "low", "high", "count")
        columns = {field: [getattr(one, field) for one in accuracy.values()] for field in fields}
        self.table("accuracy", {"model": [self.model.name] * len(accuracy), "question": list(accuracy)} | columns)
        samples = [items[row] for row in range(6) for items in self.items.values()]
        pictures, questions = np.stack([np.asarray(item.picture) for item in samples]), [item.query for item in samples]
        given, truths = evaluation.answers(self.model, pictures, questions), [item.relation for item in samples]
        self.figure("scenes", plots.scenes_with_answers(pictures, questions, given, truths, about=self.about()))
        self.summary |= {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "accuracy": {name: round(one.value, 4) for name, one in accuracy.items()},
            "accuracy_interval": {name: rounded([one.low, one.high]) for name, one in accuracy.items()},
        }

    def find_ids(self) -> None:
        """The IDs, and their geometry."""
        pairs, total, pictures = grid_items(self.demo.partners, self.demo.seed)
        bar = tqdm(pictures, total=total, unit="picture", leave=False, disable=self.demo.no_bar)
        # An iterator, not the bar itself: run-time type checkers look into collections, and the bar seems to be one.
        self.ids = extract_spatial(self.model, iter(bar), pairs=pairs)
        self.ids.save(self.demo.out / "results" / "spatial_ids.safetensors")
        probes = probe_ids(self.ids)
        self.table("ids_by_layer", {"model": [self.model.name] * len(self.layers), "layer": self.layers} | probes)
        shares = (
            np.array(probes[name]) for name in ("explained_variance", "row_share", "column_share", "id_agreement")
        )
        self.figure("variance", plots.variance_by_layer(*shares, about=self.about(total, unit="pictures")))
        self.summary |= probes | {"word_angles": probe_words(self.model, self.ids)}

    def swap(self) -> None:
        """Beliefs swapped by IDs and by noise; layer and strength are chosen on the first quarter of the items."""
        demo, strengths = self.demo, np.array(self.demo.strengths)
        swaps = {
            axis: swap_beliefs(
                self.model, batch, self.ids, layers=self.layers, strengths=demo.strengths, seed=demo.seed
            )
            for axis, batch in self.batches.items()
        }
        for found in swaps.values():
            check_finite(f"the log-probabilities of {self.model.name}", found.steered, DataError)
        self.table("belief_swap", joined([self._swap_table(axis, found) for axis, found in swaps.items()]))
        choosing = demo.swap_items // 4
        counted = demo.swap_items - choosing
        self.best_layer, best = choose_best(swaps, choosing)
        rates = np.stack([found.swapped[..., choosing:].mean(axis=-1) for found in swaps.values()])  # [R, C, L, S]
        at_best, by_strength = rates[..., best], rates.mean(axis=0)[:, self.best_layer]
        intervals = np.array([confidence_interval(round(rate * counted), counted) for rate in at_best.ravel()])
        intervals = intervals.reshape(*at_best.shape, 2)
        mean, names = at_best.mean(axis=0), ["_".join(ANSWERS[axis]) for axis in swaps]
        self.summary |= {
            "best_layer": self.best_layer,
            "best_factor": demo.strengths[best],
            "belief_swap": rounded(mean[0]),
            "noise_swap": rounded(mean[1]),
            "swap_by_factor": {
                str(strength): dict(zip(CONDITIONS, rounded(by_strength[:, index]), strict=True))
                for index, strength in enumerate(demo.strengths)
            },
            "swap_by_relation": {
                name: {
                    condition: {"rate": rounded(at_best[row, column]), "interval": rounded(intervals[row, column])}
                    for column, condition in enumerate(CONDITIONS)
                }
                for row, name in enumerate(names)
            },
            "swap_items": {"choosing": choosing, "reported": counted, "per": "relation"},
            "control_accuracy": {
                name: rounded(found.correct.mean()) for name, found in zip(names, swaps.values(), strict=True)
            },
        }
        chosen = f"layer and strength chosen on {choosing} other items of each"
        figure = plots.belief_swap_by_layer(
            np.array(self.layers),
            at_best[:, 0],
            at_best[:, 1],
            [name.replace("_", "/") for name in names],
            belief_intervals=intervals[:, 0],
            noise_intervals=intervals[:, 1],
            strength=demo.strengths[best],
            strength_layer=self.best_layer,
            strengths=strengths,
            belief_by_strength=by_strength[0],
            noise_by_strength=by_strength[1],
            about=self.about(counted, note=chosen, unit="items of each relation"),
        )
        self.figure("belief_swap", figure)
        self._draw_plane()
        self.contents.append(swap_run(self.model, self.items, self.batches, swaps, self.ids))

    def _swap_table(self, axis: str, found: Swapped) -> Columns:
        axes = {
            "condition": CONDITIONS,
            "layer": self.layers,
            "strength": found.strengths.tolist(),
            "item": range(len(found.truth)),
            "word": ANSWERS[axis],
        }
        shape = found.steered.shape
        return tidy(found.steered, axes, name="logprob") | {
            "relation": spread(axis, shape),
            "control": spread(found.control, shape),
            "truth": spread(np.array(ANSWERS[axis])[found.truth], shape, 3),
        }

    def _draw_plane(self) -> None:
        name, other = sorted(self.ids.objects, key=lambda known: known != "star")[:2]
        centred = [centred_words(self.model, query(name, other, pair[0]), pair) for pair in ANSWERS.values()]
        words = [word for pair in ANSWERS.values() for word in pair]
        cells, places = (
            np.asarray(self.ids.plane_coordinates(values))[self.best_layer]
            for values in (self.ids.for_object(name), jnp.asarray(np.concatenate(centred, axis=1)))
        )
        about = self.about(len(placements()) * self.demo.partners, unit="pictures")
        points = dict(zip(words, places, strict=True))
        self.figure("id_plane", plots.id_plane(cells, points, f"{name}, layer {self.best_layer}", about=about))

    def steer(self) -> None:
        """The subject steered to every cell."""
        self.summary["steering"] = {}
        for axis, items in self.items.items():
            batch = prepare(self.model, items[: self.demo.steer_items])
            found = steer_to_cells(self.model, batch, self.ids, layers=self.layers, strength=STEERING)
            change = found.change
            check_finite(f"the log-probabilities of {self.model.name}", change, DataError)
            axes = {"layer": self.layers, **CELLS, "item": range(change.shape[3]), "word": ANSWERS[axis]}
            self.table(f"steering_{axis}", tidy(change, axes, name="change"))
            along = (change[..., 0] - change[..., 1]).mean(axis=-1).mean(axis=2 if axis == "horizontal" else 1)
            self.summary["steering"]["_".join(ANSWERS[axis])] = {
                "preference_by_cell": rounded(along),
                "correlation": rounded([_correlation(layer) for layer in along]),
                "monotone": [bool((np.diff(layer) < 0).all()) for layer in along],
            }
            if axis == "horizontal":
                self._draw_steering(change)
            steered = items[: self.demo.steer_items]
            self.contents.append(steering_run(self.model, steered, batch, found, STEERING, self.ids))

    def _draw_steering(self, change: Float[np.ndarray, "L X Y B 2"]) -> None:
        layer, words = self.best_layer, ANSWERS["horizontal"]
        columns = change.mean(axis=2)

        def about(means: np.ndarray) -> plots.About:
            note = plots.means_note(mean_interval(means, axis=2))
            return self.about(change.shape[3], strength=STEERING, note=note)

        by_column = columns.mean(axis=2)
        figure = plots.steering_by_column(
            np.array(self.layers), by_column[..., 0], by_column[..., 1], words=words, about=about(columns)
        )
        self.figure("steering", figure)
        preference = change[layer, ..., 0] - change[layer, ..., 1]
        figure = plots.steering_map(change.mean(axis=3)[layer], words, layer, about=about(preference))
        self.figure("steering_map", figure)

    def mirror(self) -> None:
        """Activations of the mirrored pictures replace those of the control run."""
        batch, words = self.batches["horizontal"], ANSWERS["horizontal"]
        pictures = [mirrored(np.asarray(item.picture)) for item in self.items["horizontal"]]
        changed = self.model.prepare(pictures, list(batch.prompts.questions), raw=batch.prompts.raw)
        patched = swap_activations(self.model, batch, changed)
        scores = patched.scores
        axes = {"tokens": list(scores), "layer": self.layers, "item": range(len(pictures)), "word": words}
        self.table("mirror_swap", tidy(np.stack(list(scores.values())), axes, name="score"))
        self.figure("mirror_swap", plots.swap_scores(scores, words, robust=True, about=self.about()))
        found = statistics(scores)
        self.summary |= {
            # The mean of the two words' medians over items.
            "mirror_swap": {name: rounded(median.mean(axis=1)) for name, median in found.score_median.items()},
            "mirror_swap_by_word": {name: rounded(median) for name, median in found.score_median.items()},
            "mirror_swap_items": found.score_items,
        }
        self.contents.append(mirror_run(self.model, self.items["horizontal"], batch, patched))


PARTS: Mapping[str, Callable[[_Work], None]] = {
    "answers on unseen scenes": _Work.ask,
    "spatial IDs": _Work.find_ids,
    "belief swap": _Work.swap,
    "steering": _Work.steer,
    "mirror swap": _Work.mirror,
}
"""The experiments in their order; later ones read the results of earlier ones."""


def grid_items(partners: int, seed: int) -> tuple[list[tuple[str, str]], int, Iterator[GridItem]]:
    """All placements of every object beside a few others: the pairs, the number of pictures, and the pictures."""
    rng = np.random.default_rng((331, seed))
    size = len(OBJECTS)
    pairs = [((b + step) % size, b) for b in range(size) for step in rng.permutation(size - 1)[:partners] + 1]
    cells = np.array(placements())

    def items() -> Iterator[GridItem]:
        for a, b in pairs:
            count = len(cells)
            scenes = drawn.sample_grid(
                rng, np.full(count, a), cells[:, 0], np.full(count, b), cells[:, 1], jitter_angle=10.0
            )
            for picture, (cell_a, cell_b) in zip(drawn.render(scenes, recipe.IMAGE_SIZE), placements(), strict=True):
                yield GridItem(
                    picture=picture,
                    object_a=OBJECTS[a],
                    object_b=OBJECTS[b],
                    cell_a=cell_a,
                    cell_b=cell_b,
                    size=CELL_SIZE,
                )

    return [(OBJECTS[a], OBJECTS[b]) for a, b in pairs], len(pairs) * len(cells), items()


def choose_best(swaps: Mapping[str, Swapped], choosing: int) -> tuple[int, int]:
    """Indices of the layer and strength with the largest lead of belief over noise, on the first items only."""
    lead = np.mean([found.swapped[..., :choosing].mean(axis=-1) for found in swaps.values()], axis=0)
    layer, strength = np.unravel_index(np.argmax(lead[0] - lead[1]), lead.shape[1:])
    return int(layer), int(strength)


def probe_ids(ids: SpatialIDs) -> dict[str, list[float]]:
    """The geometry of the IDs, layer by layer."""
    column, row = probing.row_column_shares(ids.universal)
    correlation = np.asarray(probing.place_correlation(ids.universal))
    numbers = {
        "explained_variance": ids.explained_variance(),
        "id_agreement": ids.agreement(),
        "column_correlation": correlation[:, 0],
        "row_correlation": correlation[:, 1],
        "axes_cosine": probing.axes_cosine(*ids.axes()),
        "row_share": row,
        "column_share": column,
    }
    smallest = np.asarray(ids.separations()).min(axis=1)
    numbers |= {"column_gap": smallest[:, 0], "row_gap": smallest[:, 1]}
    return {name: rounded(values) for name, values in numbers.items()}


def probe_words(model: Model, ids: SpatialIDs) -> dict[str, list[float]]:
    """How far words for places, read inside questions without a picture, lie off the axes of the IDs.

    Returns:
        For "left_right" and "above_below", by layer: the largest angle in the plane, over questions about different
        objects, between the step from the first word to the second and the axis, in degrees.
    """
    found = {}
    for index, words in enumerate(ANSWERS.values()):
        steps = []
        for first, second in zip(OBJECTS, np.roll(OBJECTS, 5).tolist(), strict=True):
            centred = centred_words(model, query(first, second, words[0]), words)
            places = np.asarray(ids.plane_coordinates(jnp.asarray(centred)))
            steps.append(places[:, 1] - places[:, 0])
        step = np.stack(steps)
        angles = np.degrees(np.arctan2(np.abs(step[..., 1 - index]), step[..., index]))
        found["_".join(words)] = rounded(angles.max(axis=0))
    return found


def rounded(values: object) -> Any:
    """Numbers to four places, as lists."""
    return np.round(np.asarray(values, np.float64), 4).tolist()


def _correlation(values: Float[np.ndarray, "4"]) -> float:
    """Correlation with the index of the column or row; 0 if nothing varies, as after the last layer."""
    return float(np.corrcoef(np.arange(4), values)[0, 1]) if np.ptp(values) > 1e-6 else 0.0


def _versions() -> dict[str, str]:
    names = ("jaxid-vlm", "jax", "jaxlib", "flax", "transformers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
