"""Mirror swap: activations of the mirrored picture put into the control run ([ID] arXiv 2601.12626, Figure 4)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.engine import forward
from jaxid.experiments.relations import RelationBatch
from jaxid.inputs import Prompts
from jaxid.interventions import replace
from jaxid.models.base import Model
from jaxid.models.sites import Capture


def token_sets(batch: RelationBatch) -> dict[str, Int[np.ndarray, "B P"]]:
    """What is swapped: positions of all image tokens, of all text tokens, and of the two objects' words."""
    return {
        "image": batch.prompts.image_tokens(),
        "text": batch.prompts.text_tokens(),
        "words": batch.words,
    }


def swap_score(
    control: Float[Array, "B n"], patched: Float[Array, "*S B n"], intervened: Float[Array, "B n"]
) -> Float[Array, "*S B n"]:
    """How far a patch carries the answers to those of the intervened picture: 0 not at all, 1 wholly.

    (log p_control - log p_patched) / (log p_control - log p_intervened); what is not finite counts as 0.
    """
    score = (control - patched) / (control - intervened)
    return jnp.where(jnp.isfinite(score), score, 0.0)


def run(
    model: Model, batch: RelationBatch, intervened: Prompts, *, chunk: int = 8
) -> dict[str, Float[np.ndarray, "L B 2"]]:
    """Swaps each token set at every layer.

    Args:
        model: the model.
        batch: prepared items of one axis (the control pictures).
        intervened: the same questions about the changed pictures, e.g. mirrored left-right.
        chunk: edits that run side by side.

    Returns:
        By token set: the score of each answer word, Float[L, B, 2].
    """
    control = forward(model, batch.prompts).logprobs(batch.answers)
    target = forward(model, intervened).logprobs(batch.answers)
    layers = jnp.arange(model.num_layers)
    scores = {}
    for name, at in token_sets(batch).items():
        values = forward(model, intervened, capture=Capture(("resid_post",), at=jnp.asarray(at))).captured
        edit = replace(layer=layers, at=at, vector=values["resid_post"])
        patched = forward(model, batch.prompts, edit, chunk=chunk).logprobs(batch.answers)
        scores[name] = np.asarray(swap_score(control, patched, target))
    return scores
