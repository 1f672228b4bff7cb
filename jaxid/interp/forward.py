"""Forward passes of a model under interventions, and sweeps over many of them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from jaxid import meshes
from jaxid.errors import InputError
from jaxid.families.base import Model
from jaxid.interp.interventions import Edit, VectorEdit, as_intervention, check_layers, parts_of
from jaxid.interp.programs import program
from jaxid.interp.spreading import by_prompts, dealt, in_order, inputs_of, of_prompts, over_rows, with_model
from jaxid.interp.sweep import Sweep, rows_together
from jaxid.kernels.logprobs import log_probs
from jaxid.meshes import DATA, MODEL
from jaxid.nn import placement
from jaxid.nn.inputs import Inputs
from jaxid.nn.network import Network
from jaxid.nn.sites import SITES, AnyArray, Capture, Intervention, SiteFunction, as_integers, as_positions, clean
from jaxid.prompts.processor import Prompts
from jaxid.reprs import brief


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Result of a forward pass; S are the intervention's sweep axes.

    Attributes:
        hidden: normed final hidden state at the last position, Float[S..., B, D].
        captured: by site; "embed" Float[S..., B, P, D], block sites Float[S..., L, B, P, D].
        model: the model that computed it.
    """

    hidden: Float[Array, "*S B D"]
    captured: dict[str, Float[Array, "..."]]
    model: Model = dataclasses.field(repr=False)

    __repr__ = brief

    @property
    def logits(self) -> Float[Array, "*S B V"]:
        """Next-token logits at the last position, float32."""
        return self._read(_unembed)

    def logprobs(self, answers: object) -> Float[Array, "*S B n"]:
        """Log-probabilities of answers as the next token, over the full vocabulary.

        Args:
            answers: answer words, list[str], each a single token after the prompt; or token ids, Int[n].

        Raises:
            PromptError: for a word that is not a single token.
        """
        if isinstance(answers, list | tuple) and all(isinstance(answer, str) for answer in answers):
            answers = self.model.processor.answer_ids(answers)
        ids, entries = as_integers("answers", answers), self.model.config.text_config.vocab_size
        if not isinstance(ids, Tracer) and not ((ids >= 0) & (ids < entries)).all():
            raise InputError(f"answers must be token ids from 0 to {entries - 1}, not {ids.tolist()}.")
        return self._read(_answer_log_probs, meshes.replicated(self.model.mesh, ids))

    def _read(self, function: Callable[..., Array], *arguments: Array) -> Float[Array, "*S B _"]:
        sweep = Sweep(self.hidden.shape[:-2])
        found = function(self.model.definition, self.model.parameters, sweep.flat(self.hidden), *arguments)
        return sweep.unflat(found)


def _matrix(definition: nnx.GraphDef[Network], parameters: PyTree) -> Float[Array, "D V"]:
    return nnx.merge(definition, nnx.State(parameters)).decoder.unembed_matrix()


@program(static_argnums=0)
def _unembed(
    definition: nnx.GraphDef[Network], parameters: PyTree, hidden: Float[Array, "*S B D"]
) -> Float[Array, "*S B V"]:
    matrix = _matrix(definition, parameters)
    found = jnp.einsum("...d,dv->...v", hidden, matrix, preferred_element_type=jnp.float32)
    return placement.result(found, (DATA, None))


@program(static_argnums=0)
def _answer_log_probs(definition: nnx.GraphDef[Network], parameters: PyTree, hidden: Array, ids: Array) -> Array:
    found = log_probs(hidden, _matrix(definition, parameters), ids, parts=placement.axis_size(MODEL))
    return placement.result(found, (DATA, None))


def _pass(
    definition: nnx.GraphDef[Network], parameters: PyTree, inputs: Inputs, intervention: SiteFunction, capture: Capture
) -> tuple[Array, dict[str, Array]]:
    network = nnx.merge(definition, nnx.State(parameters))
    output = network(inputs, intervention, capture)
    last = jnp.take_along_axis(output.hidden, inputs.last[:, None, None], axis=1)[:, 0]
    captured = {name: placement.placed(value, (DATA, None, None)) for name, value in output.captured.items()}
    return placement.placed(last, (DATA, None)), captured


@program(static_argnames=("definition", "chunk"))
def _run(
    definition: nnx.GraphDef[Network],
    parameters: PyTree,
    inputs: Inputs,
    intervention: PyTree,
    capture: Capture,
    count: Int[Array, ""] | None,
    *,
    chunk: int,
) -> tuple[Array, dict[str, Array]]:
    """A single pass; with `count`, the passes of R rows in chunks, of which only the first `count` are needed."""
    if count is None:
        return _pass(definition, parameters, inputs, intervention, capture)
    return _sweep(definition, parameters, inputs, intervention, capture, count, chunk)


@program(static_argnames=("definition", "chunk"))
def _run_rows(
    definition: nnx.GraphDef[Network],
    parameters: PyTree,
    inputs: Inputs,
    intervention: PyTree,
    capture: Capture,
    count: Int[Array, ""],
    *,
    chunk: int,
) -> tuple[tuple[Array, dict[str, Array]], Array]:
    """`_run` with its rows sharded over "data"; the results and the order in which they come."""
    rows, parts = jax.tree.leaves(intervention)[0].shape[0], placement.axis_size(DATA)
    order = dealt(jnp.arange(rows), parts)

    def run(shared: PyTree, edits: tuple[PyTree, Array]) -> PyTree:
        (parameters, inputs, capture), (own, wanted) = shared, edits
        return _sweep(definition, parameters, inputs, own, capture, wanted.sum(), chunk)

    edits = jax.tree.map(lambda leaf: leaf[order], intervention)
    return over_rows(run, (parameters, inputs, capture), (edits, order < count)), order


def _sweep(
    definition: nnx.GraphDef[Network],
    parameters: PyTree,
    inputs: Inputs,
    intervention: PyTree,
    capture: Capture,
    count: Int[Array, ""],
    chunk: int,
) -> tuple[Array, dict[str, Array]]:
    rows = jax.tree.leaves(intervention)[0].shape[0]
    chunks = -(-rows // chunk)
    row = (jnp.arange(chunks * chunk) % rows).reshape(chunks, chunk)

    @jax.jit  # so that it is traced only once, for its shapes and its values
    def run(row: Array) -> PyTree:
        edits = jax.tree.map(lambda leaf: leaf[row], intervention)
        return jax.vmap(lambda edit: _pass(definition, parameters, inputs, edit, capture))(edits)

    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run, row[0]))
    swept = jax.lax.map(lambda row: jax.lax.cond(row[0] < count, run, lambda _: empty, row), row)
    return jax.tree.map(lambda leaf: leaf.reshape(chunks * chunk, *leaf.shape[2:])[:rows], swept)


def forward(
    model: Model,
    prompts: Prompts,
    intervention: SiteFunction = clean,
    capture: Capture | None = None,
    *,
    chunk: int | None = None,
) -> Output:
    """Runs a model on prompts, all interventions of a sweep in one call.

    On a mesh, prompts are sharded over "data"; where they do not divide, a sweep's interventions are.

    Args:
        model: the model.
        prompts: B prompts.
        intervention: called at every site as `(site, value) -> value`. Edits made by `jaxid.add` etc. carry their sweep
            axes S; any other callable pytree or plain function counts as a single intervention.
        capture: sites and positions to return.
        chunk: number of interventions that run together, which bounds the memory; chosen automatically by default.

    Returns:
        The output, with sweep axes leading.

    Raises:
        InputError: for an unknown site, or an edit or capture whose layers, positions or prompts do not fit the model
            and the batch. Where layers and positions are traced, those that do not exist change nothing.
    """
    capture = capture or Capture()
    unknown = set(capture.sites) - set(SITES)
    if unknown:
        raise InputError(f"capture names unknown sites {sorted(unknown)}; known: {', '.join(SITES)}.")
    intervention = as_intervention(intervention)
    check(model, prompts, intervention)
    positions = None if capture.positions is None else checked_positions(prompts, capture.positions)
    inputs, mesh = inputs_of(model, prompts), model.mesh
    parts, shared = meshes.size(mesh, meshes.DATA), by_prompts(mesh, len(prompts))
    sweep = Sweep(intervention.sweep_shape, 1 if shared or not intervention.sweep_shape else parts)
    wanted = Capture(capture.sites, positions if positions is None else of_prompts(mesh, positions, len(prompts)))
    tokens = inputs.token_ids.size // (parts if shared else 1)
    chunk = rows_together(sweep.own, tokens) if chunk is None else min(chunk, sweep.own)
    intervention = with_model(mesh, intervention)
    arguments = (model.definition, model.parameters, inputs)
    if not sweep.shape:
        hidden, captured = _run(*arguments, intervention, wanted, None, chunk=chunk)
    else:
        edits, count = sweep.flat(intervention), meshes.replicated(mesh, np.asarray(sweep.count))
        if sweep.parts > 1:
            found = in_order(*_run_rows(*arguments, edits, wanted, count, chunk=chunk))
        else:
            found = _run(*arguments, edits, wanted, count, chunk=chunk)
        hidden, captured = sweep.unflat(found)
    return Output(
        hidden=hidden,
        captured={name: nan_outside(prompts, positions, value) for name, value in captured.items()},
        model=model,
    )


def checked_positions(prompts: Prompts, positions: object, new_tokens: int = 0) -> Int[AnyArray, "B P"]:
    """Positions in every prompt of a batch.

    Args:
        prompts: the batch.
        positions: Int[B, P] or Int[B]; Int[1, P] applies to all prompts.
        new_tokens: number of tokens that may follow the prompts.

    Returns:
        Int[B, P], on the host unless it is traced.

    Raises:
        InputError: for another shape or dtype, or a concrete position outside its prompt.
    """
    wanted: AnyArray = as_positions(positions)
    count = len(prompts)
    if wanted.shape[0] not in (1, count):
        raise InputError(f"`positions` is for {wanted.shape[0]} prompts, but the batch holds {count}.")
    if isinstance(wanted, Tracer):
        return jnp.broadcast_to(wanted, (count, wanted.shape[1]))
    wanted = np.broadcast_to(wanted, (count, wanted.shape[1]))
    beyond = np.argwhere(wanted > prompts.last()[:, None] + new_tokens)
    if beyond.size:
        row, place = beyond[0]
        raise InputError(
            f"position {wanted[row, place]} lies outside prompt {row}, which ends at {prompts.last()[row]}"
            + (f" before {new_tokens} new tokens." if new_tokens else "; what follows is padding.")
        )
    return wanted


def nan_outside(
    prompts: Prompts, positions: Int[AnyArray, "B P"] | None, values: Float[Array, "*S B P D"]
) -> Float[Array, "*S B P D"]:
    """The values, with NaN at traced positions that are outside the prompt."""
    if not isinstance(positions, Tracer):  # those have been checked
        return values
    inside = (positions >= 0) & (positions <= prompts.last()[:, None])
    return jnp.where(inside[..., None], values, jnp.nan)


def check(model: Model, prompts: Prompts, intervention: Intervention, new_tokens: int = 0) -> None:
    """Checks layers, positions, number of prompts and width of the library's own edits, where they are concrete.

    Args:
        model: the model.
        prompts: the batch.
        intervention: the edit, or a chain of them.
        new_tokens: number of tokens that may follow the prompts.

    Raises:
        InputError: if an edit does not fit the model and the batch.
    """
    for part in parts_of(intervention):
        if not isinstance(part, Edit):
            continue
        check_layers(part.layer, part.site, model.num_layers, model.name)
        rows = part.positions.shape[-2]
        if rows not in (1, len(prompts)):
            raise InputError(f"the edit is for {rows} prompts, but the batch holds {len(prompts)}.")
        if isinstance(part, VectorEdit) and part.vector.shape[-1] != model.width:
            width = part.vector.shape[-1]
            raise InputError(f"the edit's vector has width {width}, the model's residual stream {model.width}.")
        if not isinstance(part.positions, Tracer):
            by_prompt = np.moveaxis(np.asarray(part.positions), -2, 0).reshape(rows, -1)
            checked_positions(prompts, by_prompt, new_tokens)
