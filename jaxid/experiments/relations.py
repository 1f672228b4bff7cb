"""What the two-object experiments share: items, their prompts, and the words of each relation."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxid.data.coco_spatial import SpatialItem
from jaxid.engine import forward
from jaxid.errors import InputError
from jaxid.inputs import Prompts
from jaxid.models.base import Model
from jaxid.models.sites import Capture

ANSWERS = {"horizontal": ("left", "right"), "vertical": ("above", "below")}
"""Answer words of each kind of relation; the first one is at the smaller coordinate."""


def axis_of(item: SpatialItem) -> str:
    """Which kind of relation an item asks about: "horizontal" or "vertical".

    Raises:
        InputError: if its relation is none of the four words.
    """
    for axis, words in ANSWERS.items():
        if item.relation in words:
            return axis
    raise InputError(f"relation {item.relation!r} is none of left, right, above, below.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationBatch:
    """Items of one axis, prepared, with what the control pass says.

    Attributes:
        items: the items.
        prompts: their prompts.
        words: position of the subject's and the object's word, Int[B, 2].
        truth: index of the true answer among the axis' two words, Int[B].
    """

    items: tuple[SpatialItem, ...]
    prompts: Prompts
    words: Int[np.ndarray, "B 2"]
    truth: Int[np.ndarray, "B"]

    @property
    def answers(self) -> list[str]:
        """The two answer words."""
        return list(ANSWERS[self.axis])

    @property
    def axis(self) -> str:
        """The kind of relation asked, "horizontal" or "vertical"."""
        return axis_of(self.items[0])


def prepare(model: Model, items: Sequence[SpatialItem], *, suffix: str = "") -> RelationBatch:
    """Prepares items of one axis.

    Args:
        model: the model.
        items: at least one, all of the same axis.
        suffix: added to every question, e.g. ' Answer "left" or "right" only.'.

    Raises:
        InputError: if there are none, or of both axes.
        PromptError: if a question does not hold a word exactly once.
    """
    axes = {axis_of(item) for item in items}
    if len(axes) != 1:
        raise InputError(f"a batch needs items of exactly one axis, got {sorted(axes) or 'none'}.")
    prompts = model.prepare([item.picture for item in items], [item.query + suffix for item in items])
    words = np.stack(
        [
            prompts.word([item.subject for item in items], occurrence=0),
            prompts.word([item.object for item in items], occurrence=0),
        ],
        axis=1,
    )
    if (words[:, 0] == words[:, 1]).any():
        row = int(np.argmax(words[:, 0] == words[:, 1]))
        raise InputError(f"item {row} asks for two objects of the same name, {items[row].subject!r}.")
    answers = ANSWERS[axes.pop()]
    truth = np.array([answers.index(item.relation) for item in items])
    return RelationBatch(items=tuple(items), prompts=prompts, words=words, truth=truth)


def control(model: Model, batch: RelationBatch) -> tuple[Float[np.ndarray, "B 2"], Float[np.ndarray, "L B 2 D"]]:
    """The clean pass: log-probabilities of the two answers, and the residual stream at the two words."""
    output = forward(model, batch.prompts, capture=Capture(("resid_post",), at=jnp.asarray(batch.words)))
    return np.asarray(output.logprobs(batch.answers)), np.asarray(output.captured["resid_post"])
