"""Interventions: pytrees that are called as `(site, value) -> value` at every site of a forward pass.

Layers, positions, vectors and strengths are arrays inside the pytree, so one compiled program serves them all, and
`jax.vmap` over an intervention is a sweep. Constructors take leading sweep axes directly: they are the axes of `layer`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxid.errors import InputError
from jaxid.models.sites import SITES, Intervention, Site

AnyArray = Any
"""On a device (`jax.Array`) or still on the host (`np.ndarray`)."""

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
        layer: decoder block, 0-based, Int[S...]; the sweep axes S come first in every field.
        at: positions in the prompt, Int[S..., B or 1, P]; negative ones match nothing.
        vector: Float[S..., B or 1, P or 1, D].
        strength: Float[S...].
    """

    operation: Operation
    site: str
    layer: Int[AnyArray, "*S"]
    at: Int[AnyArray, "*S Br P"]
    vector: Float[AnyArray, "*S Bv Pv D"]
    strength: Float[AnyArray, "*S"]

    @property
    def sweep_shape(self) -> tuple[int, ...]:
        """Lengths of the leading sweep axes."""
        return tuple(self.layer.shape)

    @property
    def reach(self) -> "Reach | None":
        """What the edit leaves untouched; None where its positions are traced."""
        if isinstance(self.at, Tracer):
            return None
        positions = np.asarray(self.at)
        positions = np.where(positions < 0, NOWHERE, positions)
        first = positions.min(axis=(*range(positions.ndim - 2), positions.ndim - 1), initial=NOWHERE)
        if self.site == "embed":
            return Reach(self.layer * 0, first)
        return Reach(self.layer + int(self.site == "resid_post"), first)

    def __call__(self, site: Site, value: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The value with the edit applied where it acts; untouched at other sites and layers."""
        if site.name != self.site:
            return value
        matches: Bool[Array, "B T P"] = site.positions[:, :, None] == self.at[:, None, :]
        here = matches.any(axis=-1) & (site.layer == self.layer)
        strength = self.strength.astype(value.dtype)
        if self.operation == "scale":
            edited = value * strength
        else:
            vector = self._at_rows(matches).astype(value.dtype)
            if self.operation == "add":
                edited = value + strength * vector
            elif self.operation == "replace":
                edited = value + strength * (vector - value)
            else:
                length = jnp.maximum((vector * vector).sum(axis=-1, keepdims=True), jnp.finfo(value.dtype).tiny)
                along = (value * vector).sum(axis=-1, keepdims=True) / length
                edited = value - strength * along * vector
        return jnp.where(here[..., None], edited, value)

    def _at_rows(self, matches: Bool[Array, "B T P"]) -> Float[Array, "Bv Tv D"]:
        """The vector that belongs to every row of a value."""
        if self.vector.shape[1] == 1:
            return self.vector
        # The first matching position wins, as positions may be filled up by repetition.
        chosen = jnp.argmax(matches, axis=-1)
        return jnp.take_along_axis(
            jnp.broadcast_to(self.vector, (matches.shape[0], *self.vector.shape[1:])),
            chosen[:, :, None],
            axis=1,
        )


jax.tree_util.register_dataclass(
    Edit, data_fields=["layer", "at", "vector", "strength"], meta_fields=["operation", "site"]
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


def as_pytree(intervention: Intervention) -> Any:
    """The intervention itself, or a plain Python function in a pytree without leaves."""
    plain = jax.tree_util.all_leaves([intervention])
    return jax.tree_util.Partial(intervention) if plain else intervention


def chain(*interventions: Intervention) -> Chain:
    """Applies several interventions in order, as optax.chain does; all must have the same sweep axes."""
    combined = Chain(tuple(as_pytree(part) for part in interventions))
    _ = combined.sweep_shape
    return combined


def add(layer: Any, at: Any, vector: Any, scale: Any = 1.0, *, site: str = "resid_post") -> Edit:
    """Adds `scale * vector` (steering).

    Args:
        layer: decoder block(s), 0-based; its axes S are the sweep.
        at: positions, Int[B] or Int[B, P], e.g. `prompts.word("star")`.
        vector: Float[S..., D], Float[S..., B, D] or Float[S..., B, P, D].
        scale: Float[S...] or a number.
        site: which site.

    Raises:
        InputError: for an unknown site or shapes that do not fit.
    """
    return _edit("add", layer, at, vector, scale, site)


def replace(layer: Any, at: Any, vector: Any, strength: Any = 1.0, *, site: str = "resid_post") -> Edit:
    """Puts `vector` in place of the value (activation patching); a strength below 1 goes part of the way.

    Arguments and errors as in `add`.
    """
    return _edit("replace", layer, at, vector, strength, site)


def scale(layer: Any, at: Any, factor: Any, *, site: str = "resid_post") -> Edit:
    """Multiplies the value by `factor`, Float[S...]; 0 ablates it.

    Other arguments and errors as in `add`.
    """
    return _edit("scale", layer, at, None, factor, site)


def project_out(layer: Any, at: Any, vector: Any, strength: Any = 1.0, *, site: str = "resid_post") -> Edit:
    """Removes the value's component along `vector`, which need not have unit length.

    Arguments and errors as in `add`.
    """
    return _edit("project_out", layer, at, vector, strength, site)


def _edit(operation: Operation, layer: Any, at: Any, vector: Any, strength: Any, site: str) -> Edit:
    if site not in SITES:
        raise InputError(f"site {site!r} is not one of {', '.join(SITES)}.")
    # Left on the host where they are known: what a rerun can leave out is decided there, also while tracing.
    layer, at = (value if isinstance(value, Tracer) else np.asarray(value) for value in (layer, at))
    for name, array in (("layer", layer), ("at", at)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise InputError(f"`{name}` must hold integers, not {array.dtype}.")
    # One dtype, and not the weak one of Python numbers: either would compile the forward pass once more.
    layer, at = layer.astype(jnp.int32), at.astype(jnp.int32)
    if at.ndim not in (1, 2):
        raise InputError(
            f"`at` must have shape [B] or [B, P], not {list(at.shape)}; sweep over positions with jax.vmap."
        )
    sweep = layer.shape
    if layer.size == 0:
        raise InputError("the sweep is empty: `layer` names no layers.")
    vector = jnp.zeros((*sweep, 1)) if vector is None else jnp.asarray(vector)
    if not jnp.issubdtype(vector.dtype, jnp.floating):
        vector = vector.astype(jnp.float32)
    strength = jnp.asarray(strength, vector.dtype)
    at = at[:, None] if at.ndim == 1 else at
    inner = vector.ndim - len(sweep)
    if vector.shape[: len(sweep)] != sweep or inner not in (1, 2, 3):
        raise InputError(
            f"`vector` of shape {list(vector.shape)} does not fit: expected [{', '.join(map(str, (*sweep, 'D')))}] "
            "or the same with axes B or B, P before D."
        )
    axes = {1: (-3, -2), 2: (-2,), 3: ()}[inner]
    vector = jnp.expand_dims(vector, axes)
    for axis, name in ((-3, "prompts"), (-2, "positions")):
        size, expected = vector.shape[axis], at.shape[axis + 1]
        if size not in (1, expected):
            raise InputError(f"`vector` is for {size} {name}, but `at` names {expected}.")
    try:
        strength = jnp.broadcast_to(strength, sweep)
    except ValueError as error:
        raise InputError(f"strength of shape {list(strength.shape)} does not fit sweep axes {list(sweep)}.") from error
    return Edit(
        operation=operation,
        site=site,
        layer=layer,
        at=(jnp if isinstance(at, Tracer) else np).broadcast_to(at, (*sweep, *at.shape)),
        vector=vector,
        strength=strength,
    )


def stack(interventions: Sequence[Any]) -> Any:
    """Interventions of the same structure as one, with a new leading sweep axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *interventions)
