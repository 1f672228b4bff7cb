"""The bugs of the published code, as overrides of the steps of our experiments (`--reference-bugs`).

Nothing else knows of them: an experiment's own steps are what the paper says, and these are what its code does.
"""

import dataclasses
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxid.errors import InputError
from jaxid.experiments.activation_swap import AttributeSwap, MirrorSwap, Patched
from jaxid.experiments.base import Experiment
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.relations import RelationBatch
from jaxid.families.base import Model
from jaxid.interp.forward import forward
from jaxid.interp.generate import Generation
from jaxid.interp.trace import Trace
from jaxid.nn.sites import Capture

ExperimentT = TypeVar("ExperimentT", bound=Experiment[Any, Any, Any])


def occurrence_norms(
    model: Model, batch: RelationBatch, recorded: Trace, written: Generation | None
) -> Float[Array, "L B 2"]:
    """Norm of all activations together at the tokens that are the same as a word's, in prompt and generated text.

    The published code takes this for the word's norm; it is larger than that of the one activation that is edited.

    Raises:
        InputError: if no text was generated.
    """
    if written is None:
        raise InputError("the published code measures norms over the generated text too: set max_new_tokens.")
    longer = batch.prompts.extended(written.tokens, written.lengths)
    token_ids, rows = np.asarray(longer.inputs.token_ids), len(longer)
    words = np.take_along_axis(token_ids, batch.words[:, :2], axis=1)
    same = (token_ids[:, :, None] == words[:, None]) & np.asarray(longer.inputs.valid)[:, :, None]  # [B, T, 2]
    most = int(same.sum(axis=1).max())
    order = np.argsort(~same, axis=1, kind="stable")[:, :most]  # positions of the word first, [B, most, 2]
    positions = order.transpose(0, 2, 1).reshape(rows, 2 * most)
    capture = Capture(("resid_post",), positions=jnp.asarray(positions))
    found = forward(model, longer, capture=capture).captured["resid_post"]
    counted = np.take_along_axis(same, order, axis=1).transpose(0, 2, 1)  # [B, 2, most]
    squares = jnp.square(found.astype(jnp.float32)).sum(axis=-1).reshape(-1, rows, 2, most)
    return jnp.sqrt(jnp.where(counted, squares, 0.0).sum(axis=-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BeliefSwap(BeliefSwap):
    """Norms over all occurrences of a word; the best layers are chosen on the items that are reported."""

    same_items = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_new_tokens:
            raise InputError("the published code measures norms over the generated text too: set max_new_tokens.")

    def norms(
        self, model: Model, batch: RelationBatch, recorded: Trace, written: Generation | None
    ) -> Float[Array, "L B 2"]:
        return occurrence_norms(model, batch, recorded, written)


class ScoresAsPublished:
    """Beside an activation swap: an answer that the changed picture leaves as it is scores 0; means are drawn."""

    statistic = "mean"

    def scores(self, found: Patched) -> Float[np.ndarray, "P L B 2"]:
        """How far the swaps carry the answers."""
        return np.nan_to_num(np.stack(list(found.scores.values())))


class _MirrorSwap(ScoresAsPublished, MirrorSwap):
    """See `ScoresAsPublished`."""


class _AttributeSwap(ScoresAsPublished, AttributeSwap):
    """See `ScoresAsPublished`."""


_VARIANTS: dict[type[Experiment[Any, Any, Any]], type[Experiment[Any, Any, Any]]] = {
    BeliefSwap: _BeliefSwap,
    MirrorSwap: _MirrorSwap,
    AttributeSwap: _AttributeSwap,
}


def with_bugs(experiment: ExperimentT) -> ExperimentT:
    """The experiment with the published code's bugs in its steps; itself if its code has none."""
    kind = _VARIANTS.get(type(experiment), type(experiment))
    options = {field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)}
    return kind(**options)  # pyright: ignore[reportReturnType]
