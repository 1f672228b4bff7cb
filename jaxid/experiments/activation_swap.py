"""Mirror and attribute swap: another picture's activations in the control run ([ID] arXiv 2601.12626, Figure 4)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.errors import DataError
from jaxid.experiments.relations import RelationBatch
from jaxid.families.base import Model
from jaxid.interp.trace import rerun, swap, trace
from jaxid.prompts.processor import Prompts
from jaxid.stats import centre_and_spread

TOKEN_SETS = ("image", "text", "words")
"""What is swapped: all image tokens, all text tokens after the picture, the two objects' words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSwap:
    """Log-probabilities of the two answers.

    Attributes:
        control: about the picture itself, Float[B, 2].
        intervened: about the changed picture, Float[B, 2].
        patched: by token set and layer, Float[3, L, B, 2].
        layers: Int[L].
    """

    control: Float[np.ndarray, "B 2"]
    intervened: Float[np.ndarray, "B 2"]
    patched: Float[np.ndarray, "P L B 2"]
    layers: Int[np.ndarray, "L"]

    @property
    def scores(self) -> dict[str, Float[np.ndarray, "L B 2"]]:
        """By token set: how far the swap carries each answer.

        NaN where the changed picture leaves an answer as it is, so that there is nothing to carry; the published code
        counts this as 0.
        """
        scores = np.asarray(swap_score(*map(jnp.asarray, (self.control, self.patched, self.intervened))))
        defined = np.where(self.control == self.intervened, np.nan, scores)
        return dict(zip(TOKEN_SETS, defined.astype(scores.dtype), strict=True))


def token_sets(batch: RelationBatch) -> dict[str, Int[np.ndarray, "B P"]]:
    """Positions of what is swapped."""
    return {
        "image": batch.prompts.image_tokens(),
        "text": batch.prompts.text_tokens(),
        "words": batch.words[:, :2],
    }


def swap_score(
    control: Float[Array, "B n"], patched: Float[Array, "*S B n"], intervened: Float[Array, "B n"]
) -> Float[Array, "*S B n"]:
    """How far a patch carries the answers to those of the intervened picture: 0 not at all, 1 wholly.

    (log p_control - log p_patched) / (log p_control - log p_intervened); what is not finite counts as 0.
    """
    score = (control - patched) / (control - intervened)
    return jnp.where(jnp.isfinite(score), score, 0.0)


def statistics(scores: Mapping[str, Float[np.ndarray, "L B 2"]]) -> dict[str, Any]:
    """Over items, by token set, layer and word: medians and quartiles, and the published means and deviations.

    Items with a score that is not finite are left out.

    Raises:
        DataError: if no item is left.
    """
    known = np.logical_and.reduce([np.isfinite(values).all(axis=(0, 2)) for values in scores.values()])
    if not known.any():
        raise DataError(
            f"no swap score of the {len(known)} items is finite: do the changed pictures change the answers?"
        )
    robust = {name: centre_and_spread(values[:, known], 1) for name, values in scores.items()}
    published = {name: centre_and_spread(values[:, known], 1, robust=False) for name, values in scores.items()}
    return {
        "score_items": int(known.sum()),
        "score_median": {name: centre for name, (centre, _, _) in robust.items()},
        "score_quartiles": {name: np.stack([low, high], axis=-1) for name, (_, low, high) in robust.items()},
        "score_mean": {name: mean for name, (mean, _, _) in published.items()},
        "score_std": {name: mean - low for name, (mean, low, _) in published.items()},
    }


def run(
    model: Model,
    batch: RelationBatch,
    intervened: Prompts,
    *,
    layers: Sequence[int] | None = None,
    chunk: int | None = None,
) -> ActivationSwap:
    """Swaps each token set at every layer.

    Args:
        model: the model.
        batch: prepared items of one axis (the control pictures).
        intervened: the same questions about the changed pictures, e.g. mirrored left-right.
        layers: decoder blocks after which values are swapped; all by default.
        chunk: edits that run side by side.

    Raises:
        InputError: if the two differ in their questions, or a layer is out of range.
    """
    chosen = np.arange(model.num_layers) if layers is None else np.asarray(layers)
    recorded, changed = trace(model, batch.prompts), trace(model, intervened)
    places = ("image", "text", batch.words[:, :2])
    patched = [batch.read(rerun(model, recorded, swap(changed, chosen, at), chunk=chunk)) for at in places]
    return ActivationSwap(
        control=np.asarray(batch.read(recorded)),
        intervened=np.asarray(batch.read(changed)),
        patched=np.stack([np.asarray(part) for part in patched]),
        layers=chosen,
    )
