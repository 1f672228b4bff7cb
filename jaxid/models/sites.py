"""Named places in a forward pass, where values can be read and replaced."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DECODER_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Sites of every decoder block, in the order of computation (TransformerLens' names)."""

SITES = ("embed", *DECODER_SITES)
"""All sites: the decoder's input, pictures merged in, and those of every block."""


@dataclass(frozen=True)
class Site:
    """Where in the forward pass a value stands.

    Attributes:
        name: one of `SITES`.
        layer: the decoder block's number, 0-based; -1 before the first block. A traced scalar.
        positions: place in the prompt of every row of the value, Int[B, T].
    """

    name: str
    layer: Int[Array, ""]
    positions: Int[Array, "B T"]


# The name is static: it decides while tracing which edits touch the value at all.
jax.tree_util.register_dataclass(Site, data_fields=["layer", "positions"], meta_fields=["name"])

Intervention = Callable[[Site, Float[Array, "B T D"]], Float[Array, "B T D"]]
"""Anything that maps the value at a site to the value that the pass goes on with."""


def clean(site: Site, value: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The intervention that changes nothing."""
    del site
    return value


@dataclass(frozen=True)
class Capture:
    """What a forward pass returns besides its logits.

    Attributes:
        sites: names of the sites to return, static.
        at: positions to return per prompt, Int[B, P]; None returns every position.
    """

    sites: tuple[str, ...] = ()
    at: Int[Array, "B P"] | None = None

    def take(self, value: Float[Array, "B T D"]) -> Float[Array, "B P D"]:
        """The value's rows at the wanted positions."""
        if self.at is None:
            return value
        return jnp.take_along_axis(value, self.at[:, :, None], axis=1)


jax.tree_util.register_dataclass(Capture, data_fields=["at"], meta_fields=["sites"])
