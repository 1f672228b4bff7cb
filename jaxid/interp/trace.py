"""Interventions at full speed: one recorded clean pass, then only what each edit can change.

`trace` records a pass once. `rerun` gives what `forward` would give under an intervention, exactly, but computes only
the tokens from the first edited one on, in the layers from the first edited one on, for all interventions of a sweep
together, against the recorded keys and values of the tokens before.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from jaxid import meshes
from jaxid.errors import InputError
from jaxid.families.base import Model
from jaxid.interp.forward import Output, check, checked_positions, forward, nan_outside
from jaxid.interp.interventions import Replace, as_intervention, check_layers, earliest, replace
from jaxid.interp.programs import Program, program
from jaxid.interp.spreading import by_prompts, dealt, in_order, inputs_of, of_prompts, over_rows, with_model
from jaxid.interp.sweep import Sweep, rows_together
from jaxid.meshes import DATA
from jaxid.nn import passes, placement
from jaxid.nn.inputs import Inputs
from jaxid.nn.layers import take_tokens
from jaxid.nn.network import Network
from jaxid.nn.sites import AnyArray, Clean, Intervention, Reach, SiteFunction, as_integers, clean
from jaxid.nn.views import Memory
from jaxid.prompts.processor import Prompts
from jaxid.reprs import brief


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """One recorded pass: exactly what reruns need.

    Attributes:
        hidden: normed final hidden state at the last position, Float[B, D].
        keys: keys of every layer and token, Float[L, B, K, T, E]. On a mesh whose axis "model" has more devices than
            there are such heads, they are padded: each device keeps a copy of the one that its queries read.
        values: values of every layer and token, of the same shape.
        residuals: residual stream of the tokens after the picture (all tokens if there is none): the embeddings, then
            the output of every layer, Float[L + 1, B, S, D].
        memory: the pictures' keys and values for cross-attention layers, in families that have them.
        model: the model that computed it.
        prompts: its prompts.
        edited: whether the pass was edited.
    """

    hidden: Float[AnyArray, "B D"]
    keys: Float[AnyArray, "L B K T E"]
    values: Float[AnyArray, "L B K T E"]
    residuals: Float[AnyArray, "L1 B S D"]
    memory: Memory | None
    model: Model = dataclasses.field(repr=False)
    prompts: Prompts = dataclasses.field(repr=False, metadata={"static": True})
    edited: bool = dataclasses.field(default=False, metadata={"static": True})

    __repr__ = brief

    @property
    def output(self) -> Output:
        """The clean pass's answers, as `forward` gives them."""
        return Output(hidden=self.hidden, captured={}, model=self.model)

    @property
    def logits(self) -> Float[Array, "B V"]:
        """Next-token logits of the clean pass, float32."""
        return self.output.logits

    def logprobs(self, answers: object) -> Float[Array, "B n"]:
        """Log-probabilities of the clean pass; see `Output.logprobs`."""
        return self.output.logprobs(answers)

    def at(self, positions: object) -> Float[Array, "L1 B P D"]:
        """Residual stream at chosen positions: index 0 the embeddings, k + 1 what leaves layer k.

        Args:
            positions: Int[B, P] or Int[B]; Int[1, P] applies to all prompts.

        Raises:
            InputError: for a position that was not recorded, such as a picture's token; traced ones give NaN.
        """
        wanted = checked_positions(self.prompts, positions)
        start = self.prompts.text_start()[:, None]
        if not isinstance(wanted, Tracer) and (wanted < start).any():
            raise InputError(
                f"position {wanted[wanted < start].flat[0]} is not among the text tokens after the picture that "
                "a trace records; use jaxid.forward with capture=."
            )
        recorded = of_prompts(self.model.mesh, wanted - start, len(start))
        return nan_outside(self.prompts, wanted, _tokens(self.residuals, recorded))


def swap(source: Trace, layer: object, positions: object) -> Replace:
    """Another trace's activations of text in place of a trace's own, after a layer (activation swap).

    Pictures are swapped by `rerun(..., pictures_of=source, after=layer)`.

    Args:
        source: trace of the prompts whose activations are put in, e.g. about mirrored pictures.
        layer: decoder block(s), 0-based; its axes are the sweep.
        positions: Int[B] or Int[B, P], or "text": those of all tokens after the picture.

    Raises:
        InputError: for a layer that the model does not have, or a position that was not recorded.
    """
    layer = as_integers("layer", layer)
    check_layers(layer, "resid_post", source.model.num_layers, source.model.name)
    if isinstance(positions, str):
        if positions != "text":
            raise InputError(
                f'`positions` is "text" or an array of positions, not {positions!r}; pictures are swapped by '
                "jaxid.rerun(..., pictures_of=source, after=layer)."
            )
        positions = source.prompts.text_tokens()
    positions = checked_positions(source.prompts, positions)
    values = source.at(positions)[1:]
    if isinstance(positions, Tracer):  # values that are not there must reach no token, not even of the padding
        positions = jnp.where(positions <= source.prompts.last()[:, None], positions, -1)
    return replace(layer, positions, values[layer])


@program(static_argnums=0)
def _record(
    definition: nnx.GraphDef[Network], parameters: PyTree, inputs: Inputs, suffix: Array, intervention: SiteFunction
) -> passes.Record:
    network = nnx.merge(definition, nnx.State(parameters))
    found = passes.record(
        network.decoder,
        network.embed(inputs),
        inputs.positions,
        network.reads(inputs),
        suffix,
        inputs.last,
        intervention,
        rope_positions=inputs.rope_positions,
        memory=network.memory(inputs),
    )
    return found._replace(hidden=placement.result(found.hidden, (DATA, None)))


@program(static_argnums=0)
def _residuals(definition: nnx.GraphDef[Network], parameters: PyTree, inputs: Inputs, positions: Array) -> Array:
    # Only what is returned is computed: no keys and values are kept, and the last layer runs at these positions alone.
    return _record(definition, parameters, inputs, positions, clean).residuals


def residuals_at(model: Model, prompts: Prompts, positions: object) -> Float[Array, "L1 B P D"]:
    """Residual stream of a clean pass at chosen positions: index 0 the embeddings, k + 1 what leaves layer k.

    Cheaper than `forward` with a capture: the last layer computes these positions only. Positions as in `Trace.at`.

    Raises:
        InputError: for a position that a prompt does not have; traced ones give NaN.
    """
    wanted = checked_positions(prompts, positions)
    inside = wanted.clip(0, prompts.inputs.token_ids.shape[1] - 1)
    inside = of_prompts(model.mesh, inside, len(prompts))
    found = _residuals(model.definition, model.parameters, inputs_of(model, prompts), inside)
    return nan_outside(prompts, wanted, found)


def trace(model: Model, prompts: Prompts, intervention: SiteFunction = clean) -> Trace:
    """Records one pass: its answers, all keys and values, and the residual stream of the text after the picture.

    Memory: 2 L T K E + (L + 1) S D numbers a prompt, in the model's dtype.

    Args:
        model: the model.
        prompts: B prompts.
        intervention: the pass may itself be edited: to be read, written on from, or swapped into another.

    Raises:
        InputError: for an edit that does not fit the model and the batch, or has sweep axes.
    """
    intervention = as_intervention(intervention)
    check(model, prompts, intervention)
    if intervention.sweep_shape:
        raise InputError(f"a trace is of one pass; the intervention has sweep axes {intervention.sweep_shape}.")
    return record(model, prompts, intervention)


def record(model: Model, prompts: Prompts, intervention: SiteFunction = clean) -> Trace:
    """`trace` without its checks: the intervention may act at positions after the prompts."""
    start = prompts.text_start()
    tokens = prompts.inputs.token_ids.shape[1]
    suffix = np.minimum(start[:, None] + np.arange(tokens - start.min()), tokens - 1)
    inputs, suffix = inputs_of(model, prompts), of_prompts(model.mesh, suffix, len(prompts))
    intervention = with_model(model.mesh, intervention)
    record = _record(model.definition, model.parameters, inputs, suffix, intervention)
    return Trace(
        hidden=record.hidden,
        keys=record.keys,
        values=record.values,
        residuals=record.residuals,
        memory=record.memory,
        model=model,
        prompts=prompts,
        edited=not isinstance(intervention, Clean),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The part of a trace that a rerun computes again.

    Attributes:
        first: first position that is computed again in every prompt, Int[B].
        prefix: number of recorded tokens before it, the maximum over the prompts.
        length: number of tokens that are computed again, the maximum over the prompts.
    """

    first: Int[np.ndarray, "B"]
    prefix: int
    length: int


def plan(trace: Trace, position: Int[np.ndarray, "Br"]) -> Plan | None:
    """Where the suffix begins for edits from given positions on; None if they reach what a trace does not record."""
    start, last = trace.prompts.text_start(), trace.prompts.last()
    position = np.broadcast_to(position, start.shape)
    if (position < start).any():
        return None
    first = np.minimum(position, last)
    # Even lengths, so that fewer programs are compiled; the prefix is masked.
    tokens = trace.keys.shape[3]
    length = int((last - first).max()) + 1
    return Plan(first=first, prefix=min(-(-int(first.max()) // 8) * 8, tokens), length=min(length + length % 2, tokens))


def suffix_of(trace: Trace, plan: Plan, other: Trace | None = None, swapped: Array | None = None) -> passes.Suffix:
    """The part of a trace that a plan asks for; with the keys and values of another trace beside its own."""
    mesh, batch = trace.model.mesh, len(trace.prompts)
    positions = plan.first[:, None] + np.arange(plan.length)
    recorded = np.minimum(positions - trace.prompts.text_start()[:, None], trace.residuals.shape[2] - 1)
    within = np.minimum(positions, trace.prompts.offsets.shape[1] - 1)
    turned = trace.prompts.inputs.rope_positions
    turned = None if turned is None else np.take_along_axis(turned, within[:, None], axis=2)
    return passes.Suffix(
        residuals=_tokens(trace.residuals, of_prompts(mesh, recorded, batch)),
        positions=of_prompts(mesh, within, batch),
        rope_positions=of_prompts(mesh, turned, batch),
        last=of_prompts(mesh, trace.prompts.last() - plan.first, batch),
        prefix_keys=trace.keys,
        prefix_values=trace.values,
        prefix_mask=of_prompts(mesh, np.arange(plan.prefix) < plan.first[:, None], batch),
        memory=trace.memory,
        other_memory=None if other is None else other.memory,
        other_keys=None if other is None else other.keys,
        other_values=None if other is None else other.values,
        swapped=swapped,
    )


_tokens = Program(take_tokens)


@program(static_argnames=("definition", "chunk"))
def _resume(
    definition: nnx.GraphDef[Network],
    parameters: PyTree,
    suffix: passes.Suffix,
    edits: PyTree,
    start: Array,
    count: Array,
    *,
    chunk: int,
) -> Array:
    decoder = nnx.merge(definition, nnx.State(parameters)).decoder
    # Padding never joins.
    start = jnp.where(jnp.arange(start.shape[0]) < count, start, decoder.config.num_hidden_layers)
    return placement.result(passes.resume(decoder, suffix, edits, start, chunk=chunk), (DATA, None))


@program(static_argnames=("definition", "chunk"))
def _resume_rows(
    definition: nnx.GraphDef[Network],
    parameters: PyTree,
    suffix: passes.Suffix,
    edits: PyTree,
    start: Array,
    count: Array,
    *,
    chunk: int,
) -> tuple[Array, Array]:
    """`_resume` with its rows sharded over "data"; the results and the order in which they come.

    Devices take the rows one after another in the order of their first layers, so that all have as much to do.
    """

    def run(shared: tuple[PyTree, passes.Suffix], rows: tuple[PyTree, Array, Array | None]) -> Array:
        (parameters, suffix), (edits, start, swapped) = shared, rows
        decoder = nnx.merge(definition, nnx.State(parameters)).decoder
        return passes.resume(decoder, suffix._replace(swapped=swapped), edits, start, chunk=chunk)

    layers = suffix.residuals.shape[0] - 1
    start = jnp.where(jnp.arange(start.shape[0]) < count, start, layers)
    order = dealt(jnp.argsort(start), placement.axis_size(DATA))
    rows = jax.tree.map(lambda leaf: leaf[order], (edits, start, suffix.swapped))
    return over_rows(run, (parameters, suffix._replace(swapped=None)), rows), order


def rerun(
    model: Model,
    trace: Trace,
    intervention: SiteFunction = clean,
    *,
    pictures_of: Trace | None = None,
    after: object = None,
    chunk: int | None = None,
) -> Output:
    """What `forward` gives under an intervention, computed from a recorded pass where the intervention changes it.

    All interventions of a sweep run in one call, whatever their layers, as rows that share each prompt's prefix.
    Exact: equal to the full pass up to rounding. One compiled program serves all layers, positions that begin alike,
    and numbers of rows that share a bucket (see `jaxid.interp.sweep`).

    On a mesh, prompts are sharded over "data"; where they do not divide, a sweep's interventions are. Nothing crosses
    "data" either way, but for the results of interventions, which every device gets at the end.

    An intervention that does not say where it begins to act (a plain function, an edit whose positions are traced), or
    that acts on a picture's tokens or before them, falls back to a full pass. Your own callables can say it in an
    attribute `reach`; see `jaxid.nn.sites.Reach`.

    With `pictures_of`, a row reads another trace's pictures in the layers after one, as if all image tokens were
    swapped there. Image tokens depend only on pictures and on what precedes them, so those layers read the
    other trace's keys and values, and no image token is computed again. Where pictures enter by cross-attention
    (Llama-3.2-Vision), they read the other picture.

    Args:
        model: the model that made the trace.
        trace: the recorded pass.
        intervention: as in `forward`; its sweep axes S lead in the output.
        pictures_of: a trace of prompts that are equal up to the picture's end.
        after: the last layer(s) of every row, 0-based, that still read their own pictures, Int[S...].
        chunk: number of rows that go through a layer together; chosen from their number and lengths by default.

    Returns:
        The output; it captures nothing (use `forward`).

    Raises:
        InputError: for an edit that does not fit the model and the batch, a trace of another model or of an edited
            pass, or pictures that cannot be swapped.
        PromptError: for `pictures_of` prompts without a picture.
    """
    intervention = as_intervention(intervention)
    check_trace(model, trace, intervention)
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be 1 or more, not {chunk}.")
    if (pictures_of is None) != (after is None):
        raise InputError("`pictures_of` and `after` go together: whose pictures, and after which layer.")
    if pictures_of is None and isinstance(intervention, Clean):
        return trace.output
    check(model, trace.prompts, intervention)
    leading, reach, last_own = intervention.sweep_shape, intervention.reach, None
    if pictures_of is not None:
        layers = as_integers("after", after)
        check_pictures(trace, pictures_of, layers)
        if jax.tree.leaves(intervention) and leading != layers.shape:
            raise InputError(
                f"`after` has the sweep axes {list(layers.shape)}, the intervention {list(leading)}; they must agree."
            )
        leading, last_own = layers.shape, layers
        if isinstance(layers, Tracer):  # a layer that does not exist: every layer reads its own picture
            last_own = jnp.where(layers < 0, model.num_layers, jnp.minimum(layers, model.num_layers))
        reach = earliest([reach, Reach(last_own + 1, pictures_of.prompts.text_start())])
    planned = None if reach is None else plan(trace, reach.position)
    if reach is None or planned is None:
        if pictures_of is not None:
            raise InputError("beside `pictures_of`, only edits of text tokens at known positions can be rerun.")
        return forward(model, trace.prompts, intervention)
    mesh, batch = model.mesh, len(trace.prompts)
    parts, shared = meshes.size(mesh, meshes.DATA), by_prompts(mesh, batch)
    sweep = Sweep(leading, 1 if shared else parts)
    tokens = batch * planned.length // (parts if shared else 1)
    start = reach.layer if isinstance(reach.layer, Tracer) else np.asarray(reach.layer)
    start = start.clip(0, model.num_layers).astype(np.int32)  # traced ones may lie outside
    own, other, swapped = trace, None, None
    if pictures_of is not None:
        planned = dataclasses.replace(planned, prefix=min(planned.prefix, pictures_of.keys.shape[3]))
        if isinstance(intervention, Clean):  # then no row reads the trace's own prefix any more
            own = dataclasses.replace(
                trace, keys=pictures_of.keys, values=pictures_of.values, memory=pictures_of.memory
            )
        else:
            other, swapped = pictures_of, sweep.flat(meshes.replicated(mesh, last_own))
    arguments = (
        model.definition,
        model.parameters,
        suffix_of(own, planned, other, swapped),
        sweep.flat(with_model(mesh, intervention)),
        sweep.flat(meshes.replicated(mesh, jnp.broadcast_to(start, leading))),
        meshes.replicated(mesh, np.asarray(sweep.count)),
    )
    chunk = rows_together(sweep.own, tokens) if chunk is None else min(chunk, sweep.own)
    hidden = in_order(*_resume_rows(*arguments, chunk=chunk)) if sweep.parts > 1 else _resume(*arguments, chunk=chunk)
    return Output(hidden=sweep.unflat(hidden), captured={}, model=model)


def check_trace(model: Model, trace: Trace, intervention: Intervention) -> None:
    """Refuses a trace of another model, and edits of a pass that is itself edited.

    A rerun would not apply the trace's own edit.
    """
    _check_model(trace, model)
    if trace.edited and not isinstance(intervention, Clean):
        raise InputError(
            "the trace is of an edited pass; chain its edit and this one, and use a trace of the clean pass."
        )


def _check_model(trace: Trace, model: Model) -> None:
    """Refuses a trace of another model, or of the same model with other parameters."""
    theirs = trace.model
    named = theirs.fingerprint and model.fingerprint
    if theirs.definition != model.definition or (named and theirs.fingerprint != model.fingerprint):
        raise InputError(f"the trace was made by {theirs.name}, not by {model.name} ({model.fingerprint}).")
    arrays = [leaf for leaf in jax.tree.leaves((trace, model.parameters)) if not isinstance(leaf, Tracer)]
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in arrays):
        raise InputError("arrays of the trace or its model have been deleted (donated); trace again.")
    ours, old = jax.tree.flatten(model.parameters), jax.tree.flatten(theirs.parameters)
    pairs = [pair for pair in zip(ours[0], old[0], strict=False) if pair[0] is not pair[1]]
    alike = ours[1] == old[1] and all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    # Traced values cannot be looked at.
    if alike and (any(isinstance(leaf, Tracer) for pair in pairs for leaf in pair) or _equal(pairs)):
        return
    raise InputError(f"the parameters of {model.name} have changed since the trace was made; trace again.")


def _equal(pairs: list[tuple[AnyArray, AnyArray]]) -> bool:
    """Whether pairs of parameters have equal values; only the answer is copied to the host."""
    # Under a user's own jit too; parameters on other devices are moved to one.
    with jax.ensure_compile_time_eval():
        return not pairs or bool(_all_equal([(a, jax.device_put(b, getattr(a, "sharding", None))) for a, b in pairs]))


@jax.jit
def _all_equal(pairs: list[tuple[AnyArray, AnyArray]]) -> Array:
    same = [((a == b) | ((a != a) & (b != b))).all() for a, b in pairs]  # NaN equals NaN
    return jnp.stack(same).all()


def check_pictures(trace: Trace, source: Trace, after: Int[AnyArray, "*S"]) -> None:
    """Refuses pictures that cannot be swapped.

    Keys and values are reused unchanged, so the prompts must be equal up to the end of the picture.
    """
    check_layers(after, "resid_post", source.model.num_layers, source.model.name)
    positions = source.prompts.image_tokens()  # refuses prompts without a picture
    if (np.diff(positions, axis=1) != 1).any():
        raise InputError(
            "the prompts' pictures are not adjacent, and the tokens between them depend on them too: "
            "use jaxid.forward with jaxid.replace at prompts.image_tokens()."
        )
    start = trace.prompts.text_start()
    ours, theirs = trace.prompts.inputs, source.prompts.inputs
    same = np.array_equal(start, source.prompts.text_start())
    for row, end in enumerate(start if same else ()):
        for name in ("token_ids", "positions"):
            same = same and np.array_equal(getattr(ours, name)[row, :end], getattr(theirs, name)[row, :end])
    ours, theirs = trace.model, source.model
    if not same or (ours.definition, ours.fingerprint) != (theirs.definition, theirs.fingerprint):
        raise InputError(
            "`pictures_of` needs a trace of the same model whose prompts are equal up to the picture's end."
        )
    if ours.config.text_config.reads_length and trace.prompts.last().max() != source.prompts.last().max():
        raise InputError(
            "`pictures_of` needs prompts of the same length here: the model's rotary embedding depends on it."
        )
    _check_model(source, ours)
