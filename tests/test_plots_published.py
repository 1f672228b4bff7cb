"""The published figures that compare models, map steering and show depth: they hold what they were given, legibly."""

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from jaxid import plots
from jaxid.errors import InputError
from jaxid.plots import style

RNG = np.random.default_rng(0)
NAMES = [f"model-{letter}{number}b" for letter in "abc" for number in (1, 3, 8, 14)]
BELIEF = np.linspace(0.4, 1.0, 12)
NOISE = np.linspace(0.0, 0.3, 12)
STD = np.full(12, 0.05)
CHANGE = RNG.normal(size=(4, 4, 2))
LAYERS = np.arange(5, 20)
CURVES = np.stack([np.sin(LAYERS / 4), -np.sin(LAYERS / 4)], axis=-1)
HEIGHT = RNG.normal(size=(3, 4, 2))
PICTURE = RNG.integers(0, 256, size=(60, 80, 3), dtype=np.uint8)
LONG = "QUESTION: Is the small red cup to the left or right of the dining table? Answer Left or Right. ANSWER: " * 2

BARS: dict[str, Any] = {"names": NAMES, "belief": BELIEF, "belief_std": STD, "noise": NOISE, "noise_std": STD}
SCATTER: dict[str, Any] = {"names": NAMES, "accuracy": np.linspace(0.7, 0.95, 12), "drop": RNG.uniform(0, 0.5, 12)}
MAPS: dict[str, Any] = {"change": CHANGE, "words": ("Yes", "No"), "title": "Is the star in between?"}
SINGLE: dict[str, Any] = {"layers": LAYERS, "change": CURVES, "words": ("left", "right"), "title": LONG}
DEPTH: dict[str, Any] = {
    "layers": np.array([12, 13, 14]),
    "height": HEIGHT,
    "depth": -HEIGHT,
    "height_words": ("above", "below"),
    "depth_words": ("front", "behind"),
}
SWAPS: dict[str, Any] = {"scores": {"image": RNG.normal(size=(3, 7, 2))}, "words": ("left", "right")}


def one_model(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: values[:1] for name, values in arguments.items()}


def texts(figure: Figure) -> list[str]:
    return [artist.get_text() for artist in figure.findobj(Text) if isinstance(artist, Text)]


def curves(axes: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_xydata()) for line in axes.get_lines() if line.get_marker() == "o"]


FIGURES: list[tuple[Callable[..., Figure], dict[str, Any], int, list[str]]] = [
    (plots.belief_swap_bars, BARS, 1, ["IDs", "noise of the same norm", "model-a1b", "100%"]),
    (plots.belief_swap_bars, one_model(BARS), 1, ["model-a1b", "40"]),
    (plots.accuracy_against_steerability, SCATTER, 1, NAMES),
    (plots.accuracy_against_steerability, one_model(SCATTER), 1, ["model-a1b"]),
    (plots.steering_maps, MAPS, 3, ["“Yes”", "“No”", "row", "column", "change of log p", MAPS["title"]]),
    (plots.steering_maps, MAPS | {"title": LONG, "marks": {"dining table": (3, 1)}}, 3, ["dining table"]),
    (plots.steering_maps, {"change": CHANGE, "words": ("Near", "Far")}, 3, ["“Near”"]),
    (plots.steering_by_layer, SINGLE, 1, ["left", "right", "layer steered"]),
    (plots.steering_by_layer, SINGLE | {"picture": PICTURE}, 2, ["left", "right", "change of log p"]),
    (plots.steering_by_layer, SINGLE | {"picture": PICTURE[:, :20], "title": "$x"}, 2, ["$x"]),
    (plots.depth_by_row, DEPTH, 2, ["height: “above” over “below”", "depth: “front” over “behind”", "layer 13"]),
    (plots.swap_scores, SWAPS | {"layers": np.array([0, 8, 31])}, 2, ["image tokens"]),
]


@pytest.mark.parametrize(
    ("make", "arguments", "count", "labels"), FIGURES, ids=lambda value: getattr(value, "__name__", "")
)
def test_figure_has_its_axes_and_labels_and_nothing_is_cut_off(
    make: Callable[..., Figure], arguments: dict[str, Any], count: int, labels: list[str], tmp_path: Path
) -> None:
    settings = dict(matplotlib.rcParams)
    figure = make(**arguments)
    assert len(figure.axes) == count
    assert set(labels) <= set(texts(figure))
    plots.save(figure, tmp_path / "figure.png")
    assert dict(matplotlib.rcParams) == settings
    picture = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (edges == 255).all()
    # Long titles are broken, not lost.
    if arguments.get("title") == LONG:
        assert any(" ".join(text.split()) == LONG.strip() for text in texts(figure))


def test_bars_stand_as_high_as_the_shares_with_whiskers_inside_them() -> None:
    (axes,) = plots.belief_swap_bars(**BARS).axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    np.testing.assert_allclose([bar.get_height() for bar in bars], [*BELIEF, *NOISE])
    assert {to_hex(bar.get_facecolor()) for bar in bars[:12]} == {style.BLUE}
    middles = np.array([bar.get_x() + bar.get_width() / 2 for bar in bars]).reshape(2, 12)
    assert (np.round(middles) == np.arange(12)).all()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == NAMES
    whiskers = np.concatenate([lines.get_segments() for lines in axes.collections if isinstance(lines, LineCollection)])
    np.testing.assert_allclose(whiskers[:, 1, 1], np.minimum([*(BELIEF + STD), *(NOISE + STD)], 1))
    np.testing.assert_allclose(whiskers[:, 0, 1], np.maximum([*(BELIEF - STD), *(NOISE - STD)], 0), atol=1e-12)


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    (axes,) = figure.axes
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]


@pytest.mark.parametrize("spread", [0.2, 0.02, 0.002, 0.0])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_names_stay_apart_and_in_the_panel(spread: float, count: int) -> None:
    rng = np.random.default_rng(count)
    accuracy, drop = 0.8 + spread * rng.uniform(-1, 1, (2, count))
    # One model far from all others leaves little room for the rest.
    accuracy[0], drop[0] = 0.5, 0.1
    figure = plots.accuracy_against_steerability(NAMES[:count], accuracy, drop)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == NAMES[:count]
    assert overlapping(figure) == []
    panel = axes.get_window_extent()
    for text in axes.texts:
        box = text.get_window_extent()
        assert panel.x0 - 1 <= box.x0 and box.x1 <= panel.x1 + 1 and panel.y0 - 1 <= box.y0 and box.y1 <= panel.y1 + 1
    np.testing.assert_allclose(curves(axes)[0], np.stack([accuracy, drop], axis=-1))


@pytest.mark.parametrize(("accuracy", "drop"), [(0.99, 0.45), (0.99, -0.02), (0.0, 0.0), (1.0, 1.0)])
def test_a_lone_model_lies_within_its_panel(accuracy: float, drop: float) -> None:
    figure = plots.accuracy_against_steerability(["tiny"], np.array([accuracy]), np.array([drop]))
    (axes,) = figure.axes
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert left < accuracy < right
    assert low <= drop <= high
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert ticks and min(ticks) >= 0 and max(ticks) <= 1


def test_maps_are_drawn_as_the_picture_lies_with_one_range_of_colours() -> None:
    figure = plots.steering_maps(**MAPS, marks={"fish": (0, 1), "cup": (3, 1)})
    limit = abs(CHANGE).max()
    for word, axes in enumerate(figure.axes[:2]):
        (image,) = axes.get_images()
        np.testing.assert_allclose(np.asarray(image.get_array()), CHANGE[..., word].T)
        assert image.get_clim() == pytest.approx((-limit, limit))
        written = {text.get_position(): text.get_text() for text in axes.texts}
        for x, y in itertools.product(range(4), range(4)):
            assert written[x, y] == f"{CHANGE[x, y, word]:+.2f}"
        frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        cells = [(frame.get_x() + frame.get_width() / 2, frame.get_y() + frame.get_height() / 2) for frame in frames]
        np.testing.assert_allclose(cells, [(0, 1), (3, 1)])


def test_maps_of_no_change_are_drawn() -> None:
    assert "+0.00" in texts(plots.steering_maps(np.zeros((4, 4, 2)), ("left", "right")))


def test_single_picture_stands_beside_its_curves() -> None:
    shown, axes = plots.steering_by_layer(**SINGLE, picture=PICTURE).axes
    (image,) = shown.get_images()
    np.testing.assert_array_equal(np.asarray(image.get_array()), PICTURE)
    for word, curve in enumerate(curves(axes)):
        np.testing.assert_allclose(curve, np.stack([LAYERS, CURVES[:, word]], axis=-1))
    ends = {text.get_text(): to_hex(str(text.get_color())) for text in axes.texts}
    assert ends == {"left": style.BLUE, "right": style.VERMILLION}


@pytest.mark.parametrize("count", [1, 3, 40])
def test_depth_panels_hold_log_ratios_and_name_few_layers(count: int) -> None:
    layers, height = np.arange(count) + 3, RNG.normal(size=(count, 4, 2))
    figure = plots.depth_by_row(layers, height, 2 * height, ("above", "below"), ("front", "behind"))
    first, second = figure.axes
    np.testing.assert_allclose([curve[:, 1] for curve in curves(first)], height[..., 0] - height[..., 1])
    np.testing.assert_allclose([curve[:, 1] for curve in curves(second)], 2 * (height[..., 0] - height[..., 1]))
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named[0] == "layer 3" and len(named) <= 6
    for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True):
        number = int(text.get_text().removeprefix("layer ")) - 3
        assert to_hex(line.get_color()) == to_hex(style.gradient(count)[number])


def test_swap_scores_stand_at_the_layers_that_were_swapped() -> None:
    layers = np.array([0, 8, 31])
    scores = SWAPS["scores"]["image"]
    for robust, middle in ((False, np.mean), (True, np.median)):
        for word, axes in enumerate(plots.swap_scores(**SWAPS, layers=layers, robust=robust).axes):
            (curve,) = curves(axes)
            np.testing.assert_allclose(curve, np.stack([layers, middle(scores[..., word], axis=1)], axis=-1))


@pytest.mark.parametrize(
    ("make", "arguments", "wrong", "message"),
    [
        (plots.belief_swap_bars, BARS, {"noise_std": STD[:3]}, r"noise_std is \[3\].* M = 12"),
        (plots.belief_swap_bars, BARS, {"names": []}, "nothing empty"),
        (plots.accuracy_against_steerability, SCATTER, {"drop": np.zeros((12, 2))}, r"drop is \[12, 2\]"),
        (plots.accuracy_against_steerability, SCATTER, {"names": NAMES[:2]}, "accuracy is"),
        (plots.steering_maps, MAPS, {"change": CHANGE[:3]}, r"change is \[3, 4, 2\]"),
        (plots.steering_maps, MAPS, {"words": ("Yes",)}, "words"),
        (plots.steering_maps, MAPS, {"marks": {"cup": (4, 0)}}, r"'cup' is marked at \(4, 0\)"),
        (plots.steering_by_layer, SINGLE, {"change": CURVES[1:]}, r"change is \[14, 2\].* L = 15"),
        (plots.steering_by_layer, SINGLE, {"words": ("left", "right", "up")}, "words"),
        (plots.depth_by_row, DEPTH, {"depth": HEIGHT[:2]}, "depth is"),
        (plots.depth_by_row, DEPTH, {"height": HEIGHT[:, :3]}, "height is"),
        (plots.depth_by_row, DEPTH, {"depth_words": ()}, "depth_words"),
        (plots.swap_scores, SWAPS, {"layers": LAYERS}, "layers"),
    ],
)
def test_what_does_not_fit_is_refused(
    make: Callable[..., Figure], arguments: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    # Unwrapped: the tests' run-time shape checks would come first.
    with pytest.raises(InputError, match=message):
        inspect.unwrap(make)(**(arguments | wrong))
