"""What stands below the figures: model, items, strength, what bands are, and how many values are skipped."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from PIL import Image
from test_plots import BELIEF, COLUMNS, INTERVALS, LAYERS, PLANE_ARGUMENTS, RATES, SCENES, VARIANCE
from test_plots_published import BARS, DEPTH, MAPS, PICTURE, SCATTER, SINGLE

from jaxid import plots
from jaxid.errors import InputError

RNG = np.random.default_rng(0)
ABOUT = plots.About(model="some-model", items=123, strength=2.5, note="layers chosen on other items")
CHANGES = RNG.normal(size=(7, 9, 2))
SCORES = {name: RNG.normal(0.5, 0.2, size=(6, 9, 2)) for name in ("image", "text", "words")}
MARGINS: dict[str, Any] = {"margins": RNG.normal(size=60), "correct": np.arange(60) % 3 > 0}
SENSITIVITY: dict[str, Any] = {
    "sensitivity": RNG.normal(size=60),
    "subject_drop": RNG.random(60),
    "elsewhere_drop": RNG.random(60) / 5,
    "correct": np.arange(60) % 3 > 0,
    "margins": RNG.normal(size=60),
}
STEPS = np.arange(6.0)
LOSSES = {name: np.stack([STEPS, RNG.random(6)], axis=1) for name in ("answer_loss", "id_loss")}
SHARES = {"held out (n = 40)": np.stack([STEPS[:2], [0.5, 0.7]], axis=1)}
RUNS = {"held out": {"with_ids": RNG.random((3, 4)), "without_ids": RNG.random((3, 4))}}
BOUNDS = np.stack([np.full(12, 0.1), np.full(12, 0.9)], axis=1)
OCCLUDED: dict[str, Any] = {
    "pictures": [PICTURE] * 4,
    "subject": np.array([2, 2, 20, 20]),
    "object": np.array([40, 20, 60, 50]),
    "elsewhere": np.array([[30, 2, 40, 12], [60, 30, 70, 50]]),
    "right": np.array([-0.1, -2.0, -0.1, -0.2]),
    "names": ("cup", "fish"),
}
LINE: dict[str, Any] = {
    "coordinates": np.sort(RNG.random((6, 7)), axis=1),
    "frames": np.arange(7),
    "words": {"before": RNG.random(6), "after": RNG.random(6)},
    "order": RATES[0],
    "best": 3,
    "title": "some-model",
}
STEERED = {"layers": LAYERS, "change_first": COLUMNS, "change_second": -COLUMNS}
HALVES: dict[str, Any] = {"layers": LAYERS, "auc": RATES[0], "easy": RATES[1], "hard": RATES[0]}

# Function, its arguments, and what its line says besides what the caller knows.
FIGURES: list[tuple[Callable[..., Figure], dict[str, Any], list[str]]] = [
    (plots.scenes_with_answers, SCENES, ["2 of these 5 answered correctly"]),
    (plots.id_plane, PLANE_ARGUMENTS, ["colours: columns"]),
    (plots.variance_by_layer, VARIANCE, []),
    (plots.belief_swap_by_layer, BELIEF, ["bands: 95 % Wilson intervals", "chance, 50 %"]),
    (plots.belief_swap_bars, BARS, ["whiskers: one standard deviation", "chance, 50 %"]),
    (
        plots.belief_swap_bars,
        BARS | {"belief_interval": BOUNDS, "noise_interval": BOUNDS},
        ["whiskers: 95 % Wilson intervals"],
    ),
    (plots.accuracy_against_steerability, SCATTER | {"accuracy_interval": BOUNDS}, ["whiskers: 95 % Wilson", "50 %"]),
    (plots.swap_scores, {"scores": SCORES, "words": ("left", "right")}, ["n = 9", "lines: means, bands: one standard"]),
    (
        plots.swap_scores,
        {"scores": SCORES, "words": ("left", "right"), "robust": True},
        ["n = 9", "lines: medians, bands: quartiles"],
    ),
    (plots.steering_by_column, STEERED, ["means over items"]),
    (plots.steering_map, {"change": MAPS["change"], "words": ("left", "right"), "layer": 3}, ["means over items"]),
    (plots.steering_maps, MAPS, []),
    (plots.steering_by_layer, SINGLE, []),
    (plots.depth_by_row, DEPTH, ["means over items"]),
    (plots.temporal_line, LINE, ["circles: frames"]),
    (
        plots.temporal_steering,
        {"frames": np.arange(7), "changes": CHANGES, "words": ("before", "after")},
        ["n = 9", "bands: one standard deviation"],
    ),
    (plots.margin_histogram, MARGINS, ["n = 60", "medians"]),
    (
        plots.margins_by_layer,
        HALVES | {"easy_intervals": INTERVALS[1], "layer": 2},
        ["bands: 95 % Wilson", "chance, 50 %"],
    ),
    (plots.occlusion_example, OCCLUDED, ["log p"]),
    (plots.sensitivities, SENSITIVITY, ["n = 60", "medians"]),
    (
        plots.finetune_curves,
        {
            "losses": LOSSES,
            "accuracies": SHARES,
            "intervals": {"held out (n = 40)": np.array([[0.3, 0.6], [0.5, 0.8]])},
        },
        ["bands: 95 % Wilson", "chance, 50 %"],
    ),
    (plots.finetune_comparison, {"steps": np.arange(4), "sets": RUNS}, ["Student's 95 % interval", "chance, 50 %"]),
    (plots.finetune_geometry, {"steps": np.arange(4), "measures": RUNS}, ["Student's 95 % interval"]),
]


def caption(figure: Figure) -> str:
    """The line below a figure, its breaks undone."""
    return " ".join(figure.get_supxlabel().split())


@pytest.mark.parametrize(("make", "arguments", "said"), FIGURES, ids=lambda value: getattr(value, "__name__", ""))
def test_line_below_says_what_was_measured_and_fits(
    make: Callable[..., Figure], arguments: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    figure = make(**arguments, about=ABOUT)
    text = caption(figure)
    counted = any(part.startswith("n = ") for part in said)
    for part in ("some-model", "2.5", "layers chosen on other items", *said, *([] if counted else ["n = 123"])):
        assert part in text
    # The line overlaps no panel, with what is written around it.
    (line,) = [one for one in figure.texts if one.get_text() == figure.get_supxlabel()]
    box = line.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    for axes in figure.axes:
        around = axes.get_tightbbox()
        assert around is None or around.y0 >= box.y1 - 1
    plots.save(figure, tmp_path / "figure.png")
    picture = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (edges == 255).all()


def test_without_anything_to_say_there_is_no_line() -> None:
    assert caption(plots.variance_by_layer(**VARIANCE)) == ""


def test_a_long_name_is_broken_not_cut() -> None:
    name = "/data/checkpoints/" + "a-very-long-folder-name/" * 6
    figure = plots.steering_map(MAPS["change"], ("left", "right"), 3, about=plots.About(model=name))
    assert figure.get_supxlabel().replace("\n", "").startswith(name)
    (line,) = [one for one in figure.texts if one.get_text() == figure.get_supxlabel()]
    assert line.get_window_extent().x1 <= figure.bbox.x1


# --- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("robust", [False, True])
def test_items_without_a_finite_score_are_skipped_and_counted(robust: bool) -> None:
    """Without such items the curves are the same."""
    spoilt = {name: values.copy() for name, values in SCORES.items()}
    spoilt["image"][2, 4, 1] = np.nan
    spoilt["words"][0, 7, 0] = np.inf
    spoilt["text"][1, 2, 1] = -np.inf
    kept = {name: np.delete(values, [2, 4, 7], axis=1) for name, values in SCORES.items()}
    figure = plots.swap_scores(spoilt, ("left", "right"), robust=robust)
    expected = plots.swap_scores(kept, ("left", "right"), robust=robust)
    for axes, other in zip(figure.axes, expected.axes, strict=True):
        for line, right in zip(axes.get_lines(), other.get_lines(), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), right.get_xydata())
        for band, right in zip(axes.collections, other.collections, strict=True):
            np.testing.assert_array_equal(band.get_paths()[0].vertices, right.get_paths()[0].vertices)
    assert "3 of 9 items not finite, skipped" in caption(figure)
    assert "n = 6" in caption(figure)


def spoilt(values: np.ndarray, *places: Any) -> np.ndarray:
    copy = np.array(values, float)
    for place in places:
        copy[place] = np.nan
    return copy


GAPS: list[tuple[Callable[..., Figure], dict[str, Any], str]] = [
    (plots.variance_by_layer, VARIANCE | {"agreement": spoilt(VARIANCE["agreement"], -1)}, "1 of 24 values"),
    (plots.belief_swap_by_layer, BELIEF | {"belief": spoilt(RATES, (0, 2))}, "1 of 30 values"),
    (plots.steering_by_column, STEERED | {"change_first": spoilt(COLUMNS, 1)}, "4 of 48 values"),
    (
        plots.steering_map,
        {"change": spoilt(MAPS["change"], (1, 2, 0)), "words": ("left", "right"), "layer": 3},
        "1 of 16 values",
    ),
    (plots.steering_maps, MAPS | {"change": spoilt(MAPS["change"], (1, 2))}, "2 of 32 values"),
    (plots.steering_by_layer, SINGLE | {"change": spoilt(SINGLE["change"], (-1, 0))}, "1 of 30 values"),
    (plots.depth_by_row, DEPTH | {"depth": spoilt(DEPTH["depth"], (0, 0, 0))}, "1 of 48 values"),
    (plots.temporal_line, LINE | {"order": spoilt(LINE["order"], 0)}, "1 of 6 values"),
    (
        plots.temporal_steering,
        {"frames": np.arange(7), "changes": spoilt(CHANGES, (3, 4, 0)), "words": ("before", "after")},
        "1 of 9 items",
    ),
    (plots.margin_histogram, MARGINS | {"margins": spoilt(MARGINS["margins"], 5, 6)}, "2 of 60 items"),
    (plots.margins_by_layer, HALVES | {"auc": spoilt(HALVES["auc"], 0)}, "1 of 18 values"),
    (
        plots.sensitivities,
        SENSITIVITY | {"subject_drop": spoilt(SENSITIVITY["subject_drop"], 5)},
        "1 of 60 items not finite",
    ),
    (
        plots.sensitivities,
        SENSITIVITY | {"margins": spoilt(SENSITIVITY["margins"], 5, 6, 7)},
        "3 of 60 items without a margin",
    ),
    (
        plots.finetune_curves,
        {"losses": LOSSES | {"id_loss": spoilt(LOSSES["id_loss"], (2, 1))}, "accuracies": SHARES},
        "losses: 1 of 12 values",
    ),
]


@pytest.mark.parametrize(("make", "arguments", "said"), GAPS, ids=lambda value: getattr(value, "__name__", ""))
def test_gaps_are_counted(make: Callable[..., Figure], arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    figure = make(**arguments)
    assert said in caption(figure)
    plots.save(figure, tmp_path / "figure.png")
    for axes in figure.axes:
        assert np.isfinite([axes.get_xlim(), axes.get_ylim()]).all()


def test_a_cell_without_a_value_is_named_and_not_coloured_as_zero() -> None:
    axes = plots.steering_map(spoilt(MAPS["change"], (1, 2, 0)), ("left", "right"), 3).axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts}[1, 2] == "none"
    (image,) = axes.get_images()
    drawn = image.to_rgba(np.ma.asarray(image.get_array()))
    assert tuple(drawn[2, 1]) != tuple(image.to_rgba(np.zeros((1, 1)))[0, 0])


@pytest.mark.parametrize(
    ("make", "arguments", "wrong"),
    [
        (
            plots.swap_scores,
            {"scores": SCORES, "words": ("left", "right")},
            {"scores": {"image": np.full((3, 4, 2), np.nan)}},
        ),
        (plots.variance_by_layer, VARIANCE, {"row_share": np.full(6, np.nan)}),
        (plots.id_plane, PLANE_ARGUMENTS, {"coordinates": spoilt(PLANE_ARGUMENTS["coordinates"], (0, 0))}),
        (plots.id_plane, PLANE_ARGUMENTS, {"words": {"left": np.array([np.inf, 0])}}),
        (plots.belief_swap_bars, BARS, {"noise": spoilt(BARS["noise"], 0)}),
        (plots.accuracy_against_steerability, SCATTER, {"drop": spoilt(SCATTER["drop"], 0)}),
        (plots.steering_maps, MAPS, {"change": np.full((4, 4, 2), -np.inf)}),
        (plots.steering_by_layer, SINGLE, {"change": spoilt(SINGLE["change"], (slice(None), 1))}),
        (plots.temporal_line, LINE, {"coordinates": spoilt(LINE["coordinates"], (3, 0))}),
        (plots.margin_histogram, MARGINS, {"margins": np.full(60, np.nan)}),
        (plots.finetune_curves, {"losses": LOSSES, "accuracies": SHARES}, {"losses": {}}),
        (plots.finetune_comparison, {"steps": np.arange(4)}, {"sets": {"a": {"with_ids": np.full((1, 4), np.nan)}}}),
        (plots.finetune_comparison, {"steps": np.arange(3)}, {"sets": RUNS}),
        (plots.finetune_comparison, {"steps": np.arange(4), "sets": RUNS}, {"differences": {"a": {"b": np.ones(4)}}}),
        (plots.finetune_geometry, {"steps": np.arange(4)}, {"measures": {}}),
        (plots.finetune_geometry, {"steps": np.arange(4)}, {"measures": {"a": {"with_ids": np.full((1, 4), np.inf)}}}),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    make: Callable[..., Figure], arguments: dict[str, Any], wrong: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"finite|needs"):
        inspect.unwrap(make)(**(arguments | wrong))


# --- curves that mislead --------------------------------------------------------------------------------------------


def test_a_few_outliers_do_not_move_the_robust_curve() -> None:
    scores = np.ones((4, 40, 2))
    scores[2, :3] = -60.0
    for robust, low in ((True, 1.0), (False, 1 - 61 * 3 / 40)):
        figure = plots.swap_scores({"text": scores}, ("left", "right"), robust=robust)
        for axes in figure.axes:
            (line,) = (line for line in axes.get_lines() if line.get_marker() == "o")
            assert np.min(np.asarray(line.get_ydata())) == pytest.approx(low)
        assert ("which leave the panel" in caption(figure)) == (not robust)


@pytest.mark.parametrize("count", [1, 2, 200])
def test_losses_of_short_runs_are_visible(count: int) -> None:
    rows = np.stack([np.arange(count) + 1.0, np.full(count, 0.7)], axis=1)
    figure = plots.finetune_curves({"answer_loss": rows}, {"held out": rows[:1]})
    with_line = drawn(figure)
    figure.axes[0].get_lines()[0].set_visible(False)
    assert (with_line != drawn(figure)).any(axis=-1).sum() > 10


def drawn(figure: Figure) -> np.ndarray:
    """The figure's pixels."""
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]


def test_chance_is_marked_where_answers_have_it() -> None:
    sets = {"held out": {kind: np.full((1, 4), 0.8) for kind in ("with_ids", "without_ids")}}
    for figure, panels in (
        (plots.belief_swap_by_layer(**BELIEF), (0, 1, 2, 3)),
        (plots.belief_swap_bars(**BARS), (0,)),
        (plots.margins_by_layer(**HALVES), (0, 1)),
        (plots.finetune_curves(LOSSES, SHARES), (1,)),
        (plots.finetune_comparison(np.arange(4), sets), (0,)),
    ):
        for panel in panels:
            axes = figure.axes[panel]
            (line,) = (patch for patch in axes.patches if isinstance(patch, Polygon))
            assert set(np.asarray(line.get_xy())[:, 1]) == {0.5}
            assert axes.get_ylim()[0] < 0.5 < axes.get_ylim()[1]


def test_bars_end_in_the_intervals_given() -> None:
    belief, noise = (
        np.stack([BARS[name] * 0.8, BARS[name] + (1 - BARS[name]) / 4], axis=1) for name in ("belief", "noise")
    )
    (axes,) = plots.belief_swap_bars(**BARS, belief_interval=belief, noise_interval=noise).axes
    whiskers = np.concatenate([lines.get_segments() for lines in axes.collections if isinstance(lines, LineCollection)])
    np.testing.assert_allclose(whiskers[:, :, 1], np.concatenate([belief, noise]), atol=1e-12)
