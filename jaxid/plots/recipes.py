"""The figure of a recipe's training run."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.figure import Figure

from jaxid.errors import InputError
from jaxid.plots.style import BLUE, GREY, INK, STYLE, About, captioned, finite, gradient, new_figure, shares


@rc_context(STYLE)
def recipe_curves(
    step: Float[np.ndarray, "N"],
    stage: Sequence[str],
    loss: Float[np.ndarray, "N"],
    correct: Mapping[str, Float[np.ndarray, "N"]],
    *,
    about: About | None = None,
) -> Figure:
    """Loss and shares of correct answers over the stages of a run.

    Args:
        step: of every record, ascending.
        stage: the stage that each record belongs to.
        loss: of the batch of that step; stages have losses of their own.
        correct: by name, the share of a batch's labels that are predicted; NaN where a stage has no such labels.
        about: what was trained.

    Raises:
        InputError: if the lengths differ or there is nothing to draw.
    """
    lengths = {len(step), len(stage), len(loss), *map(len, correct.values())}
    if len(lengths) > 1 or lengths == {0}:
        raise InputError("recipe_curves needs one or more records, and as many stages, losses and shares.")
    (loss,), gaps = finite(loss=loss)
    known = {name: values for name, values in correct.items() if np.isfinite(values).any()}
    figure = new_figure(8.0, 2.9)
    left, right = figure.subplots(1, 2)
    starts = [row for row in range(len(stage)) if row == 0 or stage[row] != stage[row - 1]]
    marker = "." if len(step) < 25 else ""
    for first, end in zip(starts, [*starts[1:], len(stage)], strict=True):
        rows = slice(first, end)
        left.plot(step[rows], loss[rows], color=BLUE, linewidth=1.0, marker=marker)
        for color, (name, values) in zip(gradient(max(len(known), 2)), known.items(), strict=False):
            label = name.replace("_", " ") if first == 0 else None
            right.plot(step[rows], values[rows], color=color, linewidth=1.0, marker=marker, label=label)
    left.set_ylim(0, 1.25 * float(np.nanmax(loss)))
    right.set_ylim(0, 1.02)
    shares(right.yaxis)
    last = float(step[-1])
    for axes, title in ((left, "loss"), (right, "correct within the batch")):
        axes.set(title=title, xlabel="step", xlim=(0, 1.02 * last))
        for first in starts:
            begin = float(step[first - 1]) if first else 0.0
            if first:
                axes.axvline(begin, color=GREY, linewidth=0.7, linestyle=":")
            if axes is left:
                height = (0.985 - 0.065 * (starts.index(first) % 3)) * axes.get_ylim()[1]  # short stages lie close
                axes.text(begin + 0.01 * last, height, stage[first], fontsize=7.5, color=INK, va="top")
    if known:
        right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return captioned(figure, about, f"{len(step)} records, each of one batch", f"losses: {gaps}" if gaps else "")
