"""Ground-truth deviation: does the place that words carry differ from the true one where a model errs?

A word's deviation is its activation in the question with picture, less that in the same question without one. It is
compared, in the plane of the spatial IDs, with the ID of the place where the object is ([ID] arXiv 2601.12626,
Figure 8 a).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxid.errors import InputError
from jaxid.experiments.belief_swap import require_same_model
from jaxid.experiments.relations import Compat, RelationBatch
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.interp.forward import forward
from jaxid.interp.trace import residuals_at
from jaxid.kernels import probing
from jaxid.nn.sites import Capture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviation:
    """Where words and ground truth lie in the plane of the IDs; objects are the subject and the object.

    Attributes:
        control: log-probabilities of the two answers, Float[B, 2].
        truth: index of the true answer, Int[B].
        words: coordinates of the words' deviations by layer, item and object, Float[L, B, 2, 2].
        places: those of the ground-truth IDs, Float[L, B, 2, 2].
        axis: along which of the picture's axes was asked.
        layers: the blocks, Int[L].
    """

    control: Float[np.ndarray, "B 2"]
    truth: Int[np.ndarray, "B"]
    words: Float[np.ndarray, "L B 2 2"]
    places: Float[np.ndarray, "L B 2 2"]
    axis: str
    layers: Int[np.ndarray, "L"]

    @property
    def correct(self) -> Bool[np.ndarray, "B"]:
        """Whether the true answer is the more probable one."""
        rows = np.arange(len(self.truth))
        return self.control[rows, self.truth] > self.control[rows, 1 - self.truth]

    @property
    def gaps(self) -> Float[np.ndarray, "L B"]:
        """How far apart the two words are along the asked axis, in the direction of the true answer."""
        return gap(self.words, self.axis, self.truth)

    @property
    def true_gaps(self) -> Float[np.ndarray, "L B"]:
        """The same of the ground-truth IDs."""
        return gap(self.places, self.axis, self.truth)

    @property
    def margins(self) -> Float[np.ndarray, "L B"]:
        """The words' gap less the ground truth's: above 0, the words are further apart than the objects."""
        return self.gaps - self.true_gaps


def gap(
    coordinates: Float[np.ndarray, "*L B 2 2"], axis: str, truth: Int[np.ndarray, "B"]
) -> Float[np.ndarray, "*L B"]:
    """The subject's coordinate less the object's along the asked axis, negated where the first answer is true.

    The first words, left and above, are at the smaller coordinate: a subject that is where it should be has a gap
    above 0.

    Args:
        coordinates: by item, object (subject first) and direction (x, y).
        axis: "horizontal" or "vertical".
        truth: index of the true answer.
    """
    along = coordinates[..., 0 if axis == "horizontal" else 1]
    return (along[..., 0] - along[..., 1]) * np.where(truth == 1, 1, -1).astype(along.dtype)


def run(
    model: Model,
    batch: RelationBatch,
    ids: SpatialIDs,
    names: Sequence[tuple[str, str]],
    boxes: Float[np.ndarray, "B 2 4"],
    *,
    layers: Sequence[int] | None = None,
    compat: Compat = "none",
) -> Deviation:
    """Deviations and ground truth of every item, at all layers from one pass with pictures and one without.

    Args:
        model: the model.
        batch: prepared items of one axis.
        ids: the model's spatial IDs.
        names: subject and object of every item.
        boxes: (x, y, width, height) of the two, as shares of the picture's width and height.
        layers: decoder blocks after which activations are read; all by default.
        compat: "reference" places ground-truth IDs half a cell off, as the published code does.

    Raises:
        InputError: if IDs and model differ, a layer is out of range, or boxes or names are of other items.
    """
    require_same_model(model, ids)
    count = len(batch.prompts)
    if len(names) != count or boxes.shape != (count, 2, 4):
        raise InputError(f"{count} items need as many names and boxes [B, 2, 4], not {len(names)} and {boxes.shape}.")
    chosen = np.arange(model.num_layers) if layers is None else np.asarray(layers)
    truths = ids.at_box(chosen, boxes, (1.0, 1.0), half_cell=compat != "reference")
    words = batch.words[:, :2]
    shown = forward(model, batch.prompts, capture=Capture(("resid_post",), positions=jnp.asarray(words)))
    text = model.prepare(None, list(batch.prompts.questions))
    alone = residuals_at(model, text, text.words(names))[1:]
    deviations = shown.captured["resid_post"].astype(jnp.float32) - alone.astype(jnp.float32)
    u, v = (direction[chosen] for direction in ids.plane())
    return Deviation(
        control=np.asarray(batch.read(shown)),
        truth=batch.truth,
        words=np.asarray(probing.plane_coordinates(deviations[chosen], u, v)),
        places=np.asarray(probing.plane_coordinates(truths, u, v)),
        axis=batch.axis,
        layers=chosen,
    )


def rank_test(right: Float[np.ndarray, "R"], wrong: Float[np.ndarray, "W"]) -> dict[str, Any]:
    """Mann-Whitney U of two samples: are values of the first the larger ones?

    Returns:
        "u", the number of pairs in which the first sample's value is larger (ties count half); "auc", their share;
        and the p-values "p_two_sided", "p_greater" (the first is larger) and "p_less". All None where a sample is
        empty.
    """
    if not len(right) or not len(wrong):
        return dict.fromkeys(("u", "auc", "p_two_sided", "p_greater", "p_less"))
    from scipy import stats

    # In float32, scipy rounds the p-values too.
    right, wrong = right.astype(np.float64), wrong.astype(np.float64)
    found = {side: stats.mannwhitneyu(right, wrong, alternative=side) for side in ("two-sided", "greater", "less")}
    u = float(found["two-sided"].statistic)
    values = {f"p_{side.replace('-', '_')}": float(result.pvalue) for side, result in found.items()}
    return {"u": u, "auc": u / (len(right) * len(wrong)), **values}


def easy(margins: Float[np.ndarray, "B"]) -> Bool[np.ndarray, "B"]:
    """Which items are in the half of larger margins; of an odd number the middle one is.

    Equal margins are ranked in their order.
    """
    ranks = np.argsort(np.argsort(margins, kind="stable"), kind="stable")
    return ranks >= len(margins) // 2
