"""Forward passes of a model under interventions, and sweeps over many of them."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxid.errors import InputError
from jaxid.inputs import Prompts
from jaxid.interventions import Edit, as_pytree, sweep_shape
from jaxid.kernels.logprobs import log_probs
from jaxid.models.base import Model
from jaxid.models.inputs import Inputs
from jaxid.models.sites import SITES, Capture, Intervention, clean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Result of a forward pass; S are the intervention's sweep axes.

    Attributes:
        hidden: normed final hidden state at the last position, Float[S..., B, D].
        captured: by site; "embed" Float[S..., B, P, D], block sites Float[S..., L, B, P, D].
        model: the model that made it.
    """

    hidden: Float[Array, "*S B D"]
    captured: dict[str, Float[Array, "..."]]
    model: Model = dataclasses.field(repr=False)

    @property
    def logits(self) -> Float[Array, "*S B V"]:
        """Next-token logits at the last position, float32."""
        return _unembed(self.model.definition, self.model.parameters, self.hidden)

    def logprobs(self, answers: list[str] | Int[np.ndarray, "n"]) -> Float[Array, "*S B n"]:
        """Log-probabilities of answers as the next token, over the full vocabulary.

        Args:
            answers: answer words, each a single token after the prompt, or token ids.

        Raises:
            PromptError: for a word that is not a single token of its own.
        """
        ids = self.model.processor.answer_ids(answers) if isinstance(answers, list) else np.asarray(answers)
        return _answer_log_probs(self.model.definition, self.model.parameters, self.hidden, jnp.asarray(ids))


def _matrix(definition: Any, parameters: Any) -> Float[Array, "D V"]:
    return nnx.merge(definition, nnx.State(parameters)).decoder.unembed_matrix()


@partial(jax.jit, static_argnums=0)
def _unembed(definition: Any, parameters: Any, hidden: Float[Array, "*S B D"]) -> Float[Array, "*S B V"]:
    return jnp.einsum("...d,dv->...v", hidden, _matrix(definition, parameters), preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnums=0)
def _answer_log_probs(definition: Any, parameters: Any, hidden: Array, ids: Array) -> Array:
    return log_probs(hidden, _matrix(definition, parameters), ids)


def _pass(definition: Any, parameters: Any, inputs: Inputs, intervention: Intervention, capture: Capture) -> Any:
    network = nnx.merge(definition, nnx.State(parameters))
    output = network(inputs, intervention, capture)
    last = jnp.take_along_axis(output.hidden, inputs.last[:, None, None], axis=1)[:, 0]
    return last, output.captured


@partial(jax.jit, static_argnames=("definition", "depth", "chunk"))
def _run(
    definition: Any,
    parameters: Any,
    inputs: Inputs,
    intervention: Any,
    capture: Capture,
    *,
    depth: int,
    chunk: int,
) -> Any:
    """One pass, or `depth` sweep axes of passes, `chunk` at a time."""
    if depth == 0:
        return _pass(definition, parameters, inputs, intervention, capture)
    leading = jax.tree.leaves(intervention)[0].shape[:depth]
    count = math.prod(leading)
    flat = jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[depth:]), intervention)

    def one(edit: Any) -> Any:
        return _pass(definition, parameters, inputs, edit, capture)

    swept = jax.lax.map(one, flat, batch_size=min(chunk, count))
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), swept)


def forward(
    model: Model,
    prompts: Prompts,
    intervention: Intervention = clean,
    capture: Capture | None = None,
    *,
    chunk: int = 16,
) -> Output:
    """Runs a model on prompts, all interventions of a sweep in one call.

    Args:
        model: the model.
        prompts: B prompts.
        intervention: called at every site as `(site, value) -> value`. Edits made by `jaxid.add` and its kin carry
            their sweep axes S; any other pytree-registered callable or plain function counts as a single one.
        capture: sites and positions to return.
        chunk: interventions that run side by side; bounds the memory.

    Returns:
        The output, with sweep axes leading.

    Raises:
        InputError: for an unknown site, or an edit whose layers or prompts do not fit the model and the batch.
    """
    capture = capture or Capture()
    unknown = set(capture.sites) - set(SITES)
    if unknown:
        raise InputError(f"capture names unknown sites {sorted(unknown)}; known: {', '.join(SITES)}.")
    check(model, prompts, intervention)
    intervention = as_pytree(intervention)
    inputs = jax.tree.map(jnp.asarray, prompts.inputs)
    depth = len(sweep_shape(intervention))
    hidden, captured = _run(model.definition, model.parameters, inputs, intervention, capture, depth=depth, chunk=chunk)
    return Output(hidden=hidden, captured=captured, model=model)


def check(model: Model, prompts: Prompts, intervention: Any, new_tokens: int = 0) -> None:
    """Checks layers, positions, number of prompts and width of an edit, where it is ours and concrete.

    Args:
        model: the model.
        prompts: the batch.
        intervention: the edit, or a chain of them.
        new_tokens: how many tokens may follow the prompts.

    Raises:
        InputError: naming what does not fit the model and the batch.
    """
    for part in getattr(intervention, "parts", (intervention,)):
        if hasattr(part, "parts"):
            check(model, prompts, part, new_tokens)
            continue
        if hasattr(part, "refusal"):
            raise InputError(part.refusal)
        if not isinstance(part, Edit) or isinstance(part.layer, Tracer):
            continue
        layers = np.asarray(part.layer)
        lowest, highest = (-1, -1) if part.site == "embed" else (0, model.num_layers - 1)
        wrong = layers[(layers < lowest) | (layers > highest)]
        if wrong.size:
            known = "the embedding is layer -1" if part.site == "embed" else f"{model.name} has blocks 0..{highest}"
            raise InputError(f"layer {wrong.flat[0]} is out of range for site {part.site!r}: {known}.")
        tokens = prompts.offsets.shape[1] + new_tokens
        if not isinstance(part.at, Tracer) and np.asarray(part.at).max(initial=-1) >= tokens:
            raise InputError(f"position {np.asarray(part.at).max()} lies outside the prompts of {tokens} tokens.")
        rows, width = part.at.shape[-2], part.vector.shape[-1]
        if rows not in (1, len(prompts)):
            raise InputError(f"the edit is for {rows} prompts, the batch holds {len(prompts)}.")
        if width != model.width and part.operation != "scale":
            raise InputError(f"the edit's vector has width {width}, the model's residual stream {model.width}.")
