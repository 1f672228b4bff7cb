"""`jaxid zoo gates`: what tiny-llava has to show on scenes that were never looked at, over several seeds."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float

from jaxid import io
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checks import Range
from jaxid.data import scenes as drawn
from jaxid.data.scenes import GRID, OBJECTS, Scenes
from jaxid.data.three_objects import sample_in_between
from jaxid.experiments.base import Command, write_config
from jaxid.experiments.demo import Demo
from jaxid.experiments.depth import QUESTIONS
from jaxid.experiments.relations import prepare_questions
from jaxid.experiments.steering import KINDS, Kind, steer_to_cells
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.stats import confidence_interval
from jaxid.zoo import evaluation
from jaxid.zoo import tiny_llava as recipe

STRENGTH = 0.5
"""Strength of the steering vectors, in differences of two cells' IDs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """Something that a model has to show.

    Attributes:
        name: what is measured.
        least: smallest value that passes; None without a lower bound.
        most: largest value that passes; None without an upper bound.
        value: the value; of numbers that are not counts, the worst over seeds.
        low: lower end of the 95 % interval of a share, or the smallest value over seeds.
        high: upper end, or the largest value.
    """

    name: str
    value: float
    low: float
    high: float
    least: float | None = None
    most: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the value is within the bounds."""
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        ends = ((">=", self.least), ("<=", self.most))
        return " and ".join(f"{sign} {end:g}" for sign, end in ends if end is not None) or "no bound"


ACCURACY = {
    "left_right": 0.99,
    "above_below": 0.99,
    "near_far": 0.9,
    "between": 0.9,
    "depth": 0.9,
    "color": 0.9,
}
"""Least share of correct answers, by kind of question; other kinds have no bound."""

GEOMETRY = {
    "explained_variance": 0.8,
    "column_correlation": 0.98,
    "row_correlation": 0.98,
    "column_gap": 0.0,
    "row_gap": 0.0,
}
"""Least values of the IDs' geometry at the layer of the belief swap."""

MOST_ANGLE = 35.0
"""Largest angle between a step from one word to its opposite and the axis, in degrees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gates(Command[list[Gate]]):
    """Measure what tiny-llava has to show, on scenes of several seeds, with 95 % intervals.

    Attributes:
        out: folder for a demo of each seed, `gates.json` and `gates.md`.
        model: tiny-llava, or the folder of a model that was trained like it.
        seeds: number of seeds.
        seed: the first one.
        items: steered items of each question and seed.
        progress: show progress bars, on terminals.
    """

    name: ClassVar[str] = "zoo gates"

    out: Path
    model: str = "tiny-llava"
    seeds: Annotated[int, Range(1, 100)] = 3
    seed: int = 101
    items: Annotated[int, Range(4)] = 48
    progress: bool = True

    def run(self) -> list[Gate]:
        """Runs a demo for each seed, steers the further questions, and compares with the bounds.

        Raises:
            OutputError: if `out` cannot be written.
            CheckpointError: if the model cannot be loaded.
        """
        io.ensure_output_folder(self.out)
        model, runs = open_checkpoint(self.model).load(), []
        for seed in range(self.seed, self.seed + self.seeds):
            folder = self.out / f"seed-{seed}"
            summary = Demo(out=folder, model=self.model, seed=seed, progress=self.progress).run()
            ids = SpatialIDs.load(folder / "results" / "spatial_ids.safetensors")
            steered = steered_further(model, ids, summary["best_layer"], self.items, seed)
            answers = io.read_table(folder / "results" / "accuracy.parquet").to_pylist()
            runs.append(Run(summary=summary, answers={row["question"]: row for row in answers}, **steered))
        gates = [gate for part in (of_answers, of_swaps, of_geometry, of_steering) for gate in part(runs)]
        io.write_json(self.out / "gates.json", [dataclasses.asdict(gate) | {"passed": gate.passed} for gate in gates])
        io.write_text(self.out / "gates.md", table(gates))
        write_config(self, self.out)
        return gates

    def report(self, result: list[Gate]) -> Iterator[str]:
        """A line for every gate."""
        for gate in result:
            mark = "passed" if gate.passed else "MISSED"
            yield f"{mark}  {gate.name}: {gate.value:.3f} ({gate.low:.3f} to {gate.high:.3f}); {gate.bounds}"
        yield f"{sum(gate.passed for gate in result)} of {len(result)} passed; {self.out / 'gates.md'}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What was measured with one seed.

    Attributes:
        summary: the demo's summary.
        answers: the rows of its table of answers, by kind of question.
        near_far: change of log p(near) - log p(far) by distance of the steered cell's column from the object's.
        between: change of log p(yes) - log p(no) by row of the steered cell; the other two are in the first row.
        depth: change of log p(first word) - log p(second word) by row, for the questions about height and depth.
    """

    summary: dict[str, Any]
    answers: Mapping[str, Mapping[str, Any]]
    near_far: Float[np.ndarray, "4"]
    between: Float[np.ndarray, "4"]
    depth: Mapping[str, Float[np.ndarray, "4"]]

    def at_best(self, by_layer: Sequence[Any]) -> Any:
        """The entry of the layer that the belief swap chose."""
        return by_layer[self.summary["best_layer"]]


# --- steering -------------------------------------------------------------------------------------------------------


def steered_further(model: Model, ids: SpatialIDs, layer: int, items: int, seed: int) -> dict[str, Any]:
    """Steers the subjects of the questions that the demo does not ask; see `Run`."""
    rng = np.random.default_rng((88, seed))

    def preference(scenes: Scenes, kind: Kind, slots: Sequence[int]) -> Float[np.ndarray, "X Y B"]:
        names = [tuple(OBJECTS[index] for index in row) for row in scenes.objects[:, list(slots)].tolist()]
        batch = prepare_questions(
            model,
            list(drawn.render(scenes, recipe.IMAGE_SIZE)),
            [kind.text.format(*some) for some in names],
            names,
            axis=kind.axis,
            answers=kind.answers,
            truth=[-1] * len(names),
        )
        change = steer_to_cells(model, batch, ids, layers=[layer], strength=STRENGTH).change[0]
        return np.asarray(change[..., 0] - change[..., 1])

    scenes, reversed_ = far_scenes(rng, items)
    near_far = towards(preference(scenes, KINDS["near-far"], (0, 1)).mean(axis=1), reversed_)
    between = preference(outside_scenes(rng, items), KINDS["between"], (2, 0, 1)).mean(axis=(0, -1))
    world = evaluation.held_out_worlds(rng, items, lambda size: recipe.perspective(rng, "all", size))
    depth = {name: preference(world.scenes, kind, (0, 1)).mean(axis=(0, -1)) for name, kind in QUESTIONS.items()}
    return {"near_far": near_far, "between": between, "depth": depth}


def far_scenes(rng: np.random.Generator, count: int) -> tuple[Scenes, Bool[np.ndarray, "N"]]:
    """Scenes with an object at each end of the top row; whether the steered one is at the right end."""
    ends = np.array([[0, 0], [GRID - 1, 0]])
    names = rng.random((count, len(OBJECTS))).argsort(axis=1)[:, :2]
    right = np.arange(count) % 2 == 1
    first, second = (np.where(right[:, None], ends[1 - side], ends[side]) for side in (0, 1))
    return drawn.sample_grid(rng, names[:, 0], first, names[:, 1], second, jitter_angle=10.0), right


def outside_scenes(rng: np.random.Generator, count: int) -> Scenes:
    """Scenes of two objects at the ends of the first row, and a third one, which is steered, two rows or more below."""
    return sample_in_between(rng, 2 * count)[1::2]


def towards(found: Float[np.ndarray, "4 B"], reversed_: Bool[np.ndarray, "B"]) -> Float[np.ndarray, "4"]:
    """Mean over items by distance of the cell from the last column, or from the first one if reversed."""
    return np.where(reversed_, found, found[::-1]).mean(axis=-1)


# --- gates ----------------------------------------------------------------------------------------------------------


def of_answers(runs: Sequence[Run]) -> Iterator[Gate]:
    """Shares of correct answers, pooled over seeds."""
    for kind in runs[0].answers:
        rows = [run.answers[kind] for run in runs]
        count = sum(row["count"] for row in rows)
        right = round(sum(row["value"] * row["count"] for row in rows))
        yield _share(f"correct: {kind}", right, count, least=ACCURACY.get(kind))


def of_swaps(runs: Sequence[Run]) -> Iterator[Gate]:
    """Belief swap at every seed's own layer and strength, pooled over seeds, and the mirror swap at every layer."""
    for condition, least, most in (("belief", 0.97, None), ("noise", None, 0.06)):
        for relation in runs[0].summary["swap_by_relation"]:
            count = sum(run.summary["swap_items"]["reported"] for run in runs)
            right = 0.0
            for run in runs:
                rates = run.summary["swap_by_relation"][relation][condition]["rate"]
                right += run.at_best(rates) * run.summary["swap_items"]["reported"]
            yield _share(f"{condition} swap: {relation}", round(right), count, least=least, most=most)
    first, last = ([run.summary["mirror_swap"]["image"][layer] for run in runs] for layer in (0, -1))
    yield _worst("mirror swap of the image tokens after the first layer", first, least=0.95)
    yield _worst("mirror swap of the image tokens after the last layer", last, most=0.05)
    words = [max(run.summary["mirror_swap"]["words"]) for run in runs]
    yield _worst("mirror swap of the two words, best layer", words, least=0.9)


def of_geometry(runs: Sequence[Run]) -> Iterator[Gate]:
    """The IDs' geometry at the layer of the belief swap."""
    for name, least in GEOMETRY.items():
        yield _worst(
            name.replace("_", " "), [run.summary[name][run.summary["best_layer"]] for run in runs], least=least
        )
    for words in runs[0].summary["word_angles"]:
        angles = [run.summary["word_angles"][words][run.summary["best_layer"]] for run in runs]
        yield _worst(f"angle of the words {words.replace('_', ' and ')}", angles, most=MOST_ANGLE)


def of_steering(runs: Sequence[Run]) -> Iterator[Gate]:
    """Whether answers follow the steered cell: the smallest step towards it, as a share of the whole range."""
    for name in runs[0].summary["steering"]:
        lines = [
            np.array(run.summary["steering"][name]["preference_by_cell"][run.summary["best_layer"]]) for run in runs
        ]
        yield _worst(f"steering: {name}", [_smallest_step(-line) for line in lines], least=0.0)
    yield _worst("steering: near_far", [_smallest_step(-run.near_far) for run in runs], least=0.0)
    yield _worst("steering: between", [_smallest_step(-run.between) for run in runs], least=0.0)
    height, depth = ([run.depth[name] for run in runs] for name in ("height", "depth"))
    yield _worst("steering height: above_below", [_smallest_step(-line) for line in height], least=0.0)
    shares = [float(np.ptp(one) / np.ptp(other)) for one, other in zip(depth, height, strict=True)]
    yield _worst("steering height moves front_behind, as a share of above_below", shares)
    correlations = [float(np.corrcoef(one, other)[0, 1]) for one, other in zip(depth, height, strict=True)]
    yield _worst("correlation of the two", correlations)


def _smallest_step(line: Float[np.ndarray, "4"]) -> float:
    return float(np.diff(line).min() / max(np.ptp(line), 1e-9))


def _share(name: str, right: int, count: int, **bounds: float | None) -> Gate:
    low, high = confidence_interval(right, count)
    return Gate(name=name, value=right / count, low=low, high=high, **bounds)


def _worst(name: str, values: Sequence[float], *, least: float | None = None, most: float | None = None) -> Gate:
    value = max(values) if most is not None else min(values)
    return Gate(name=name, value=float(value), low=float(min(values)), high=float(max(values)), least=least, most=most)


def table(gates: Sequence[Gate]) -> str:
    """The gates as a table in Markdown."""
    rows = ["| measure | value | interval or range | wanted | |", "| --- | --- | --- | --- | --- |"]
    for gate in gates:
        mark = "" if gate.bounds == "no bound" else "passed" if gate.passed else "missed"
        rows.append(f"| {gate.name} | {gate.value:.3f} | {gate.low:.3f} to {gate.high:.3f} | {gate.bounds} | {mark} |")
    return "\n".join(rows) + "\n"
