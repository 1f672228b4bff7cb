"""Greedy generation under interventions, all rows of a sweep together."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Int, PyTree

from jaxid import meshes
from jaxid.errors import InputError
from jaxid.families.base import Model
from jaxid.interp.forward import Output, check
from jaxid.interp.interventions import as_intervention
from jaxid.interp.programs import program
from jaxid.interp.spreading import of_prompts, with_model
from jaxid.interp.sweep import Sweep, bucket
from jaxid.interp.trace import Trace, check_trace, plan, record, suffix_of
from jaxid.meshes import DATA
from jaxid.nn import passes, placement
from jaxid.nn.network import Network
from jaxid.nn.sites import AnyArray, Clean, SiteFunction, clean
from jaxid.prompts.processor import Prompts
from jaxid.reprs import brief


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Tokens that a model generated; S are the intervention's sweep axes.

    Attributes:
        tokens: new tokens, padded after the stop token, Int[S..., B, N]; on the host unless they are traced.
        lengths: number of new tokens, including the stop token, Int[S..., B].
        first: output from which the first new token is chosen, with its logits and log-probabilities.
    """

    tokens: Int[AnyArray, "*S B N"]
    lengths: Int[AnyArray, "*S B"]
    first: Output

    __repr__ = brief

    @property
    def texts(self) -> np.ndarray:
        """The texts without special tokens, an array of strings [S..., B]."""
        decode_tokens = self.first.model.processor.decode
        texts = np.empty(self.lengths.shape, object)
        for place in np.ndindex(texts.shape):
            texts[place] = decode_tokens(self.tokens[place][: self.lengths[place]].tolist())
        return texts


@program(static_argnames=("definition", "rows"))
def _prefill(
    definition: nnx.GraphDef[Network], parameters: PyTree, suffix: passes.Suffix, edits: PyTree, *, rows: int
) -> passes.Start:
    decoder = nnx.merge(definition, nnx.State(parameters)).decoder
    start = passes.prefill(decoder, suffix, edits, rows)
    return start._replace(hidden=placement.result(start.hidden, (DATA, None)))


@program(static_argnames=("definition", "steps"))
def _decode(
    definition: nnx.GraphDef[Network],
    parameters: PyTree,
    prefix: passes.Shared,
    start: passes.Start,
    last: Array,
    last_rope: Array | None,
    stop_ids: Array,
    edits: PyTree,
    *,
    steps: int,
) -> tuple[Array, Array]:
    decoder = nnx.merge(definition, nnx.State(parameters)).decoder
    tokens, lengths = passes.decode(decoder, prefix, start, last, last_rope, stop_ids, edits, steps=steps)
    return placement.result(tokens, (DATA, None)), placement.result(lengths, (DATA,))


def generate(
    model: Model,
    prompts: Prompts | Trace,
    intervention: SiteFunction = clean,
    *,
    max_new_tokens: int = 250,
    every_step: bool = False,
    chunk: int = 64,
) -> Generation:
    """Generates greedily from every prompt, under every intervention of a sweep.

    Rows share the keys and values of their prompt up to the first edited token, and stop when all have ended. An
    intervention that acts on a picture, or does not say where it begins to act, costs a full pass for every row (see
    `rerun`). On a mesh, prompts are sharded over "data" if their number is a multiple of it; otherwise all
    rows are replicated.

    Args:
        model: the model.
        prompts: B prompts, or their trace.
        intervention: as in `rerun`.
        max_new_tokens: maximum number of new tokens.
        every_step: the intervention acts on the new tokens too, at the positions that follow the prompt
            (from `prompts.last() + 1` on); otherwise only in the pass over the prompt, as published.
        chunk: maximum number of the sweep's rows that are generated together, which bounds the memory.

    Returns:
        The generation.

    Raises:
        InputError: for an edit that does not fit, `max_new_tokens` below 1, or a trace of another model or of an
            edited pass.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be 1 or more, not {max_new_tokens}.")
    if chunk < 1:
        raise InputError(f"chunk must be 1 or more, not {chunk}.")
    intervention = as_intervention(intervention)
    recorded = prompts if isinstance(prompts, Trace) else None
    batch = prompts.prompts if isinstance(prompts, Trace) else prompts
    if recorded is not None:
        check_trace(model, recorded, intervention)
    check(model, batch, intervention, max_new_tokens if every_step else 0)
    intervention, mesh = with_model(model.mesh, intervention), model.mesh
    leading, reach = intervention.sweep_shape, intervention.reach
    if recorded is None and reach is not None:
        recorded = record(model, batch)
    unedited = isinstance(intervention, Clean)
    known = None if unedited or reach is None or recorded is None else plan(recorded, reach.position)
    count = math.prod(leading)
    edits = jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[len(leading) :]), intervention)
    stop_ids = meshes.replicated(mesh, np.array(model.processor.stop_ids, np.int32))
    turned = batch.inputs.rope_positions
    last_rope = None if turned is None else turned[np.arange(len(batch)), :, batch.last()]
    last, last_rope = of_prompts(mesh, (batch.last(), last_rope), len(batch))

    def write(prefix: passes.Shared, start: passes.Start, edits: PyTree) -> tuple[Array, Array, Array]:
        acting = edits if every_step else None
        tokens, lengths = _decode(
            model.definition, model.parameters, prefix, start, last, last_rope, stop_ids, acting, steps=max_new_tokens
        )
        return start.hidden, tokens, lengths

    parts = []
    step = next(size for size in range(chunk, 0, -1) if bucket(size) == size) if known is not None else 1
    for first in range(0, count, step):
        rows = Sweep((min(step, count - first),))
        some = jax.tree.map(lambda leaf, start=first, end=first + rows.count: leaf[start:end], edits)
        if known is not None and recorded is not None:
            some = rows.flat(some)
            start = _prefill(model.definition, model.parameters, suffix_of(recorded, known), some, rows=rows.rows)
            before = np.arange(recorded.keys.shape[3]) < known.first[:, None]
            own, before = of_prompts(mesh, (known.first, before), len(batch))
            shared = passes.Shared(recorded.keys, recorded.values, before, own, recorded.memory)
            parts.append(rows.unflat(write(shared, start, some)))
            continue
        single = jax.tree.map(lambda leaf: leaf[0], some)
        whole = recorded if unedited and recorded is not None else record(model, batch, single)
        blocks, prompts_, kv_heads, tokens, head_width = whole.keys.shape
        none = meshes.replicated(mesh, jnp.zeros((blocks, 1, prompts_, kv_heads, 0, head_width), whole.keys.dtype))
        start = passes.Start(whole.hidden[None], none, none, meshes.replicated(mesh, np.zeros((prompts_, 0), bool)))
        prefix = passes.Shared(whole.keys, whole.values, jnp.arange(tokens) <= last[:, None], last + 1, whole.memory)
        parts.append(write(prefix, start, some))
    hidden, tokens, lengths = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    if not isinstance(tokens, Tracer):
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
    return Generation(
        tokens=tokens.reshape(*leading, *tokens.shape[1:]),
        lengths=lengths.reshape(*leading, *lengths.shape[1:]),
        first=Output(hidden=hidden.reshape(*leading, *hidden.shape[1:]), captured={}, model=model),
    )
