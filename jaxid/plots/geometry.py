"""Figure of the conditions that one vector a picture and one a caption can meet together."""

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxid.checks import check_finite
from jaxid.errors import InputError
from jaxid.plots.style import BLUE, GREY, INK, RULE, STYLE, VERMILLION, About, captioned, check_shapes, new_figure

_NOTES = {
    "free": "any vectors",
    "weighted": "words, weights at will",
    "fused": "same, “not star” one word",
    "equal": "words, equal weights",
}


@rc_context(STYLE)
def attainable_margins(
    law: np.ndarray,
    conditions: np.ndarray,
    margin: Float[np.ndarray, "N"],
    *,
    resolution: float = 0.01,
    about: About | None = None,
) -> Figure:
    """Best margins of sets of conditions under composition laws ([DCSM] arXiv 2503.08723).

    One panel a law, one row a set of conditions; a bar for the best search and a dot for each.

    Args:
        law: composition law of each search, as text.
        conditions: its conditions, joined by " + ".
        margin: what it reached.
        resolution: best margins up to this are drawn as not attained.
        about: how the searches were made.

    Raises:
        InputError: Not every law has every set.
    """
    check_shapes(law=(law, "N"), conditions=(conditions, "N"), margin=(margin, "N"))
    check_finite("margin", margin)
    laws, groups = list(dict.fromkeys(law.tolist())), list(dict.fromkeys(conditions.tolist()))
    found = {(one, group): margin[(law == one) & (conditions == group)] for one in laws for group in groups}
    missing = [f"{group} under {one}" for (one, group), values in found.items() if not len(values)]
    if missing:
        raise InputError(f"no search for {missing[0]} was given; give every law the same sets of conditions.")
    members = [group.split(" + ") for group in groups]
    names = list(dict.fromkeys(name for group in members for name in group))
    figure = new_figure(1.9 + 1.55 * len(laws), 1.1 + 0.2 * len(groups))
    table, *panels = figure.subplots(1, 1 + len(laws), sharey=True, width_ratios=[0.75, *[1.0] * len(laws)])
    _members_table(table, members, names)
    highest = max(0.1, 1.1 * float(margin.max()))
    for axes, one in zip(panels, laws, strict=True):
        for row, group in enumerate(groups):
            values = found[one, group]
            best = float(values.max())
            attained = best > resolution
            color = BLUE if attained else VERMILLION
            if attained:
                axes.barh(row, best, 0.62, color=color, alpha=0.25)
            axes.plot(values, np.full(len(values), row), "o", color=color, markersize=2.5, alpha=0.5, markeredgewidth=0)
            label = f"{best:.2f}" if attained else "0"
            axes.annotate(label, (max(best, 0), row), (4, 0), textcoords="offset points", va="center", fontsize=7)
        axes.axvline(0, color=GREY, linewidth=0.7)
        axes.set_title(f"{one}\n")
        axes.annotate(
            _NOTES.get(one, ""), (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=7,
            color=GREY,
        )  # fmt: skip
        axes.set_xlim(min(-0.03 * highest, 1.1 * float(margin.min())), 1.12 * highest)
        axes.set_xlabel("margin")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
    for axes in (table, *panels):
        for row in range(1, len(groups)):
            if len(members[row]) != len(members[row - 1]):
                axes.axhline(row - 0.5, color=RULE, linewidth=0.8, zorder=0)
    return captioned(figure, about, "bars and numbers: the best search", "dots: every search")


def _members_table(axes: Axes, members: list[list[str]], names: list[str]) -> None:
    """A grid of dots: which condition (column) is in which set (row); a line joins those of one set."""
    for row, group in enumerate(members):
        places = [names.index(name) for name in group]
        axes.plot(range(len(names)), [row] * len(names), "o", color=RULE, markersize=5)
        axes.plot(places, [row] * len(places), "o-", color=INK, markersize=5, linewidth=1.2)
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(len(members) - 0.4, -0.6))
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
