"""The library's interventions: additions, replacements, scalings and projections, single, swept or chained.

Layers, positions, vectors and strengths are arrays inside the pytree, so one compiled program serves them all, and
`jax.vmap` over an intervention is a sweep. Constructors take leading sweep axes directly: they are the axes of `layer`.
"""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxid.checks import check_finite
from jaxid.errors import InputError
from jaxid.io import first_line
from jaxid.nn.sites import (
    NOWHERE,
    SITES,
    AnyArray,
    Clean,
    Intervention,
    Reach,
    Site,
    SiteFunction,
    as_integers,
    as_positions,
    clean,
)
from jaxid.reprs import brief

Value = Float[Array, "B T D"]
Matches = Bool[Array, "B T P"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit(ABC):
    """A change of the values at a site, in one layer, at chosen positions.

    Attributes:
        site: name of the site.
        layer: decoder block, 0-based, Int[S...], or -1 at the site "embed"; the sweep axes S come first in every
            array. A traced layer or position that does not exist changes nothing.
        positions: in the prompt, Int[S..., B or 1, P].
        strength: Float[S...].
    """

    site: str = dataclasses.field(metadata={"static": True})
    layer: Int[AnyArray, "*S"]
    positions: Int[AnyArray, "*S Br P"]
    strength: Float[AnyArray, "*S"]

    @property
    def sweep_shape(self) -> tuple[int, ...]:
        """Lengths of the leading sweep axes."""
        return tuple(self.layer.shape)

    @property
    def reach(self) -> Reach | None:
        """What the edit leaves untouched; None where its positions are traced."""
        if isinstance(self.positions, Tracer):
            return None
        positions = np.asarray(self.positions)
        first = positions.min(axis=(*range(positions.ndim - 2), positions.ndim - 1), initial=NOWHERE)
        if self.site == "embed":
            return Reach(self.layer * 0, first)
        return Reach(self.layer + int(self.site == "resid_post"), first)

    def __call__(self, site: Site, value: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The value with the edit applied where it acts; untouched at other sites and layers."""
        if site.name != self.site:
            return value
        matches: Matches = site.positions[:, :, None] == self.positions[:, None, :]
        here = matches.any(axis=-1) & (site.layer == self.layer)
        # In float32, rounded once: products overflow in float16 where their sum does not.
        wide = _wide(value.dtype)
        edited = self.edited(value.astype(wide), self.strength.astype(wide), matches)
        return jnp.where(here[..., None], edited.astype(value.dtype), value)

    @abstractmethod
    def edited(self, value: Value, strength: Float[Array, ""], matches: Matches) -> Value:
        """Every row of a value edited; `matches` says which of the positions a row has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorEdit(Edit):
    """An edit by a vector, for all prompts or each, for all positions or each.

    Attributes:
        vector: Float[S..., B or 1, P or 1, D].
    """

    vector: Float[AnyArray, "*S Bv Pv D"]

    def rows(self, matches: Matches, like: Value) -> Float[Array, "Bv Tv D"]:
        """The vector that belongs to every row of a value, in its dtype."""
        vector = self.vector
        if vector.shape[1] > 1:
            # The first matching position wins, as rows may be padded by repetition.
            chosen = jnp.argmax(matches, axis=-1)
            vector = jnp.broadcast_to(vector, (matches.shape[0], *vector.shape[1:]))
            vector = jnp.take_along_axis(vector, chosen[:, :, None], axis=1)
        return vector.astype(like.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Add(VectorEdit):
    """Adds `strength * vector`."""

    __repr__ = brief

    def edited(self, value: Value, strength: Float[Array, ""], matches: Matches) -> Value:
        """The sum."""
        return value + strength * self.rows(matches, value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Replace(VectorEdit):
    """Interpolates from the value (strength 0) to `vector` (strength 1)."""

    __repr__ = brief

    def edited(self, value: Value, strength: Float[Array, ""], matches: Matches) -> Value:
        """The mixture."""
        return (1 - strength) * value + strength * self.rows(matches, value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectOut(VectorEdit):
    """Subtracts `strength` times the value's component along `vector`."""

    __repr__ = brief

    def edited(self, value: Value, strength: Float[Array, ""], matches: Matches) -> Value:
        """The remainder."""
        vector = self.rows(matches, value)
        # Divided by its largest entry first, so that no square overflows or vanishes.
        largest = jax.lax.stop_gradient(jnp.abs(vector).max(axis=-1, keepdims=True))
        vector = vector / jnp.where(largest > 0, largest, 1)
        squares = jnp.where(largest > 0, (vector * vector).sum(axis=-1, keepdims=True), 1)
        return value - strength * ((value * vector).sum(axis=-1, keepdims=True) / squares) * vector


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale(Edit):
    """Multiplies the value by `strength`."""

    __repr__ = brief

    def edited(self, value: Value, strength: Float[Array, ""], matches: Matches) -> Value:
        """The product."""
        del matches
        return value * strength


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """Interventions applied in order at every site."""

    parts: tuple[Any, ...]  # interventions; typed so, their `reach` would be asked for while tracing

    @property
    def sweep_shape(self) -> tuple[int, ...]:
        """Lengths of the leading sweep axes, which all parts share."""
        shapes = {part.sweep_shape for part in self.parts if jax.tree.leaves(part)}
        if len(shapes) > 1:
            raise InputError(f"the parts of a chain have different sweep axes: {sorted(shapes)}; give all the same.")
        return shapes.pop() if shapes else ()

    @property
    def reach(self) -> Reach | None:
        """What all parts leave untouched; None where one of them does not say."""
        return earliest(part.reach for part in self.parts)

    def __call__(self, site: Site, value: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies all parts in order."""
        for part in self.parts:
            value = part(site, value)
        return value


def earliest(reaches: Iterable[Reach | None]) -> Reach | None:
    """Where the first of several interventions begins to act; None where one of them does not say."""
    found = [clean.reach]
    for reach in reaches:
        if reach is None:
            return None
        found.append(reach)
    traced = any(isinstance(reach.layer, Tracer) for reach in found)
    return Reach(
        functools.reduce(jnp.minimum if traced else np.minimum, (reach.layer for reach in found)),
        functools.reduce(np.minimum, (reach.position for reach in found)),
    )


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A function, or a callable pytree, of the user as an intervention.

    Attributes:
        function: the function. Its attributes `reach` and `sweep_shape`, if any, are those of the intervention.
    """

    function: SiteFunction

    @property
    def reach(self) -> Reach | None:
        """The function's attribute; None if it has none."""
        return getattr(self.function, "reach", None)

    @property
    def sweep_shape(self) -> tuple[int, ...]:
        """The function's attribute; that of a single intervention if it has none."""
        return getattr(self.function, "sweep_shape", ())

    def __call__(self, site: Site, value: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Calls the function."""
        return self.function(site, value)

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], SiteFunction | None]:
        """The function's arrays, or the function itself as static."""
        plain = jax.tree_util.all_leaves([self.function])
        return ((), self.function) if plain else ((self.function,), None)

    @classmethod
    def tree_unflatten(cls, function: SiteFunction | None, arrays: tuple[PyTree, ...]) -> "Wrapped":
        """The inverse of `tree_flatten`."""
        return cls(*arrays) if function is None else cls(function)


def as_intervention(intervention: Any) -> Intervention:
    """The intervention itself; any other callable is wrapped.

    Raises:
        InputError: if it cannot be called.
    """
    if isinstance(intervention, Edit | Chain | Clean | Wrapped):
        return intervention
    function: SiteFunction = intervention
    if not callable(function):
        raise InputError(
            f"an intervention is called as (site, value) -> value; {intervention!r:.100} cannot be called."
        )
    return Wrapped(function)


def parts_of(intervention: Intervention) -> Iterator[Intervention]:
    """The intervention, or all parts of a chain, in order."""
    if not isinstance(intervention, Chain):
        yield intervention
        return
    for part in intervention.parts:
        yield from parts_of(part)


def chain(*interventions: SiteFunction) -> Chain:
    """Applies several interventions in order, as optax.chain does; all must have the same sweep axes."""
    combined = Chain(tuple(as_intervention(part) for part in interventions))
    _ = combined.sweep_shape
    return combined


EditType = TypeVar("EditType", bound=Edit)


def add(layer: object, positions: object, vector: object, strength: object = 1.0, *, site: str = "resid_post") -> Add:
    """Adds `strength * vector` (steering).

    Args:
        layer: decoder block(s), 0-based; its axes S are the sweep.
        positions: Int[B] or Int[B, P], e.g. `prompts.word("star")`.
        vector: Float[S..., D], Float[S..., B, D] or Float[S..., B, P, D].
        strength: Float[S...] or a number.
        site: name of the site.

    Raises:
        InputError: for an unknown site or shapes that do not fit.
    """
    return _edit(Add, layer, positions, strength, site, vector=vector)


def replace(
    layer: object, positions: object, vector: object, strength: object = 1.0, *, site: str = "resid_post"
) -> Replace:
    """Replaces the value by `vector` (activation patching); a strength below 1 interpolates.

    Arguments and errors as in `add`.
    """
    return _edit(Replace, layer, positions, strength, site, vector=vector)


def scale(layer: object, positions: object, strength: object, *, site: str = "resid_post") -> Scale:
    """Multiplies the value by `strength`, Float[S...]; 0 ablates it.

    Other arguments and errors as in `add`.
    """
    return _edit(Scale, layer, positions, strength, site)


def project_out(
    layer: object, positions: object, vector: object, strength: object = 1.0, *, site: str = "resid_post"
) -> ProjectOut:
    """Removes the value's component along `vector`, which need not have unit length.

    Arguments and errors as in `add`.
    """
    return _edit(ProjectOut, layer, positions, strength, site, vector=vector)


def _edit(
    kind: type[EditType], layer: object, positions: object, strength: object, site: str, **vector: object
) -> EditType:
    """An edit of that kind from what its constructor was given, with its `vector` if it has one."""
    if site not in SITES:
        raise InputError(f"site {site!r} is not one of {', '.join(SITES)}.")
    # Concrete ones stay on the host, where it is decided what a rerun can skip, even while tracing.
    layers, places = as_integers("layer", layer), as_positions(positions)
    sweep = layers.shape
    if layers.size == 0:
        raise InputError("the sweep is empty: `layer` names no layers.")
    vectors = {name: _vector(value, sweep, places) for name, value in vector.items()}
    strengths = _numbers("strength", strength)
    strengths = strengths.astype(_wide(vectors["vector"].dtype if vectors else np.dtype(np.float32)))
    try:
        strengths = jnp.broadcast_to(strengths, sweep)
    except ValueError as error:
        raise InputError(f"strength of shape {list(strengths.shape)} does not fit sweep axes {list(sweep)}.") from error
    places = (jnp if isinstance(places, Tracer) else np).broadcast_to(places, (*sweep, *places.shape))
    return kind(site=site, layer=layers, positions=places, strength=strengths, **vectors)


def _vector(value: object, sweep: tuple[int, ...], positions: Int[AnyArray, "Br P"]) -> Float[Array, "*S Bv Pv D"]:
    """A vector with all its axes, of length 1 where it is the same for all prompts or positions."""
    vector = _numbers("vector", value)
    inner = vector.ndim - len(sweep)
    if vector.shape[: len(sweep)] != sweep or inner not in (1, 2, 3):
        raise InputError(
            f"`vector` of shape {list(vector.shape)} does not fit: expected [{', '.join(map(str, (*sweep, 'D')))}] "
            "or the same with axes B or B, P before D."
        )
    vector = jnp.expand_dims(vector, {1: (-3, -2), 2: (-2,), 3: ()}[inner])
    for axis, name in ((-3, "prompts"), (-2, "positions")):
        size, expected = vector.shape[axis], positions.shape[axis + 1]
        if size not in (1, expected):
            raise InputError(f"`vector` is for {size} {name}, but `positions` names {expected}.")
    return vector


def check_layers(layer: Int[AnyArray, "..."], site: str, layers: int, where: str) -> None:
    """Refuses layers that a site does not have; traced ones pass, and change nothing.

    Args:
        layer: the layers.
        site: the site.
        layers: the model's number of layers.
        where: the model's name.

    Raises:
        InputError: for a layer out of range; the message says which layers exist.
    """
    if isinstance(layer, Tracer):
        return
    layer = np.asarray(layer)
    lowest, highest = (-1, -1) if site == "embed" else (0, layers - 1)
    wrong = layer[(layer < lowest) | (layer > highest)]
    if wrong.size:
        known = f"{where} has layers 0..{highest}, the last is model.num_layers - 1"
        if site == "embed":
            known = "the embedding is layer -1"
        raise InputError(f"layer {wrong.flat[0]} is out of range for site {site!r}: {known}.")


def _wide(dtype: np.dtype) -> np.dtype:
    """The dtype in which values of a floating-point dtype are computed: float32, or their own if it is wider."""
    return dtype if jnp.finfo(dtype).bits > 32 else np.dtype(np.float32)


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


def stack(interventions: object) -> Intervention:
    """Stacks interventions that differ only in the values of their arrays along a new leading sweep axis.

    Raises:
        InputError: if there are none, or they differ in more: operation, site, shapes, sweep axes; or if one holds no
            arrays.
    """
    every = [as_intervention(one) for one in interventions] if isinstance(interventions, Iterable) else []
    if not every:
        raise InputError("stack takes a list of one or more interventions.")
    for index, one in enumerate(every):
        if not jax.tree.leaves(one):
            raise InputError(f"intervention {index} of the stack holds no arrays, so it has no sweep axes to stack.")
        ours, theirs = _outline(every[0]), _outline(one)
        if ours != theirs:
            raise InputError(
                f"only interventions of the same kind and shapes can be stacked: that of index 0 is {ours}, that of "
                f"index {index} is {theirs}."
            )
        if jax.tree.structure(one) != jax.tree.structure(every[0]):
            raise InputError(f"intervention {index} of the stack has another function or structure than the first.")

    def join(*leaves: AnyArray) -> AnyArray:
        known = all(isinstance(leaf, np.ndarray) for leaf in leaves)  # stays on the host, as constructors leave it
        return (np if known else jnp).stack(leaves)

    return jax.tree.map(join, *every)


def _outline(intervention: Intervention) -> str:
    """An intervention's kinds and shapes, in words."""
    if isinstance(intervention, Chain):
        return f"chain({', '.join(_outline(part) for part in intervention.parts)})"
    shapes = ", ".join(str(list(jnp.shape(leaf))) for leaf in jax.tree.leaves(intervention))
    kind = type(intervention.function if isinstance(intervention, Wrapped) else intervention).__name__
    if isinstance(intervention, Edit):
        names = "layer, positions, strength" + ", vector" * isinstance(intervention, VectorEdit)
        return f"{kind} at {intervention.site} ({names} of shapes {shapes})"
    return f"{kind} ({shapes or 'no arrays'})"
