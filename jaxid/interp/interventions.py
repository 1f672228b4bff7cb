"""Interventions: pytrees that are called as `(site, value) -> value` at every site of a forward pass.

Layers, positions, vectors and strengths are arrays inside the pytree, so one compiled program serves them all, and
`jax.vmap` over an intervention is a sweep. Constructors take leading sweep axes directly: they are the axes of `layer`.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxid.checks import check_finite
from jaxid.errors import InputError
from jaxid.io import first_line
from jaxid.nn.sites import SITES, AnyArray, Intervention, Site, as_integers, as_positions

Operation = Literal["add", "replace", "scale", "project_out"]


NOWHERE = int(np.iinfo(np.int32).max)
"""The position of an edit that acts nowhere."""


class Reach(NamedTuple):
    """Where an intervention begins to act; all before it is as in the clean run.

    An intervention of your own that has an attribute `reach` is run again from there only, see `jaxid.rerun`.

    Attributes:
        block: the first block that has to run again, Int[S...]: k + 1 for a change of what leaves block k.
        position: the first changed place of every prompt, Int[B or 1].
    """

    block: Int[AnyArray, "*S"]
    position: Int[np.ndarray, "Br"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit of the values at a site, in one layer, at chosen positions.

    Attributes:
        operation: what is done with `vector` and `strength`.
        site: name of the site.
        layer: decoder block, 0-based, Int[S...], or -1 at the site "embed"; the sweep axes S come first in every
            field. A traced layer or position that does not exist changes nothing.
        positions: in the prompt, Int[S..., B or 1, P].
        vector: Float[S..., B or 1, P or 1, D].
        strength: Float[S...].
    """

    operation: Operation
    site: str
    layer: Int[AnyArray, "*S"]
    positions: Int[AnyArray, "*S Br P"]
    vector: Float[AnyArray, "*S Bv Pv D"]
    strength: Float[AnyArray, "*S"]

    @property
    def sweep_shape(self) -> tuple[int, ...]:
        """Lengths of the leading sweep axes."""
        return tuple(self.layer.shape)

    @property
    def reach(self) -> "Reach | None":
        """What the edit leaves untouched; None where its positions are traced."""
        if isinstance(self.positions, Tracer):
            return None
        places = np.asarray(self.positions)
        first = places.min(axis=(*range(places.ndim - 2), places.ndim - 1), initial=NOWHERE)
        if self.site == "embed":
            return Reach(self.layer * 0, first)
        return Reach(self.layer + int(self.site == "resid_post"), first)

    def __call__(self, site: Site, value: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The value with the edit applied where it acts; untouched at other sites and layers."""
        if site.name != self.site:
            return value
        matches: Bool[Array, "B T P"] = site.positions[:, :, None] == self.positions[:, None, :]
        here = matches.any(axis=-1) & (site.layer == self.layer)
        # In float32, rounded once: products overflow in float16 where their sum does not.
        wide = _wide(value.dtype)
        exact, strength = value.astype(wide), self.strength.astype(wide)
        if self.operation == "scale":
            edited = exact * strength
        else:
            vector = self._at_rows(matches).astype(wide)
            if self.operation == "add":
                edited = exact + strength * vector
            elif self.operation == "replace":
                edited = (1 - strength) * exact + strength * vector
            else:
                # Divided by its largest entry first, so that no square overflows or vanishes.
                largest = jax.lax.stop_gradient(jnp.abs(vector).max(axis=-1, keepdims=True))
                vector = vector / jnp.where(largest > 0, largest, 1)
                squares = jnp.where(largest > 0, (vector * vector).sum(axis=-1, keepdims=True), 1)
                edited = exact - strength * ((exact * vector).sum(axis=-1, keepdims=True) / squares) * vector
        edited = edited.astype(value.dtype)
        return jnp.where(here[..., None], edited, value)

    def _at_rows(self, matches: Bool[Array, "B T P"]) -> Float[Array, "Bv Tv D"]:
        """The vector that belongs to every row of a value."""
        if self.vector.shape[1] == 1:
            return self.vector
        # The first matching position wins, as rows may be padded by repetition.
        chosen = jnp.argmax(matches, axis=-1)
        return jnp.take_along_axis(
            jnp.broadcast_to(self.vector, (matches.shape[0], *self.vector.shape[1:])),
            chosen[:, :, None],
            axis=1,
        )


jax.tree_util.register_dataclass(
    Edit, data_fields=["layer", "positions", "vector", "strength"], meta_fields=["operation", "site"]
)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Interventions applied one after the other at every site."""

    parts: tuple[Any, ...]

    @property
    def sweep_shape(self) -> tuple[int, ...]:
        """Lengths of the leading sweep axes, which all parts share."""
        shapes = {sweep_shape(part) for part in self.parts if jax.tree.leaves(part)}
        if len(shapes) > 1:
            raise InputError(f"the parts of a chain have different sweep axes: {sorted(shapes)}; give all the same.")
        return shapes.pop() if shapes else ()

    @property
    def reach(self) -> Reach | None:
        """What all parts leave untouched; None where one of them does not say."""
        if not self.parts:
            return Reach(np.asarray(NOWHERE), np.array([NOWHERE]))
        found = [getattr(part, "reach", None) for part in self.parts]
        known = [reach for reach in found if reach is not None]
        if not known or len(known) < len(found):
            return None
        return Reach(
            functools.reduce(jnp.minimum if _traced(known) else np.minimum, (reach.block for reach in known)),
            functools.reduce(np.minimum, (reach.position for reach in known)),
        )

    def __call__(self, site: Site, value: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies all parts in order."""
        for part in self.parts:
            value = part(site, value)
        return value


jax.tree_util.register_dataclass(Chain, data_fields=["parts"], meta_fields=[])


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def sweep_shape(intervention: Any) -> tuple[int, ...]:
    """Leading sweep axes of an intervention; () for a plain callable."""
    return getattr(intervention, "sweep_shape", ())


def as_pytree(intervention: Any) -> Any:
    """The intervention itself, or a plain Python function in a pytree without leaves.

    Raises:
        InputError: if it cannot be called.
    """
    if not callable(intervention):
        raise InputError(
            f"an intervention is called as (site, value) -> value; {intervention!r:.100} cannot be called."
        )
    plain = jax.tree_util.all_leaves([intervention])
    return jax.tree_util.Partial(intervention) if plain else intervention


def chain(*interventions: Intervention) -> Chain:
    """Applies several interventions in order, as optax.chain does; all must have the same sweep axes."""
    combined = Chain(tuple(as_pytree(part) for part in interventions))
    _ = combined.sweep_shape
    return combined


def add(layer: Any, positions: Any, vector: Any, strength: Any = 1.0, *, site: str = "resid_post") -> Edit:
    """Adds `strength * vector` (steering).

    Args:
        layer: decoder block(s), 0-based; its axes S are the sweep.
        positions: Int[B] or Int[B, P], e.g. `prompts.word("star")`.
        vector: Float[S..., D], Float[S..., B, D] or Float[S..., B, P, D].
        strength: Float[S...] or a number.
        site: which site.

    Raises:
        InputError: for an unknown site or shapes that do not fit.
    """
    return _edit("add", layer, positions, vector, strength, site)


def replace(layer: Any, positions: Any, vector: Any, strength: Any = 1.0, *, site: str = "resid_post") -> Edit:
    """Puts `vector` in place of the value (activation patching); a strength below 1 goes part of the way.

    Arguments and errors as in `add`.
    """
    return _edit("replace", layer, positions, vector, strength, site)


def scale(layer: Any, positions: Any, strength: Any, *, site: str = "resid_post") -> Edit:
    """Multiplies the value by `strength`, Float[S...]; 0 ablates it.

    Other arguments and errors as in `add`.
    """
    return _edit("scale", layer, positions, None, strength, site)


def project_out(layer: Any, positions: Any, vector: Any, strength: Any = 1.0, *, site: str = "resid_post") -> Edit:
    """Removes the value's component along `vector`, which need not have unit length.

    Arguments and errors as in `add`.
    """
    return _edit("project_out", layer, positions, vector, strength, site)


def _edit(operation: Operation, layer: Any, positions: Any, vector: Any, strength: Any, site: str) -> Edit:
    if site not in SITES:
        raise InputError(f"site {site!r} is not one of {', '.join(SITES)}.")
    # Left on the host where they are known: what a rerun can leave out is decided there, also while tracing.
    layer, positions = as_integers("layer", layer), as_positions(positions)
    sweep = layer.shape
    if layer.size == 0:
        raise InputError("the sweep is empty: `layer` names no layers.")
    vector = jnp.zeros((*sweep, 1)) if operation == "scale" else _numbers("vector", vector)
    strength = _numbers("strength", strength).astype(_wide(vector.dtype))
    inner = vector.ndim - len(sweep)
    if vector.shape[: len(sweep)] != sweep or inner not in (1, 2, 3):
        raise InputError(
            f"`vector` of shape {list(vector.shape)} does not fit: expected [{', '.join(map(str, (*sweep, 'D')))}] "
            "or the same with axes B or B, P before D."
        )
    axes = {1: (-3, -2), 2: (-2,), 3: ()}[inner]
    vector = jnp.expand_dims(vector, axes)
    for axis, name in ((-3, "prompts"), (-2, "positions")):
        size, expected = vector.shape[axis], positions.shape[axis + 1]
        if size not in (1, expected):
            raise InputError(f"`vector` is for {size} {name}, but `positions` names {expected}.")
    try:
        strength = jnp.broadcast_to(strength, sweep)
    except ValueError as error:
        raise InputError(f"strength of shape {list(strength.shape)} does not fit sweep axes {list(sweep)}.") from error
    return Edit(
        operation=operation,
        site=site,
        layer=layer,
        positions=(jnp if isinstance(positions, Tracer) else np).broadcast_to(positions, (*sweep, *positions.shape)),
        vector=vector,
        strength=strength,
    )


def check_layers(layer: Int[AnyArray, "..."], site: str, layers: int, where: str) -> None:
    """Refuses layers that a site does not have; traced ones pass, and change nothing.

    Args:
        layer: the layers.
        site: the site.
        layers: number of the model's blocks.
        where: the model's name.

    Raises:
        InputError: naming the layer, and what to write instead.
    """
    if isinstance(layer, Tracer):
        return
    layer = np.asarray(layer)
    lowest, highest = (-1, -1) if site == "embed" else (0, layers - 1)
    wrong = layer[(layer < lowest) | (layer > highest)]
    if wrong.size:
        blocks = f"{where} has blocks 0..{highest}, the last is model.num_layers - 1"
        known = "the embedding is layer -1" if site == "embed" else blocks
        raise InputError(f"layer {wrong.flat[0]} is out of range for site {site!r}: {known}.")


def _wide(dtype: Any) -> Any:
    """What values of a floating kind are computed in: float32, or their own kind if that is wider."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def _numbers(name: str, value: Any) -> Float[Array, "..."]:
    """A vector or strength as floating-point numbers of its own kind, float32 if it has none.

    Raises:
        InputError: for anything but finite real numbers.
    """
    try:
        if type(value).__module__.partition(".")[0] == "torch" and not value.is_complex():
            value = value.detach().cpu().float()  # NumPy knows neither its bfloat16 nor its gradients
        if not isinstance(value, jax.Array):
            traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))
            value = jnp.asarray(value) if traced else np.asarray(value)
    except Exception as problem:  # ragged lists, tensors without values
        raise InputError(f"`{name}` cannot be read as an array of numbers: {first_line(problem)}.") from problem
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    if not floating and not jnp.issubdtype(value.dtype, jnp.integer):
        raise InputError(f"`{name}` must hold real numbers, not {value.dtype}.")
    with np.errstate(over="ignore"):  # what float32 does not hold is refused as infinite
        value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype) if floating else jnp.float32)
    finite = isinstance(value, Tracer)
    if isinstance(value, jax.Array) and not finite:
        with jax.ensure_compile_time_eval():  # one number to the host, also within a traced function
            finite = bool(jnp.isfinite(value).all())
    if not finite:
        check_finite(f"`{name}`", value)
    return jnp.asarray(value)


def stack(interventions: Any) -> Any:
    """Interventions that differ in the values of their arrays alone, as one with a new leading sweep axis.

    Raises:
        InputError: if there are none, or they differ in more: operation, site, shapes, sweep axes; or if one holds no
            arrays, or a trace.
    """
    every = [as_pytree(one) for one in interventions] if isinstance(interventions, Iterable) else []
    if not every:
        raise InputError("stack takes a list of one or more interventions.")
    for number, one in enumerate(every):
        if any(hasattr(part, "refusal") for part in _parts(one)):
            raise InputError("an image swap cannot be stacked: give jaxid.swap all layers at once.")
        if not jax.tree.leaves(one):
            raise InputError(f"intervention {number} of the stack holds no arrays, so it has no sweep axes to stack.")
        ours, theirs = _outline(every[0]), _outline(one)
        if ours != theirs:
            raise InputError(
                f"only interventions of the same kind and shapes can be stacked: the first is {ours}, number {number} "
                f"(from 0) is {theirs}."
            )
        if jax.tree.structure(one) != jax.tree.structure(every[0]):
            raise InputError(f"intervention {number} of the stack has another function or structure than the first.")

    def join(*leaves: Any) -> Any:
        known = all(isinstance(leaf, np.ndarray) for leaf in leaves)  # stays on the host, as constructors leave it
        return (np if known else jnp).stack(leaves)

    return jax.tree.map(join, *every)


def _parts(intervention: Any) -> list[Any]:
    """The intervention, or all parts of a chain."""
    if not isinstance(intervention, Chain):
        return [intervention]
    return [inner for part in intervention.parts for inner in _parts(part)]


def _outline(intervention: Any) -> str:
    """An intervention's kinds and shapes, in words."""
    if isinstance(intervention, Chain):
        return f"chain({', '.join(_outline(part) for part in intervention.parts)})"
    shapes = ", ".join(str(list(jnp.shape(leaf))) for leaf in jax.tree.leaves(intervention))
    if isinstance(intervention, Edit):
        return f"{intervention.operation} at {intervention.site} (layer, positions, vector, strength: {shapes})"
    return f"{type(intervention).__name__} ({shapes or 'no arrays'})"
