"""Shares of swapped beliefs, in one run and across runs ([ID] arXiv 2601.12626, Figures 2 and 9)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure

from jaxid import io, plots
from jaxid.errors import DataError, JaxidError, OutputError
from jaxid.experiments.base import Command
from jaxid.experiments.session import Columns, as_array
from jaxid.stats import confidence_interval

CONDITIONS = ("belief", "noise")
"""What is added: the ID difference, or Gaussian noise of the same norm."""

BEST = 3
"""Layers that Figure 2 averages over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The layers at which most beliefs are swapped, and what is swapped there.

    Attributes:
        layers: the three best layers.
        belief: share swapped by IDs, the mean over these layers.
        belief_std: standard deviation of that share over the layers.
        belief_interval: Wilson's 95 % interval of the mean share.
        noise: share swapped by noise, the mean over the same layers.
        noise_std: standard deviation of the share swapped by noise.
        noise_interval: Wilson's 95 % interval of the share swapped by noise.
        items: number of items that the shares are of.
        chosen_on: "other items", or "same items" if the layers were chosen on the reported ones, as published.
    """

    layers: list[int]
    belief: float
    belief_std: float
    belief_interval: tuple[float, float]
    noise: float
    noise_std: float
    noise_interval: tuple[float, float]
    items: int
    chosen_on: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of items that were answered with one of the two words; intervals are Wilson's of 95 %.

    Attributes:
        answered_items: number of these items.
        unanswered_items: number of other items.
        accuracy: of the control run, over answered items; as published, over all.
        accuracy_interval: its interval.
        layers: ascending.
        swapped: beliefs swapped, by condition and layer.
        swapped_interval: their intervals.
        swapped_by_axis: by axis, condition and layer.
        swapped_by_axis_interval: their intervals.
        verdicts: "correct", "wrong" and "nonsense" answers under the edits, by condition and layer.
        accuracy_drop: how much the IDs lower the accuracy, by layer.
        mean_accuracy_drop: mean of that over the layers.
        best: the best layers.
        selection: keys of the items that the best layers were chosen on, and of those that are reported.
    """

    answered_items: int
    unanswered_items: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    layers: list[int]
    swapped: dict[str, list[float]]
    swapped_interval: dict[str, list[tuple[float, float]]]
    swapped_by_axis: dict[str, dict[str, list[float]]]
    swapped_by_axis_interval: dict[str, dict[str, list[tuple[float, float]]]]
    verdicts: dict[str, list[dict[str, float]]]
    accuracy_drop: list[float]
    mean_accuracy_drop: float
    best: Best
    selection: dict[str, str | list[str]]


def rates(table: Columns, layers: Sequence[int], *, seed: int = 0, as_published: bool = False) -> Rates:
    """Shares of a run's table: swapped beliefs and accuracies by condition and layer, the best layers, verdicts.

    The best layers are chosen on the items of one half of the pictures, drawn by the seed, and reported on the others.
    Shares of the items that layers were chosen on would be too large.

    Args:
        table: a row for each item, condition and layer.
        layers: ascending.
        seed: of the halves.
        as_published: choose and report the best layers on all items; noise is reported on unanswered items too, and
            unanswered items count as wrong in accuracies.

    Raises:
        DataError: if no item was answered with one of the two words.
    """
    axes = {"condition": CONDITIONS, "layer": layers, "item": list(dict.fromkeys(table["item"].tolist()))}
    swapped, verdict = as_array(table, "swapped", axes), as_array(table, "verdict", axes)  # [C, L, B]
    control, axis, pictures = (as_array(table, name, axes)[0, 0] for name in ("control_verdict", "axis", "image_id"))
    used, whole = control != "nonsense", np.ones(len(control), bool)
    count, right = int(used.sum()), int((control == "correct").sum())
    if not count:
        raise DataError("no item was answered with exactly one of the two words; look at control_text in the table.")
    asked = len(used) if as_published else count  # the items that accuracies are of

    def counted(items: np.ndarray) -> list[tuple[str, np.ndarray, int]]:
        """How many of the chosen items are swapped by layer, and how many there are, for each condition."""
        found = []
        for name, own in zip(CONDITIONS, swapped, strict=True):
            chosen = items if as_published and name == "noise" else items & used
            found.append((name, own[:, chosen].sum(axis=-1), int(chosen.sum())))
        return found

    def shares(items: np.ndarray) -> dict[str, list[float]]:
        return {name: (hits / many).tolist() for name, hits, many in counted(items)}

    def intervals(items: np.ndarray) -> dict[str, list[tuple[float, float]]]:
        return {name: [confidence_interval(int(one), many) for one in hits] for name, hits, many in counted(items)}

    verdicts = {
        name: [
            {word: float((own[used] == word).mean()) for word in ("correct", "wrong", "nonsense")} for own in of_layers
        ]
        for name, of_layers in zip(CONDITIONS, verdict, strict=True)
    }
    drops = [(right - count * own["correct"]) / asked for own in verdicts["belief"]]
    by_axis = {name: axis == name for name in dict.fromkeys(axis[used].tolist())}
    choosing, reporting = _halves(pictures, used, seed, as_published)
    best = np.argsort(shares(choosing)["belief"], kind="stable")[::-1][:BEST]
    picked = [np.array(of_layers)[best] for of_layers in shares(reporting).values()]
    (_, _, reported), (_, _, noisy) = counted(reporting)
    chosen_on = "same items" if choosing is reporting else "other items"
    belief, noise = (float(own.mean()) for own in picked)
    at_best = Best(
        layers=[int(layers[row]) for row in best],
        belief=belief,
        belief_std=float(picked[0].std()),
        belief_interval=confidence_interval(round(belief * reported), reported),
        noise=noise,
        noise_std=float(picked[1].std()),
        noise_interval=confidence_interval(round(noise * noisy), noisy),
        items=reported,
        chosen_on=chosen_on,
    )
    keys = np.array(axes["item"])
    return Rates(
        answered_items=count,
        unanswered_items=len(used) - count,
        accuracy=right / asked,
        accuracy_interval=confidence_interval(right, asked),
        layers=list(layers),
        swapped=shares(whole),
        swapped_interval=intervals(whole),
        swapped_by_axis={name: shares(items) for name, items in by_axis.items()},
        swapped_by_axis_interval={name: intervals(items) for name, items in by_axis.items()},
        verdicts=verdicts,
        accuracy_drop=drops,
        mean_accuracy_drop=float(np.mean(drops)),
        best=at_best,
        selection={
            "chosen_on": chosen_on,
            "choosing": keys[choosing & used].tolist(),
            "reporting": keys[reporting & used].tolist(),
        },
    )


def _halves(pictures: np.ndarray, used: np.ndarray, seed: int, same_items: bool) -> tuple[np.ndarray, np.ndarray]:
    """Items that layers are chosen on, and items that are reported; all items for both if either would be empty."""
    if same_items:
        every = np.ones(len(used), bool)
        return every, every
    different = np.unique(pictures[used])
    order = np.random.default_rng((seed, 2)).permutation(len(different))
    choosing = used & np.isin(pictures, different[order[: len(different) // 2]])
    return (used, used) if not choosing.any() else (choosing, used & ~choosing)


def draw_layers(found: Rates, strength: float, about: plots.About) -> Figure:
    """Shares of swapped beliefs by relation and layer."""
    names = {"horizontal": "left/right", "vertical": "above/below"}
    belief, noise = (
        [
            np.array([of_axis[condition] for of_axis in values.values()])
            for values in (found.swapped_by_axis, found.swapped_by_axis_interval)
        ]
        for condition in CONDITIONS
    )
    return plots.belief_swap_by_layer(
        np.array(found.layers),
        belief[0],
        noise[0],
        [names[axis] for axis in found.swapped_by_axis],
        belief_intervals=belief[1],
        noise_intervals=noise[1],
        strength=strength,
        about=about,
    )


def draw_best(best: Mapping[str, Best], strength: float | str) -> Figure:
    """Figure 2 of the best layers of models, with standard deviations only if all were chosen on the same items."""
    values = {
        part: np.array([getattr(one, part) for one in best.values()])
        for part in ("belief", "belief_std", "noise", "noise_std")
    }
    same = [name for name, one in best.items() if one.chosen_on == "same items"]
    intervals, whose = {}, ""
    if len(same) < len(best):
        intervals = {
            f"{part}_interval": np.array([getattr(one, f"{part}_interval") for one in best.values()])
            for part in CONDITIONS
        }
        whose = f" of {', '.join(same)}" if same else ""
    about = plots.About(
        model=", ".join(best) if len(best) == 1 else "",
        items=bounds_of([one.items for one in best.values()]),
        strength=strength,
        note=f"best layers{whose} chosen on {'the same' if same else 'other'} items",
    )
    return plots.belief_swap_bars(list(best), **values, **intervals, about=about)


def bounds_of(values: Sequence[float]) -> str:
    """Numbers from the smallest to the largest, in words."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


# --- several runs ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """Results of a finished run.

    Attributes:
        accuracy: accuracy of the control run.
        accuracy_interval: its interval.
        mean_accuracy_drop: how much the IDs lower it.
        answered_items: number of items that the shares are of.
        strength: strength of the edits.
        best: the best layers.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    mean_accuracy_drop: float
    answered_items: int
    strength: float
    best: Best


@dataclasses.dataclass(frozen=True)
class Compare(Command[dict[str, Compared]]):
    """Compare finished belief-swap runs: Figure 2 over models, and accuracy against steerability (Figure 9).

    Attributes:
        folders: of finished runs.
        out: folder for figures and `comparison.json`; not that of a run.
    """

    name: ClassVar[str] = "compare"

    folders: tuple[Path, ...]
    out: Path = dataclasses.field(kw_only=True)

    def run(self) -> dict[str, Compared]:
        """Reads the runs' summaries and draws them.

        Returns:
            The results by name of the model.

        Raises:
            DataError: for a folder without a belief-swap summary.
            OutputError: if `out` is the folder of a run, or cannot be written to.
        """
        if (self.out / "settings.json").exists():
            raise OutputError(f"{self.out} holds a run, whose figures would be overwritten; choose another --out.")
        io.ensure_output_folder(self.out)
        found: dict[str, Compared] = {}
        for folder in self.folders:
            name, entry = read_run(folder)
            labels = (name, f"{name} ({folder.name})", f"{name} ({folder.resolve()})")
            found[next((label for label in labels if label not in found), name)] = entry
        strength = bounds_of([entry.strength for entry in found.values()])
        figure = draw_best({name: entry.best for name, entry in found.items()}, strength)
        plots.save(figure, self.out / "belief_swap.png")
        figure = plots.accuracy_against_steerability(
            list(found),
            np.array([entry.accuracy for entry in found.values()]),
            np.array([entry.mean_accuracy_drop for entry in found.values()]),
            accuracy_interval=np.array([entry.accuracy_interval for entry in found.values()]),
            about=plots.About(items=bounds_of([entry.answered_items for entry in found.values()]), strength=strength),
        )
        plots.save(figure, self.out / "accuracy_against_steerability.png")
        io.write_json(self.out / "comparison.json", found)
        return found

    def report(self, result: dict[str, Compared]) -> Iterator[str]:
        """A line for each model."""
        for name, entry in result.items():
            yield (
                f"{name:30s} accuracy {entry.accuracy:6.1%}   mean drop {entry.mean_accuracy_drop:6.1%}   "
                f"swapped {entry.best.belief:6.1%} (noise {entry.best.noise:.1%})"
            )


def read_run(folder: Path) -> tuple[str, Compared]:
    """The model and the results of a finished run.

    Raises:
        DataError: if the folder holds no summary of such a run, or the summary holds impossible shares.
    """
    path = folder / "summary.json"
    try:
        with io.reading(path, "its summary", DataError):
            summary = io.read_json(path, DataError)
            best = dict(summary["best"])
            entry = Compared(
                accuracy=float(summary["accuracy"]),
                accuracy_interval=_interval(summary["accuracy_interval"]),
                mean_accuracy_drop=float(summary["mean_accuracy_drop"]),
                answered_items=int(summary["answered_items"]),
                strength=float(summary["settings"]["strength"]),
                best=Best(
                    layers=[int(layer) for layer in best["layers"]],
                    belief=float(best["belief"]),
                    belief_std=float(best["belief_std"]),
                    belief_interval=_interval(best["belief_interval"]),
                    noise=float(best["noise"]),
                    noise_std=float(best["noise_std"]),
                    noise_interval=_interval(best["noise_interval"]),
                    items=int(best["items"]),
                    chosen_on=str(best["chosen_on"]),
                ),
            )
            one = entry.best
            bounds = [*entry.accuracy_interval, *one.belief_interval, *one.noise_interval]
            shares = [
                entry.accuracy,
                abs(entry.mean_accuracy_drop),
                one.belief,
                one.belief_std,
                one.noise,
                one.noise_std,
            ]
            numbers = np.array([*shares, *bounds])
            if not ((numbers >= 0) & (numbers <= 1)).all() or min(entry.answered_items, one.items) < 1:
                raise ValueError("a share is not between 0 and 1, or is of no items")
            return str(summary["model"]), entry
    except JaxidError as error:
        raise DataError(f"{folder} holds no summary of a finished jaxid run belief-swap: {error}") from error


def _interval(bounds: Any) -> tuple[float, float]:
    low, high = map(float, bounds)
    if low > high:
        raise ValueError("the bounds of an interval are reversed")
    return low, high
