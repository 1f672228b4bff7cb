"""Named places in a forward pass, where values can be read and replaced, and what an intervention there is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxid.errors import InputError
from jaxid.io import first_line
from jaxid.nn.layers import take_tokens

AnyArray = Any
"""On a device (`jax.Array`) or still on the host (`np.ndarray`)."""

DECODER_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Sites of every decoder block, in the order of computation (TransformerLens' names)."""

SITES = ("embed", *DECODER_SITES)
"""All sites: the decoder's input, pictures merged in, and those of every block."""

NOWHERE = int(np.iinfo(np.int32).max)
"""The layer and position of an intervention that acts nowhere."""


@dataclass(frozen=True)
class Site:
    """Where in the forward pass a value stands.

    Attributes:
        name: one of `SITES`.
        layer: the decoder block, 0-based; -1 before the first block. A traced scalar.
        positions: place in the prompt of every row of the value, Int[B, T].
    """

    name: str
    layer: Int[Array, ""]
    positions: Int[Array, "B T"]


# The name is static: it decides while tracing which edits touch the value at all.
jax.tree_util.register_dataclass(Site, data_fields=["layer", "positions"], meta_fields=["name"])

SiteFunction = Callable[[Site, Float[Array, "B T D"]], Float[Array, "B T D"]]
"""Maps the value at a site to the value that the pass continues with. All that a pass asks of an intervention."""


class Reach(NamedTuple):
    """Where an intervention begins to act; all before it is as in the clean run.

    Attributes:
        layer: the first one that has to run again, Int[S...]: k + 1 for a change of what leaves layer k.
        position: the first changed position of every prompt, Int[B or 1].
    """

    layer: Int[AnyArray, "*S"]
    position: Int[np.ndarray, "Br"]


@runtime_checkable
class Intervention(Protocol):
    """A pytree that is called at every site of a pass, and says what it leaves untouched.

    Whatever has these three members is one. A plain function or another callable pytree may be given wherever an
    intervention is asked for: it counts as a single one that may act everywhere.
    """

    @property
    def reach(self) -> Reach | None:
        """Where it begins to act, which is all that `rerun` computes; None if it does not say."""
        ...

    @property
    def sweep_shape(self) -> tuple[int, ...]:
        """Lengths of the leading axes that all its arrays share, one intervention an entry; () for a single one."""
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
        """Nothing is changed."""
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
        sites: names of the sites to return, static.
        positions: to return per prompt, Int[B, P] or Int[B]; Int[1, P] stands for all prompts. None returns every
            position. They count from 0 and end with the prompt's last token; traced ones out of range give NaN.
    """

    sites: tuple[str, ...] = ()
    positions: Any = None

    def take(self, value: Float[Array, "B T D"]) -> Float[Array, "B P D"]:
        """The value's rows at the wanted positions."""
        return value if self.positions is None else take_tokens(value, self.positions)


jax.tree_util.register_dataclass(Capture, data_fields=["positions"], meta_fields=["sites"])


def as_integers(name: str, value: Any) -> Int[AnyArray, "..."]:
    """Layers or positions as int32: traced as they are, all others on the host.

    Raises:
        InputError: for anything but integers, or one that int32 does not hold.
    """
    # One dtype, and not the weak one of Python numbers: either would compile the forward pass once more.
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


def as_positions(positions: Any) -> Int[AnyArray, "Br P"]:
    """Positions of shape [B] or [B, P], as [B, P].

    Raises:
        InputError: for anything but integers, another shape, none at all, or a known negative one.
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
