"""Figures of where models err: deviation from the ground truth, and occlusion (Figure 8)."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator

from jaxid.errors import InputError
from jaxid.plots.style import (
    BLUE,
    CHANCE,
    GREY,
    INK,
    RULE,
    STYLE,
    VERMILLION,
    About,
    bands_note,
    captioned,
    chance_line,
    check_shapes,
    curve,
    finite,
    finite_items,
    label_ends,
    last,
    layer_axis,
    new_figure,
    shares,
    wrapped,
)

_FEW = 40
"""Groups of fewer items are drawn as points below the histogram as well."""

_HEAD = 0.76
"""Height up to which histograms reach, of a panel's; the rest is the legend's."""

_TINY = 10
"""Groups of fewer items have no histogram."""

_LEAST = 1e-3
"""Changes of log-probability below this are not told apart."""

_LINEAR = 0.1
"""Up to about this sensitivity, in nats, axes are linear: most sensitivities are small, few are large."""

_WIDE = 6
"""Pictures in a row."""


@rc_context(STYLE)
def margin_histogram(
    margins: Float[np.ndarray, "B"],
    correct: Bool[np.ndarray, "B"],
    note: str = "",
    *,
    layer: int | None = None,
    about: About | None = None,
) -> Figure:
    """Margins of items that were answered correctly and wrongly ([ID] arXiv 2601.12626, Figure 8 a).

    Args:
        margins: how much further apart the two words are than the two objects, along the asked axis.
        correct: whether each item was answered correctly.
        note: of a test, in the panel.
        layer: at which they were read.
        about: what was measured on what.
    """
    check_shapes(margins=(margins, "B"), correct=(correct, "B"))
    known, lost = finite_items(0, margins=margins)
    margins, correct = margins[known], correct[known]
    figure = new_figure(4.8, 3.0)
    axes = figure.add_subplot()
    _histogram(axes, {"right": margins[correct], "wrong": margins[~correct]})
    place = "" if layer is None else f", layer {layer}"
    axes.set_xlabel(f"margin: distance of the two words, less that of the objects{place}")
    if note:
        axes.set_title(note, fontsize=8.5, color=GREY, parse_math=False)
    return captioned(figure, about, "triangles: medians", lost, items=len(margins))


@rc_context(STYLE)
def margins_by_layer(
    layers: Int[np.ndarray, "L"],
    auc: Float[np.ndarray, "L"] | None,
    easy: Float[np.ndarray, "L"],
    hard: Float[np.ndarray, "L"],
    *,
    easy_intervals: Float[np.ndarray, "L 2"] | None = None,
    hard_intervals: Float[np.ndarray, "L 2"] | None = None,
    layer: int | None = None,
    about: About | None = None,
) -> Figure:
    """How well margins tell right from wrong answers, by layer ([ID] arXiv 2601.12626, Figure 8 a).

    Args:
        layers: indices of the layers.
        auc: share of pairs of a right and a wrong answer in which the right one has the larger margin; None where
            there is no such pair, which drops that panel.
        easy: accuracy of the half of the items with larger margins.
        hard: accuracy of the other half.
        easy_intervals: lower and upper bound (95 %) of `easy`, drawn as a band.
        hard_intervals: lower and upper bound (95 %) of `hard`.
        layer: the one to mark.
        about: what was measured on what.
    """
    check_shapes(
        layers=(layers, "L"),
        auc=(auc, "L"),
        easy=(easy, "L"),
        hard=(hard, "L"),
        easy_intervals=(easy_intervals, "L 2"),
        hard_intervals=(hard_intervals, "L 2"),
    )
    (auc, easy, hard), gaps = finite(auc=auc, easy=easy, hard=hard)
    figure = new_figure(4.2 if auc is None else 7.2, 2.8)
    row = figure.subplots(1, 1 if auc is None else 2, squeeze=False)[0]
    for axes in row:
        if layer is not None:
            axes.axvline(layer, color=RULE, linewidth=6, zorder=0)
        layer_axis(axes)
    if auc is not None:
        curve(row[0], layers, auc, BLUE)
        row[0].set(
            title="right before wrong answers",
            ylabel="area under the curve",
            ylim=(min(0.4, np.nanmin(auc) - 0.05), 1.02),
        )
    halves = {"larger margins": (easy, easy_intervals, BLUE), "smaller margins": (hard, hard_intervals, VERMILLION)}
    bottom = 0.48  # chance is in the panel
    for values, bounds, color in halves.values():
        curve(row[-1], layers, values, color, bounds)
        bottom = min(bottom, float(np.nanmin(values if bounds is None else bounds)))
    row[-1].set(title="accuracy of either half", ylim=(max(0.0, bottom - 0.02), 1.01))
    row[-1].set_yticks([tick for tick in row[-1].get_yticks() if bottom <= tick < 1.001])
    shares(row[-1].yaxis)
    label_ends(row[-1], layers, {name: (last(values), color) for name, (values, _, color) in halves.items()})
    for axes in row:
        chance_line(axes)
    bands, marked = bands_note(easy_intervals, hard_intervals), "" if layer is None else f"grey: layer {layer}"
    return captioned(figure, about, bands, CHANCE, marked, gaps)


@rc_context(STYLE)
def occlusion_example(
    pictures: Sequence[UInt8[np.ndarray, "Y X 3"]],
    subject: Int[np.ndarray, "4"],
    object: Int[np.ndarray, "4"],
    elsewhere: Int[np.ndarray, "N 4"],
    right: Float[np.ndarray, "V"],
    names: tuple[str, str],
    title: str = "",
    *,
    about: About | None = None,
) -> Figure:
    """A picture, its two objects, and what blurs do to the right answer ([ID] arXiv 2601.12626, Figure 8 b).

    Args:
        pictures: the picture, with its subject blurred, and with each other box blurred.
        subject: the subject's box; all boxes are left, upper, right and lower pixel edges.
        object: the object's box.
        elsewhere: the other boxes.
        right: log-probability of the right answer about each of the pictures.
        names: of subject and object.
        title: above the figure, the question for example.
        about: what was measured on what.

    Raises:
        InputError: There is not a picture and a log-probability for each blur, and one more.
    """
    check_shapes(elsewhere=(elsewhere, "N 4"), right=(right, "V"))
    count = len(pictures)
    if count != len(right) or count != len(elsewhere) + 2:
        raise InputError(f"{len(elsewhere) + 2} pictures and values are needed; got {count} and {len(right)}.")
    rows = -(-count // _WIDE)
    height, width = pictures[0].shape[:2]
    text = wrapped(title, 100)
    top = 0.1 + 0.17 * len(text.split("\n")) if title else 0.0
    figure = new_figure(7.4, rows * (1.16 * height / width + 0.36) + top)
    panels = figure.subplots(rows, _WIDE, squeeze=False).ravel()
    blurs = [None, subject, *elsewhere]
    for index, axes in enumerate(panels):
        axes.axis("off")
        if index >= count:
            continue
        axes.imshow(pictures[index], interpolation="lanczos")
        box = blurs[index]
        if box is None:
            _frame(axes, subject, BLUE, names[0])
            _frame(axes, object, VERMILLION, names[1])
            name = "the picture"
        else:
            _frame(axes, box, BLUE if index == 1 else "white")
            name = "subject blurred" if index == 1 else f"elsewhere {index - 1}"
        axes.set_title(f"{name}\nlog p = {round(float(right[index]), 2) + 0.0:.2f}", fontsize=7, pad=3, loc="center")
    if title:
        figure.suptitle(text, x=0.01, ha="left", fontsize=9.5, parse_math=False)
    return captioned(figure, about, "log p: of the right answer")


@rc_context(STYLE)
def sensitivities(
    sensitivity: Float[np.ndarray, "B"],
    subject_drop: Float[np.ndarray, "B"],
    elsewhere_drop: Float[np.ndarray, "B"],
    correct: Bool[np.ndarray, "B"],
    *,
    margins: Float[np.ndarray, "B"] | None = None,
    note: str = "",
    about: About | None = None,
) -> Figure:
    """How much the right answer needs the subject's pixels ([ID] arXiv 2601.12626, Figure 8 b).

    A panel of sensitivities, one of how many items fall by how much, and one against margins, if given.

    Args:
        sensitivity: log p(correct) of the worst blur elsewhere, less that of the blurred subject.
        subject_drop: how much log p(correct) falls when the subject is blurred.
        elsewhere_drop: how much it falls on average when as much is blurred elsewhere.
        correct: whether each item was answered correctly about its picture.
        margins: of a deviation run; NaN where there is none.
        note: of their correlation.
        about: what was measured on what.
    """
    check_shapes(
        sensitivity=(sensitivity, "B"),
        subject_drop=(subject_drop, "B"),
        elsewhere_drop=(elsewhere_drop, "B"),
        correct=(correct, "B"),
        margins=(margins, "B"),
    )
    kept, lost = finite_items(0, sensitivity=sensitivity, subject_drop=subject_drop, elsewhere_drop=elsewhere_drop)
    sensitivity, subject_drop, elsewhere_drop = sensitivity[kept], subject_drop[kept], elsewhere_drop[kept]
    correct = correct[kept]
    unknown = ""
    panels = 2 if margins is None else 3
    figure = new_figure(3.4 * panels, 3.0)
    row = figure.subplots(1, panels)
    _histogram(row[0], {"right": sensitivity[correct], "wrong": sensitivity[~correct]}, _LINEAR)
    row[0].axvline(0, ymax=_HEAD, color=GREY, linewidth=0.8, zorder=1)
    row[0].set_xlabel("sensitivity to the subject (nats)")
    drops = {"subject blurred": (subject_drop, BLUE), "as much blurred elsewhere": (elsewhere_drop, GREY)}
    _exceeded(row[1], drops)
    row[1].set_xlabel("fall of log p(correct) (nats)")
    if margins is not None:
        known, unknown = finite_items(0, margins=margins[kept])
        margins, unknown = margins[kept], unknown.replace("items not finite", "items without a margin")
        _points(row[2], margins[known], sensitivity[known], correct[known])
        row[2].set_yscale("asinh", linear_width=_LINEAR)
        _powers(row[2].yaxis, sensitivity[known])
        row[2].set(xlabel="margin of the words", ylabel="sensitivity to the subject (nats)")
        if note:
            row[2].set_title(note, fontsize=8.5, color=GREY, parse_math=False)
    return captioned(figure, about, "triangles: medians", lost, unknown, items=len(correct))


def _histogram(axes: Axes, groups: Mapping[str, Float[np.ndarray, "_"]], width: float | None = None) -> None:
    """Shares of two groups over common bins; their medians, and small groups' items one by one, below.

    Groups of a few items are drawn one by one alone: their bars would tower over the others'.

    Args:
        axes: the panel.
        groups: name -> values, of two groups.
        width: where given, the axis is linear up to about this value and logarithmic from there on, either way.
    """
    shown = {name: values for name, values in groups.items() if len(values)}
    values = np.concatenate(list(shown.values()))
    count = int(np.clip(np.sqrt(len(values)) * 1.5, 8, 36))
    if width is None:
        edges = np.histogram_bin_edges(values, bins=count).tolist()
    else:
        axes.set_xscale("asinh", linear_width=width)
        _powers(axes.xaxis, values)
        edges = (width * np.sinh(np.histogram_bin_edges(np.arcsinh(values / width), bins=count))).tolist()
    colors = dict(zip(groups, (BLUE, VERMILLION), strict=True))
    large = {name for name, own in shown.items() if len(own) >= _TINY} or set(shown)
    highest = 0.0
    for name, own in shown.items():
        if name in large:
            weights, color = np.full(len(own), 1 / len(own)), colors[name]
            heights, _, _ = axes.hist(own, edges, weights=weights, color=color, alpha=0.35)
            axes.hist(own, edges, weights=weights, color=color, histtype="step", linewidth=1.2)
            highest = max(highest, float(np.max(heights)))
    below = -0.055 * highest
    for index, (name, own) in enumerate(shown.items()):
        at = below * (index + 1)
        label = f"{name} answers (n = {len(own)})"
        axes.plot(np.median(own), at, "v", color=colors[name], markersize=6, zorder=4, label=label)
        if len(own) < _FEW:
            axes.plot(own, np.full(len(own), at), "|", color=colors[name], markersize=5, alpha=0.7)
    axes.axhline(0, color=GREY, linewidth=0.7)
    axes.set_ylabel("share of the group")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set(ylim=(below * (len(shown) + 1), highest / _HEAD))
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= highest * 1.1])
    shares(axes.yaxis)
    axes.legend(loc="upper left", frameon=False, handlelength=1.0, fontsize=7.5)


def _powers(axis: Axis, values: Float[np.ndarray, "_"]) -> None:
    """Ticks at 0 and at powers of ten either way, from 0.1 on, as far as values go."""
    powers = 10.0 ** np.arange(-1, 4)
    ticks = [0.0, *powers[powers <= 2 * values.max()], *-powers[powers <= -2 * values.min()]]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def _exceeded(axes: Axes, drops: Mapping[str, tuple[Float[np.ndarray, "B"], str]]) -> None:
    """Shares of items that fall by more than any amount, on a logarithmic axis; a line and a colour a name."""
    highest = max(_LEAST * 10, *(float(values.max()) for values, _ in drops.values()))
    amounts = np.geomspace(_LEAST, highest, 200)
    for name, (values, color) in drops.items():
        axes.plot(amounts, (values[:, None] > amounts).mean(axis=0), color=color, label=name)
    axes.set(xscale="log", ylim=(-0.02, 1.02), ylabel="items that fall by more")
    shares(axes.yaxis)
    axes.legend(loc="upper right", frameon=False, handlelength=1.4, fontsize=7.5)


def _points(axes: Axes, x: np.ndarray, y: np.ndarray, correct: np.ndarray) -> None:
    """Items as points, those answered wrongly on top."""
    axes.grid(axis="x")
    axes.plot(x[correct], y[correct], "o", color=BLUE, alpha=0.5, markeredgewidth=0)
    axes.plot(x[~correct], y[~correct], "o", color=VERMILLION, alpha=0.8, markeredgewidth=0)


def _frame(axes: Axes, box: np.ndarray, color: str, name: str = "") -> None:
    """A rectangle around the pixels of a box, with a name beside it that stays in the picture."""
    left, upper, right, lower = (float(edge) for edge in box)
    frame = Rectangle(
        (left - 0.5, upper - 0.5), right - left, lower - upper, fill=False, edgecolor=color, linewidth=1.1
    )
    frame.set_path_effects([withStroke(linewidth=2.0, foreground=INK if color == "white" else "white")])
    axes.add_patch(frame)
    if not name:
        return
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    over, leftwards = upper > 0.12 * height, left > 0.6 * width
    label = axes.annotate(
        name,
        (right if leftwards else left, upper if over else lower),
        (0, 1 if over else -1),
        textcoords="offset points",
        ha="right" if leftwards else "left",
        va="bottom" if over else "top",
        color="white",
    )
    plate = {"boxstyle": "round,pad=0.12", "facecolor": color, "edgecolor": "none"}
    label.set(fontsize=5.5, bbox=plate, parse_math=False)
    label.set_in_layout(False)
