"""What is true of objects in a picture: near or far, in front or behind, in between; None where opinions may differ.

Questions, training texts and evaluations share these functions.
"""

import numpy as np
from jaxtyping import Float

MIN_DISTANCE = 0.12
"""An object is left of or above another if its centre is that share of the picture's side away along the axis."""
NEAR = 0.33
"""Objects whose centres are closer than this share of the picture's side are near each other."""
FAR = 0.5
"""Objects whose centres are more than this apart are far from each other."""
MIN_DEPTH_RATIO = 1.2
"""Of two objects one is in front if the other is at least this many times as far from the viewer."""


def is_near(centers: Float[np.ndarray, "2 2"]) -> bool | None:
    """Whether two points of a picture are near each other; None if that is a matter of opinion."""
    apart = float(np.linalg.norm(centers[1].astype(float) - centers[0]))
    if apart < NEAR:
        return True
    return False if apart > FAR else None


def is_in_front(depths: Float[np.ndarray, "2"]) -> bool | None:
    """Whether the first of two objects is in front of the second; None if that is a matter of opinion.

    Args:
        depths: distances from the viewer, 0 if unknown.
    """
    first, second = (float(depth) for depth in depths)
    if min(first, second) <= 0 or max(first, second) < MIN_DEPTH_RATIO * min(first, second):
        return None
    return first < second


def is_between(centers: Float[np.ndarray, "3 2"]) -> bool | None:
    """Whether the third point is in between the first two; None if that is a matter of opinion."""
    a, b, c = centers.astype(float)
    line = b - a
    length = float(np.linalg.norm(line))
    if length < 0.3:
        return None
    share = float((c - a) @ line) / length**2
    aside = abs(float(line[0] * (c - a)[1] - line[1] * (c - a)[0])) / length
    if 0.25 < share < 0.75 and aside < 0.12:
        return True
    return False if share < -0.1 or share > 1.1 or aside > 0.3 else None
