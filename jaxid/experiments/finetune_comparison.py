"""`jaxid compare-finetune`: fine-tuning runs with the ID loss and without it, compared at every evaluation."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from jaxid import io, plots
from jaxid.checks import check_finite, check_seed
from jaxid.data.files import write_csv
from jaxid.errors import DataError, InputError, JaxidError
from jaxid.experiments.base import Command, write_config
from jaxid.experiments.finetune_geometry import MEASURES, OTHER, OWN
from jaxid.experiments.finetune_run import PARTS, SETS, Finetune
from jaxid.stats import mean_interval

WITH, ELSE, WITHOUT = "with_ids", "other_ids", "without_ids"
"""Kinds of runs: the ID loss takes the model's own IDs, those of another model, or there is none."""
DIFFERENCES = {f"{one} - {other}": (one, other) for one, other in ((WITH, WITHOUT), (ELSE, WITHOUT), (ELSE, WITH))}
"""Kinds of runs that are compared in pairs, seed by seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean over runs with Student's 95 % interval; for a single run, just its value."""

    mean: float
    low: float
    high: float
    values: list[float]

    @classmethod
    def of(cls, values: Float[np.ndarray, "R"]) -> "Interval":
        """The interval of some runs' values."""
        mean, half = float(values.mean()), float(np.nan_to_num(mean_interval(values)))
        return cls(mean=mean, low=mean - half, high=mean + half, values=values.tolist())


Comparison = Mapping[str, Mapping[str, Interval]]
"""Intervals by evaluation set or measure of geometry, then by kind of run, "before", and difference."""

Curves = dict[str, dict[str, Float[np.ndarray, "R C"]]]
"""Values by set or measure, then by kind or difference: a row for each seed, a column for each evaluation."""


@dataclasses.dataclass(frozen=True)
class CompareFinetune(Command[Comparison]):
    """Compare fine-tuning runs with and without the ID loss.

    Runs with the same seed are also compared in pairs. Of the runs with the ID loss, those with IDs of another model
    are a kind of their own.

    Attributes:
        folders: folders of runs that differ only in seed, weight of the ID loss, and IDs.
        out: folder for `comparison.json` (the last evaluation), `comparison.csv` (all of them), `comparison.png`, and
            `geometry.png` if the runs measured it.
    """

    name: ClassVar[str] = "compare-finetune"

    folders: tuple[Path, ...]
    out: Path = dataclasses.field(kw_only=True)

    def run(self) -> Comparison:
        """Reads the runs' summaries, compares their evaluations and draws them.

        Raises:
            DataError: if a folder holds no finished run, or runs of one kind are missing.
            InputError: if the runs differ in more than seed, weight and IDs.
        """
        kinds = self._read()
        runs = [run for of_kind in kinds.values() for run in of_kind.values()]
        steps = [int(row["step"]) for row in runs[0]["evaluations"]]
        sets, measures = sets_of(runs[0]), measures_of(runs)
        curves = {name: _curves(kinds, name) for name in (*sets, *measures)}
        found: dict[str, dict[str, Interval]] = {}
        for name, values in curves.items():
            found[name] = {kind: Interval.of(rows[:, -1]) for kind, rows in values.items()}
            # Runs of one seed begin with the same model and questions.
            first = {seed: value_at(run, name, 0) for of_kind in kinds.values() for seed, run in of_kind.items()}
            found[name]["before"] = Interval.of(np.array([first[seed] for seed in sorted(first)]))
        io.ensure_output_folder(self.out)
        write_config(self, self.out)
        io.write_json(self.out / "comparison.json", found)
        write_csv(self.out / "comparison.csv", _table(steps, curves))
        self._draw(np.array(steps), sets, measures, curves, kinds)
        return found

    def _draw(
        self,
        steps: np.ndarray,
        sets: Sequence[str],
        measures: Sequence[str],
        curves: Curves,
        kinds: Mapping[str, Mapping[int, Mapping[str, Any]]],
    ) -> None:
        """Draws accuracies with their differences and, if it was measured, the geometry."""
        runs = [run for of_kind in kinds.values() for run in of_kind.values()]
        other = other_model(runs)
        counts = sorted({int(row[f"{name}_questions"]) for run in runs for row in run["evaluations"] for name in sets})
        numbers = [len(of_kind) for of_kind in kinds.values()]
        asked = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        about = plots.About(
            model=str(runs[0]["model"]),
            items=str(numbers[0]) if len(set(numbers)) == 1 else ", ".join(map(str, numbers)),
            unit="runs of each kind",
            note=f"{asked} questions a point",
        )
        shown = {SETS[name]: {kind: curves[name][kind] for kind in kinds} for name in sets}
        pairs = {
            SETS[name]: {kind: rows for kind, rows in curves[name].items() if kind in DIFFERENCES} for name in sets
        }
        figure = plots.finetune_comparison(steps, shown, pairs, other=other, about=about)
        plots.save(figure, self.out / "comparison.png")
        if measures:
            named = {
                f"{MEASURES[name]} {other}" if name == OTHER else MEASURES[name]: curves[name] for name in measures
            }
            trained_on = {kind: name for kind, name in ((WITH, OWN), (ELSE, OTHER)) if name in measures}
            gains = {
                kind: np.stack([curves[name][pair][:, -1], curves[sets[0]][pair][:, -1]], axis=-1)
                for kind, name in trained_on.items()
                if (pair := f"{kind} - {WITHOUT}") in curves[name]
            }
            figure = plots.finetune_geometry(
                steps,
                {
                    shown: {kind: rows for kind, rows in values.items() if kind in kinds}
                    for shown, values in named.items()
                },
                gains,
                other=other,
                about=dataclasses.replace(
                    about, note=f"activations and IDs of held-out pairs; shares: {SETS[sets[0]]}"
                ),
            )
            plots.save(figure, self.out / "geometry.png")

    def _read(self) -> dict[str, dict[int, Mapping[str, Any]]]:
        """The runs' summaries by kind, and by seed."""
        kinds: dict[str, dict[int, Mapping[str, Any]]] = {WITH: {}, ELSE: {}, WITHOUT: {}}
        seen: dict[tuple[str, int], Path] = {}
        shared: list[object] = []
        for folder in self.folders:
            run = _read_summary(folder)
            shared.append(_shared(run))
            if shared[-1] != shared[0]:
                raise InputError(f"{folder} differs from {self.folders[0]} in more than seed, ID loss and IDs.")
            kind, seed = kind_of(run), run["config"]["seed"]
            if (kind, seed) in seen:
                raise InputError(f"{folder} and {seen[kind, seed]} are runs of one kind with the same seed.")
            seen[kind, seed], kinds[kind][seed] = folder, run
        if not kinds[WITHOUT] or not (kinds[WITH] or kinds[ELSE]):
            raise DataError("a comparison needs finished runs with the ID loss and without it (--id-weight 0).")
        others = {other_model([run]) for of_kind in kinds.values() for run in of_kind.values()} - {""}
        if len(others) > 1:
            raise InputError(f"the runs were compared with IDs of several other models: {', '.join(sorted(others))}.")
        return {kind: dict(sorted(of_kind.items())) for kind, of_kind in kinds.items() if of_kind}

    def report(self, result: Comparison) -> Iterator[str]:
        """A line for each set or measure and kind of run, of the last evaluation."""
        for name, entries in result.items():
            for kind, entry in entries.items():
                form = "+7.1%" if name in SETS else "+7.3f"
                yield (
                    f"{name:13s} {kind:23s} {entry.mean:{form}}   95 % interval {entry.low:{form}} to "
                    f"{entry.high:{form}}   {len(entry.values)} runs"
                )
        yield str(self.out / "comparison.png")


def kind_of(summary: Mapping[str, Any]) -> str:
    """The kind of a run."""
    if not summary["config"]["id_weight"]:
        return WITHOUT
    return WITH if summary.get("own_ids", True) else ELSE


def other_model(runs: Sequence[Mapping[str, Any]]) -> str:
    """The model besides the runs' own whose IDs were used or compared; empty if there is none."""
    for run in runs:
        found = run.get("compared_model", "") if run.get("own_ids", True) else run.get("ids_model") or "another model"
        if found:
            return str(found)
    return ""


def sets_of(summary: Mapping[str, Any]) -> list[str]:
    """The evaluation sets of a run."""
    return [name for name in SETS if name in summary["evaluations"][0]]


def measures_of(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measures of geometry that all evaluations of all runs hold."""
    rows = [row for run in runs for row in run["evaluations"]]
    return [name for name in MEASURES if all(name in row for row in rows)]


def value_at(summary: Mapping[str, Any], name: str, index: int) -> float:
    """A value of one of a run's evaluations."""
    return float(summary["evaluations"][index][name])


def _curves(kinds: Mapping[str, Mapping[int, Mapping[str, Any]]], name: str) -> dict[str, Float[np.ndarray, "R C"]]:
    """The values of a set or measure by kind of run, and their differences over the seeds that both kinds have."""

    def values(kind: str, seeds: Sequence[int]) -> Float[np.ndarray, "R C"]:
        return np.array([[float(row[name]) for row in kinds[kind][seed]["evaluations"]] for seed in seeds])

    found = {kind: values(kind, list(of_kind)) for kind, of_kind in kinds.items()}
    for difference, (one, other) in DIFFERENCES.items():
        both = sorted(set(kinds.get(one, {})) & set(kinds.get(other, {})))
        if both:
            found[difference] = values(one, both) - values(other, both)
    return found


def _table(steps: Sequence[int], curves: Curves) -> list[list[object]]:
    """The rows of `comparison.csv`."""
    lines: list[list[object]] = [["set", "runs", "step", "mean", "low", "high", "values"]]
    for name, by_kind in curves.items():
        for kind, rows in by_kind.items():
            for step, column in zip(steps, rows.T, strict=True):
                entry = Interval.of(column)
                numbers = (f"{value:.4f}" for value in (entry.mean, entry.low, entry.high))
                lines.append([name, kind, step, *numbers, " ".join(f"{value:.4f}" for value in entry.values)])
    return lines


def _read_summary(folder: Path) -> Mapping[str, Any]:
    path = folder / "summary.json"
    try:
        found = io.read_json(path, DataError)
        with io.reading(path, "the summary of a fine-tuning run", DataError):
            if found["experiment"] != Finetune.name or not found["evaluations"]:
                raise ValueError("it is of another experiment, or holds no evaluation")
            check_seed(found["config"]["seed"])
            check_finite("id_weight", float(found["config"]["id_weight"]))
            for row in found["evaluations"]:
                numbers = [row["step"], *(row[f"{name}{part}"] for name in sets_of(found) for part in PARTS)]
                numbers += [row[name] for name in MEASURES if name in row]
                check_finite("an evaluation", np.array(numbers, np.float64))
    except JaxidError as error:
        raise DataError(f"{folder} holds no finished fine-tuning run ({io.first_line(error)}).") from error
    return found


def _shared(summary: Mapping[str, Any]) -> object:
    """The part of a summary in which compared runs must agree."""
    config = {name: value for name, value in summary["config"].items() if name not in ("seed", "id_weight")}
    return summary["model"], config, [row["step"] for row in summary["evaluations"]], sets_of(summary)
