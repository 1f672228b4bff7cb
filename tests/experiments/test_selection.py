"""What runs report: best layers are chosen on other pictures, and swaps are summed up by what their figure draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxid import io, plots
from jaxid.errors import DataError
from jaxid.experiments import activation_swap, compare

LAYERS = list(range(16))


def table(items: int, *, rate: float = 0.3, pictures: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """A belief-swap table in which every layer swaps at the same rate: differences between layers are chance."""
    rng = np.random.default_rng(seed)
    rows = [(i, c, k) for i in range(items) for c in ("belief", "noise") for k in LAYERS]
    item, condition, layer = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "item": np.array([f"item{number}" for number in item]),
        "image_id": item % (pictures or items),
        "axis": np.where(item % 2 == 0, "horizontal", "vertical"),
        "condition": condition,
        "layer": layer,
        "swapped": rng.random(len(rows)) < rate,
        "control_verdict": np.full(len(rows), "correct"),
        "verdict": np.full(len(rows), "wrong"),
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """By the formula."""
    z = 1.959963984540054
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def shares(found: dict[str, np.ndarray], items: set[str], condition: str) -> np.ndarray:
    here = np.isin(found["item"], list(items)) & (found["condition"] == condition)
    return np.array([found["swapped"][here & (found["layer"] == k)].mean() for k in LAYERS])


def test_best_layers_are_chosen_on_other_pictures() -> None:
    found = table(40, pictures=20)  # two items a picture
    summary = compare.rates(found, LAYERS, seed=3)
    choosing, reporting = (set(summary.selection[name]) for name in ("choosing", "reporting"))
    assert len(choosing) == len(reporting) == 20 and not choosing & reporting
    images = dict(zip(found["item"].tolist(), found["image_id"].tolist(), strict=True))
    assert not {images[item] for item in choosing} & {images[item] for item in reporting}
    best = summary.best
    on_others = shares(found, choosing, "belief")
    assert min(on_others[best.layers]) >= np.sort(on_others)[-3]
    for condition in ("belief", "noise"):
        values = shares(found, reporting, condition)[best.layers]
        assert getattr(best, condition) == pytest.approx(values.mean())
        assert getattr(best, f"{condition}_std") == pytest.approx(values.std())
        expected = wilson(round(values.mean() * 20) / 20, 20)
        assert getattr(best, f"{condition}_interval") == pytest.approx(expected, abs=1e-9)
    assert (best.items, best.chosen_on) == (20, "other items")


def test_halves_do_not_depend_on_the_order_of_rows_but_on_the_seed() -> None:
    found = table(30)
    order = np.random.default_rng(1).permutation(len(found["item"]))
    shuffled = {name: values[order] for name, values in found.items()}
    one, other = (compare.rates(rows, LAYERS, seed=0) for rows in (found, shuffled))
    assert set(one.selection["choosing"]) == set(other.selection["choosing"])
    assert one.best == other.best
    assert set(compare.rates(found, LAYERS, seed=1).selection["choosing"]) != set(one.selection["choosing"])


def test_without_differences_between_layers_the_best_are_no_better_than_the_rate() -> None:
    """The published way (best layers on the same items) is too large where all layers are alike; this is not."""
    honest, published = [], []
    for seed in range(12):
        found = table(40, rate=0.3, seed=seed)
        honest.append(compare.rates(found, LAYERS, seed=seed).best.belief)
        published.append(compare.rates(found, LAYERS, seed=seed, as_published=True).best.belief)
    assert np.mean(honest) == pytest.approx(0.3, abs=0.04)
    assert np.mean(published) > 0.36


def test_the_published_way_uses_all_items_and_says_so() -> None:
    found = table(12)
    summary = compare.rates(found, LAYERS, as_published=True)
    values = shares(found, set(found["item"]), "belief")
    assert summary.best.belief == pytest.approx(np.sort(values)[-3:].mean())
    assert (summary.best.items, summary.selection["chosen_on"]) == (12, "same items")
    assert set(summary.selection["choosing"]) == set(summary.selection["reporting"]) == set(found["item"])


def test_a_single_picture_has_no_others() -> None:
    best = compare.rates(table(4, pictures=1), LAYERS).best
    assert (best.items, best.chosen_on) == (4, "same items")


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines below the figures that are saved."""
    lines: list[str] = []

    def note(figure: Any, path: Path) -> None:
        lines.append(" ".join(figure.get_supxlabel().split()))

    monkeypatch.setattr(plots, "save", note)
    return lines


def test_comparison_says_whose_layers_were_chosen_on_the_same_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = drawn(monkeypatch)
    folders = []
    for name, same in (("new", False), ("published", True), ("third", True)):
        summary = vars(compare.rates(table(40), LAYERS, as_published=same))
        (tmp_path / name).mkdir()
        io.write_json(tmp_path / name / "summary.json", summary | {"model": name, "settings": {"strength": 5.0}})
        folders.append(tmp_path / name)
    compare.Compare(tuple(folders), out=tmp_path / "all").run()
    assert "best layers of published, third chosen on the same items" in lines[0]
    assert "n = 20 to 40 items; strength 5; " in lines[0] and "95 % Wilson" in lines[0]
    assert "n = 40 items" in lines[1]
    compare.Compare(tuple(folders[1:]), out=tmp_path / "same").run()
    assert "; best layers chosen on the same items" in lines[2] and "one standard deviation" in lines[2]
    compare.Compare(tuple(folders[:1]), out=tmp_path / "one").run()
    assert lines[4].startswith("new; n = 20 items; ") and "chosen on other items" in lines[4]


def scores() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_cauchy(size=(3, 21, 2)) for name in activation_swap.TOKEN_SETS}


def test_summary_and_figure_of_a_swap_are_the_same_numbers() -> None:
    found = scores()
    found["text"][1, 5, 0] = np.nan
    summary = activation_swap.statistics(found)
    assert summary.score_items == 20
    kept = {name: np.delete(values, 5, axis=1) for name, values in found.items()}
    for robust, centre in ((True, "median"), (False, "mean")):
        figure = plots.swap_scores(found, ("left", "right"), robust=robust)
        for word, axes in enumerate(figure.axes):
            curves = [np.asarray(line.get_ydata()) for line in axes.get_lines() if line.get_marker() == "o"]
            for curve, (name, values) in zip(curves, kept.items(), strict=True):
                np.testing.assert_allclose(curve, getattr(np, centre)(values[..., word], axis=1))
                np.testing.assert_allclose(curve, getattr(summary, f"score_{centre}")[name][:, word])
    for name, values in kept.items():
        np.testing.assert_allclose(summary.score_std[name], values.std(axis=1, ddof=1))
        quartiles = np.quantile(values, [0.25, 0.75], axis=1)
        np.testing.assert_allclose(summary.score_quartiles[name], np.moveaxis(quartiles, 0, -1))


def test_answers_that_do_not_change_have_no_score() -> None:
    control = np.array([[-1.0, -2.0], [-1.0, -2.0]])
    swap = activation_swap.Patched(
        control=control,
        intervened=np.array([[-3.0, -1.0], [-1.0, -4.0]]),  # the second item's first answer stays
        patched=np.broadcast_to(control - 0.5, (3, 4, 2, 2)),
        layers=np.arange(4),
    )
    for values in swap.scores.values():
        np.testing.assert_allclose(values[:, 0], np.broadcast_to([0.25, -0.5], (4, 2)))
        assert np.isnan(values[:, 1, 0]).all() and np.isfinite(values[:, 1, 1]).all()
    assert activation_swap.statistics(swap.scores).score_items == 1


def test_without_any_score_there_is_nothing_to_report() -> None:
    with pytest.raises(DataError, match="no swap score of the 21 items"):
        activation_swap.statistics({"image": np.full((3, 21, 2), np.nan)})
