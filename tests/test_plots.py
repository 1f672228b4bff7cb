"""`jaxid.plots`: every figure shows what it was given, leaves no setting changed, and refuses what does not fit."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from jaxid import plots
from jaxid.errors import InputError, OutputError
from jaxid.plots import style

LAYERS = np.arange(6)
RNG = np.random.default_rng(0)
PLANE = np.stack(np.meshgrid(np.arange(4) - 1.5, np.arange(4) - 1.5, indexing="ij"), axis=-1)
RATES = np.linspace(0.1, 0.9, 12).reshape(2, 6)
INTERVALS = np.stack([RATES - 0.05, RATES + 0.05], axis=-1)
STRENGTHS = np.array([0.5, 1.0, 5.0])
COLUMNS = np.outer(np.arange(1, 7), [1.5, 0.5, -0.5, -1.5])
CHANGE = RNG.normal(size=(4, 4, 2))
SCORES = {name: RNG.normal(0.5, 0.2, size=(6, 9, 2)) for name in ("image", "text", "words")}
WORDS = ("left", "right")

BELIEF: dict[str, Any] = {
    "layers": LAYERS,
    "belief": RATES,
    "noise": RATES / 5,
    "relation_names": ["left/right", "above/below"],
    "belief_intervals": INTERVALS,
    "noise_intervals": INTERVALS / 5,
    "strength": 1.0,
    "strengths": STRENGTHS,
    "belief_by_strength": np.array([0.2, 0.9, 0.6]),
    "noise_by_strength": np.array([0.0, 0.1, 0.4]),
}
SCENES: dict[str, Any] = {
    "pictures": RNG.integers(0, 256, size=(5, 72, 72, 3), dtype=np.uint8),
    "questions": [f"Is the star to the left or right of the fish number {number}?" for number in range(5)],
    "answers": ["left", "right", "above", "$", " \n"],
    "truths": ["left", "left", "above", "below", "below"],
}
VARIANCE: dict[str, Any] = {
    "two_axis": RATES[0],
    "row_share": RATES[0] / 3,
    "column_share": RATES[0] / 2,
    "agreement": RATES[1] - 0.6,
}
STEERING: dict[str, Any] = {"layers": LAYERS, "change_first": COLUMNS, "change_second": -COLUMNS}
PLANE_ARGUMENTS: dict[str, Any] = {
    "coordinates": PLANE,
    "words": {"left": np.array([-1.0, 0.2]), "right": np.array([1.0, -0.2])},
    "title": "star, layer 3",
}

# Function, its arguments, number of axes (colour bars are axes too), and some of the text in the figure.
FIGURES: list[tuple[Callable[..., Figure], dict[str, Any], int, list[str]]] = [
    (plots.scenes_with_answers, SCENES, 5, ["✓ left", "✗ right (truth: left)", "✗ $ (truth: below)"]),
    (plots.id_plane, PLANE_ARGUMENTS, 1, ["star, layer 3", "(0, 0)", "(3, 2)", "left", "right", "x-axis coordinate"]),
    (plots.variance_by_layer, VARIANCE, 2, ["the two axes", "column (x)", "row (y)", "layer"]),
    (plots.belief_swap_by_layer, BELIEF, 4, ["left/right", "above/below", "mean", "by strength", "IDs", "0.5"]),
    (plots.steering_by_column, STEERING, 3, ["“left”", "“right”", "subject steered to column", "change of log p"]),
    (plots.steering_map, {"change": CHANGE, "words": WORDS, "layer": 3}, 2, ["column", "row"]),
    (plots.swap_scores, {"scores": SCORES, "words": WORDS}, 2, ["“left”", "image tokens", "the two words"]),
]


def texts(figure: Figure) -> list[str]:
    return [artist.get_text() for artist in figure.findobj(Text) if isinstance(artist, Text)]


def named_lines(figure: Figure) -> Iterator[tuple[Text, Line2D]]:
    """The legend's names and the lines beside them."""
    (legend,) = figure.legends
    return zip(legend.get_texts(), legend.get_lines(), strict=True)


def lines(axes: Axes) -> list[np.ndarray]:
    """The curves of a panel, without its rules."""
    return [np.asarray(line.get_ydata()) for line in axes.get_lines() if line.get_marker() == "o"]


@pytest.mark.parametrize(
    ("make", "arguments", "count", "labels"), FIGURES, ids=lambda value: getattr(value, "__name__", "")
)
def test_figure_has_its_axes_and_labels_and_is_saved(
    make: Callable[..., Figure], arguments: dict[str, Any], count: int, labels: list[str], tmp_path: Path
) -> None:
    settings = dict(matplotlib.rcParams)
    figure = make(**arguments)
    assert len(figure.axes) == count
    assert set(labels) <= set(texts(figure))
    plots.save(figure, tmp_path / "new" / "figure.png")
    assert dict(matplotlib.rcParams) == settings
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure.png"]
    image = Image.open(tmp_path / "new" / "figure.png").convert("RGB")
    picture = np.asarray(image)
    assert picture.shape[:2] == tuple((200 * figure.get_size_inches()[::-1]).astype(int))
    assert len(image.getcolors(image.width * image.height) or []) > 20
    # Nothing but white at the edges: no label is cut off.
    edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (edges == 255).all()


def test_scenes_are_coloured_by_correctness_and_blank_answers_are_named() -> None:
    verdicts = [axes.xaxis.label for axes in plots.scenes_with_answers(**SCENES).axes]
    assert [label.get_text()[0] for label in verdicts] == list("✓✗✓✗✗")
    assert [to_hex(str(label.get_color())) for label in verdicts] == [
        style.GREEN if label.get_text().startswith("✓") else style.VERMILLION for label in verdicts
    ]
    assert verdicts[-1].get_text() == "✗ nothing (truth: below)"


def test_id_plane_runs_down_and_joins_columns() -> None:
    (axes,) = plots.id_plane(**PLANE_ARGUMENTS).axes
    low, high = axes.get_ylim()
    assert low > high
    columns = [line for line in axes.get_lines() if line.get_marker() == "o"]
    for x, line in enumerate(columns):
        np.testing.assert_array_equal(line.get_xydata(), PLANE[x])
    assert len({to_hex(line.get_color()) for line in columns}) == 4


@pytest.mark.parametrize(("length", "note"), [(1.0, None), (20.0, "0.1 times"), (0.02, "100 times")])
def test_id_plane_scales_words_that_do_not_fit(length: float, note: str | None) -> None:
    figure = plots.id_plane(PLANE, {"left": np.array([-length, 0.0]), "above": np.array([0.0, -length])}, "star")
    assert any("times their length" in text for text in texts(figure)) == (note is not None)
    assert note is None or any(note in text for text in texts(figure))
    (axes,) = figure.axes
    assert np.ptp(axes.get_xlim()) < 4 * np.ptp(PLANE)


def test_labels_of_the_id_plane_cover_neither_each_other_nor_heads_of_arrows() -> None:
    x, y = np.meshgrid([-16.0, -6.0, 5.0, 14.0], [-10.0, -4.0, 2.5, 11.0], indexing="ij")
    cells = np.stack([x + 0.15 * y, y + 0.05 * x], axis=-1)
    words = {"left": np.array([-18.0, -1.0]), "right": np.array([17.5, 0.9]), "above": np.array([-4.3, -12.0])}
    figure = plots.id_plane(cells, words, "star")
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("(")]
    assert len(boxes) == 16
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for tip in axes.transData.transform(np.stack(list(words.values()))):
        assert not any(box.contains(*tip) for box in boxes)


def test_id_plane_needs_no_words() -> None:
    assert "left" not in texts(plots.id_plane(PLANE, {}, "star"))


def test_belief_panels_hold_their_rates() -> None:
    figure = plots.belief_swap_by_layer(**BELIEF, strength_layer=3)
    first, second, mean, strength = figure.axes
    legend = {text.get_text(): to_hex(line.get_color()) for text, line in named_lines(figure)}
    assert legend == {"IDs": style.BLUE, "noise of the same norm": style.GREY}
    assert [to_hex(line.get_color()) for line in first.get_lines()] == [style.GREY, style.BLUE]
    np.testing.assert_array_equal(lines(first), [RATES[0] / 5, RATES[0]])
    np.testing.assert_array_equal(lines(second), [RATES[1] / 5, RATES[1]])
    np.testing.assert_allclose(lines(mean), [RATES.mean(0) / 5, RATES.mean(0)])
    np.testing.assert_array_equal(lines(strength), [BELIEF["noise_by_strength"], BELIEF["belief_by_strength"]])
    assert strength.get_xscale() == "log"
    assert [tick.get_text() for tick in strength.get_xticklabels()] == ["0.5", "1", "5"]
    assert strength.get_title(loc="left") == "by strength, layer 3"
    assert len(first.collections) == 2 and not mean.collections  # the intervals


def test_belief_swap_of_one_relation_is_one_panel() -> None:
    figure = plots.belief_swap_by_layer(LAYERS, RATES[:1], RATES[:1], ["left/right"])
    assert len(figure.axes) == 1


def test_steering_panels_hold_both_words_by_layer() -> None:
    first, second, bar = plots.steering_by_column(**STEERING, words=("above", "below"), along="row").axes
    np.testing.assert_array_equal(lines(first), COLUMNS)
    np.testing.assert_array_equal(lines(second), -COLUMNS)
    assert first.get_title(loc="left") == "“above”"
    assert first.get_xlabel() == "subject steered to row"
    assert [tick.get_text() for tick in bar.get_yticklabels()] == [str(layer) for layer in LAYERS]


def test_steering_of_many_layers_names_some_of_them() -> None:
    layers = np.arange(10, 50)
    bar = plots.steering_by_column(layers, np.zeros((40, 4)), np.zeros((40, 4))).axes[-1]
    assert [tick.get_text() for tick in bar.get_yticklabels()] == [str(layer) for layer in layers[::4]]


def test_steering_map_is_drawn_as_the_picture_lies() -> None:
    axes = plots.steering_map(CHANGE, WORDS, 3).axes[0]
    (image,) = axes.get_images()
    preference = CHANGE[..., 0] - CHANGE[..., 1]
    np.testing.assert_allclose(np.asarray(image.get_array()), preference.T)
    assert image.get_clim() == pytest.approx((-abs(preference).max(), abs(preference).max()))
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(x, y): f"{preference[x, y]:+.2f}" for x in range(4) for y in range(4)}


def test_swap_scores_are_means_over_items() -> None:
    for word, axes in enumerate(plots.swap_scores(SCORES, WORDS).axes):
        np.testing.assert_allclose(lines(axes), [SCORES[name][..., word].mean(1) for name in SCORES])
        band = axes.collections[1].get_paths()[0].vertices
        spread = SCORES["text"][..., word].std(1, ddof=1) + SCORES["text"][..., word].mean(1)
        assert np.asarray(band)[:, 1].max() == pytest.approx(spread.max())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_names_at_line_ends_keep_apart_and_beside_their_panel(share: float) -> None:
    axes = plots.variance_by_layer(*np.full((4, 6), share)).axes[0]
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 3
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    panel = axes.get_window_extent()
    assert all(panel.y0 - 1 <= (box.y0 + box.y1) / 2 <= panel.y1 + 1 for box in boxes)


@pytest.mark.parametrize(
    ("make", "arguments", "wrong", "message"),
    [
        (
            plots.scenes_with_answers,
            SCENES,
            {"answers": ["left"]},
            r"answers is \[1\]; this figure needs \[N\] with N = 5",
        ),
        (plots.scenes_with_answers, SCENES, {"pictures": np.zeros((0, 8, 8, 3), np.uint8)}, "nothing empty"),
        (plots.id_plane, PLANE_ARGUMENTS, {"coordinates": PLANE[:3]}, r"coordinates is \[3, 4, 2\]"),
        (plots.id_plane, PLANE_ARGUMENTS, {"words": {"left": np.zeros(3)}}, "word 'left'"),
        (plots.variance_by_layer, VARIANCE, {"agreement": np.zeros(5)}, r"agreement is \[5\]"),
        (plots.belief_swap_by_layer, BELIEF, {"noise": RATES.T}, r"noise is \[6, 2\].* L = 6, R = 2"),
        (plots.belief_swap_by_layer, BELIEF, {"belief_intervals": RATES}, "belief_intervals"),
        (plots.belief_swap_by_layer, BELIEF, {"noise_by_strength": None}, "go together"),
        (plots.belief_swap_by_layer, BELIEF, {"strengths": np.array([0.0, 1.0, 2.0])}, "above 0"),
        (plots.steering_by_column, STEERING, {"change_second": COLUMNS[:, :3]}, "change_second"),
        (plots.steering_by_column, STEERING, {"words": ("left",)}, "words"),
        (plots.steering_map, {"change": CHANGE, "words": WORDS, "layer": 1}, {"change": CHANGE[0]}, "change"),
        (plots.swap_scores, {"words": WORDS}, {"scores": {}}, "0 token sets"),
        (plots.swap_scores, {"words": WORDS}, {"scores": SCORES | {"image": np.zeros((5, 9, 2))}}, "scores"),
    ],
)
def test_what_does_not_fit_is_refused(
    make: Callable[..., Figure], arguments: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    # Unwrapped: the tests' run-time shape checks would come first.
    with pytest.raises(InputError, match=message):
        inspect.unwrap(make)(**(arguments | wrong))


def test_only_png_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"must end in \.png"):
        plots.save(Figure(), tmp_path / "figure.jpg")
    assert not list(tmp_path.iterdir())


def test_figure_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file"):
        plots.save(Figure(), tmp_path / "file" / "figure.png")


def test_failed_save_leaves_the_old_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, path = Figure(), tmp_path / "figure.png"
    plots.save(figure, path)
    before = path.read_bytes()

    def disk_full(target: Path, **options: Any) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", disk_full)
    with pytest.raises(OutputError, match="No space left"):
        plots.save(figure, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
