"""Named sites of a forward pass, where values can be read and replaced, and the protocol of interventions there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxid.errors import InputError
from jaxid.io import first_line
from jaxid.nn.inputs import AnyArray
from jaxid.nn.layers import take_tokens

DECODER_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Sites of every decoder block, in the order of computation (TransformerLens' names)."""

SITES = ("embed", *DECODER_SITES)
"""All sites: the decoder's input, with pictures merged in, and those of every block."""

NOWHERE = int(np.iinfo(np.int32).max)
"""The layer and position of an intervention that acts nowhere."""


@dataclass(frozen=True)
class Site:
    """Where in the forward pass a value occurs.

    Attributes:
        name: one of `SITES`.
        layer: index of the decoder block; -1 before the first block. It may be traced.
        positions: position in the prompt of every token of the value.
    """

    name: str
    layer: Int[Array, ""]
    positions: Int[Array, "B T"]


# The name is static, so that edits at other sites add nothing to the program.
jax.tree_util.register_dataclass(Site, data_fields=["layer", "positions"], meta_fields=["name"])

SiteFunction = Callable[[Site, Float[Array, "B T D"]], Float[Array, "B T D"]]
"""Maps the value at a site to the value that the pass continues with. A pass requires no more of an intervention."""


class Reach(NamedTuple):
    """Where an intervention begins to act; everything before that is as in the clean run.

    Attributes:
        layer: the first layer that has to run again: k + 1 if the output of layer k is changed.
        position: the first changed position of every prompt.
    """

    layer: Int[AnyArray, "*S"]
    position: Int[np.ndarray, "Br"]


@runtime_checkable
class Intervention(Protocol):
    """A pytree that is called at every site of a pass, and declares where it acts.

    Any pytree with these three members is an intervention. A plain function or another callable pytree is accepted
    wherever an intervention is: it counts as a single intervention that may act everywhere.
    """

    @property
    def reach(self) -> Reach | None:
        """Where it begins to act, and thus what `rerun` computes; None if that is unknown."""
        ...

    @property
    def sweep_shape(self) -> tuple[int, ...]:
        """Shape of the leading axes over which all its arrays hold one intervention per entry; () for a single one."""
        ...

    def __call__(self, site: Site, value: Float[Array, "B T D"], /) -> Float[Array, "B T D"]:
        """The value that the pass continues with."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clean:
    """The intervention that changes nothing."""

    @property
    def reach(self) -> Reach:
        """Beyond every layer and position."""
        return Reach(np.asarray(NOWHERE), np.array([NOWHERE]))

    @property
    def sweep_shape(self) -> tuple[int, ...]:
        """A single intervention."""
        return ()

    def __call__(self, site: Site, value: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The value itself."""
        del site
        return value


clean = Clean()
"""The intervention that changes nothing."""


@dataclass(frozen=True)
class Capture:
    """What a forward pass returns besides its logits.

    Attributes:
        sites: names of the sites to return, which are static.
        positions: positions to return of each prompt, Int[B, P] or Int[B], or Int[1, P] for all prompts alike; None for
            every position. They count from 0 to the prompt's last token; traced ones out of range give NaN.
    """

    sites: tuple[str, ...] = ()
    positions: AnyArray | None = None

    def take(self, value: Float[Array, "B T D"]) -> Float[Array, "B P D"]:
        """The value's rows at the wanted positions."""
        return value if self.positions is None else take_tokens(value, self.positions)


jax.tree_util.register_dataclass(Capture, data_fields=["positions"], meta_fields=["sites"])


def as_integers(name: str, value: object) -> Int[AnyArray, "..."]:
    """Layers or positions as int32: traced ones remain traced, all others are arrays on the host.

    Raises:
        InputError: for anything but integers, or an integer out of the range of int32.
    """
    # Another dtype, or the weak type of Python numbers, would compile the forward pass once more.
    if isinstance(value, Tracer):
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise InputError(f"`{name}` must hold integers, not {value.dtype}.")
        return value.astype(jnp.int32)
    try:
        array = np.asarray(value)
    except Exception as problem:  # ragged lists, tensors of other libraries on other devices
        raise InputError(f"`{name}` cannot be read as an array of integers: {first_line(problem)}.") from problem
    if array.dtype.kind not in "iu":
        raise InputError(f"`{name}` must hold integers, not {array.dtype}.")
    limits = np.iinfo(np.int32)
    if array.size and not limits.min <= int(array.min()) <= int(array.max()) <= limits.max:
        raise InputError(f"`{name}` holds {array.min()} to {array.max()}, which is out of range.")
    return array.astype(np.int32)


def as_positions(positions: AnyArray) -> Int[AnyArray, "Br P"]:
    """Positions of shape [B] or [B, P], as [B, P].

    Raises:
        InputError: for anything but integers, another shape, an empty array, or a negative position that is not traced.
    """
    positions = as_integers("positions", positions)
    if positions.ndim not in (1, 2):
        raise InputError(
            f"`positions` must have shape [B] or [B, P], not {list(positions.shape)}; sweep over them with jax.vmap."
        )
    if not positions.size:
        raise InputError(f"`positions` of shape {list(positions.shape)} names no positions.")
    if not isinstance(positions, Tracer) and positions.min() < 0:
        raise InputError(
            f"position {positions.min()} is negative: positions count from 0; "
            "the prompt's last token is prompts.last()."
        )
    return positions[:, None] if positions.ndim == 1 else positions
