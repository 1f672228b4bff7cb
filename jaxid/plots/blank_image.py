"""Figure of the blank-image control: answers, spatial IDs and belief swaps without anything to see."""

import numpy as np
from jaxtyping import Float, Int
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxid.plots.style import (
    BLUE,
    CHANCE,
    GREY,
    INK,
    STYLE,
    VERMILLION,
    WILSON,
    About,
    captioned,
    chance_line,
    check_shapes,
    curve,
    layer_axis,
    new_figure,
    shares,
    zero_line,
)

COLORS = {"the picture": BLUE, "grey picture": GREY, "mean picture": VERMILLION}
"""By what was shown, in the order of the arrays."""


@rc_context(STYLE)
def blank_image(
    layers: Int[np.ndarray, "L"],
    accuracy: Float[np.ndarray, "3"],
    accuracy_interval: Float[np.ndarray, "3 2"],
    id_norm: Float[np.ndarray, "3 L"],
    gap: Float[np.ndarray, "3 L"],
    gap_interval: Float[np.ndarray, "3 L"],
    swapped: Float[np.ndarray, "3 L"],
    swapped_interval: Float[np.ndarray, "3 L 2"],
    noise: Float[np.ndarray, "3 L"],
    *,
    about: About | None = None,
) -> Figure:
    """What is left of answers, spatial IDs and belief swaps on blank pictures.

    Args:
        layers: the layers.
        accuracy: share of true answers about the picture, a grey one, and the mean picture.
        accuracy_interval: lower and upper bound (95 %).
        id_norm: of what pictures add to the words in the plane of the IDs; drawn as a share of the first one's.
        gap: how far subject and object are apart there, in the true direction; drawn in units of the same norm.
        gap_interval: half of its 95 % interval.
        swapped: share of beliefs swapped by IDs.
        swapped_interval: lower and upper bound (95 %).
        noise: share swapped by noise of the same norm.
        about: what was measured on what.

    Raises:
        InputError: The arrays do not fit each other.
    """
    check_shapes(
        layers=(layers, "L"),
        accuracy=(accuracy, "3"),
        accuracy_interval=(accuracy_interval, "3 2"),
        id_norm=(id_norm, "3 L"),
        gap=(gap, "3 L"),
        gap_interval=(gap_interval, "3 L"),
        swapped=(swapped, "3 L"),
        swapped_interval=(swapped_interval, "3 L 2"),
        noise=(noise, "3 L"),
    )
    figure = new_figure(9.4, 2.8)
    bars, norms, gaps, swaps = figure.subplots(1, 4, width_ratios=(0.7, 1, 1, 1))
    for row, color in enumerate(COLORS.values()):
        bars.bar(row, accuracy[row], width=0.62, color=color)
        bars.vlines(row, *accuracy_interval[row], color=INK, linewidth=1)
        curve(norms, layers, id_norm[row] / id_norm[0], color)
        low, high = gap[row] - gap_interval[row], gap[row] + gap_interval[row]
        curve(gaps, layers, gap[row] / id_norm[0], color, np.stack([low, high], axis=-1) / id_norm[0][:, None])
        curve(swaps, layers, swapped[row], color, swapped_interval[row])
        curve(swaps, layers, noise[row], color, linestyle="--", marker="", linewidth=1)
    bars.set(title="accuracy", ylim=(0, 1.02), xticks=[])
    norms.set(title="norm of IDs at the words", ylim=(0, max(1.02, *norms.get_ylim())))
    gaps.set(title="gap in the true direction", ylabel="in units of the picture's norm")
    zero_line(gaps)
    swaps.set(title="beliefs swapped", ylim=(-0.02, 1.02))
    for axes in (norms, gaps, swaps):
        layer_axis(axes)
    shares(bars.yaxis, norms.yaxis, swaps.yaxis)
    for axes in (bars, swaps):
        chance_line(axes)
    handles = {name: Line2D([], [], color=color, marker="o") for name, color in COLORS.items()}
    handles |= {"swapped by IDs": Line2D([], [], color=INK), "by noise": Line2D([], [], color=INK, linestyle="--")}
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper left", ncols=5, frameon=False, handlelength=1.6
    )
    return captioned(figure, about, f"whiskers and bands: {WILSON}, of gaps Student's", CHANCE)
