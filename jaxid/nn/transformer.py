"""A Transformer block and its scanned stack, for picture towers and text encoders."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from jaxid.kernels import attention, rope
from jaxid.kernels.rope import Rotation
from jaxid.nn.fields import check_parts
from jaxid.nn.keys import attention_keys, encoder_block
from jaxid.nn.layers import (
    ACTIVATIONS,
    Config,
    Layer,
    LayerNorm,
    Linear,
    Projections,
    RMSNorm,
    Stackable,
    filled,
    join_heads,
    scan_stack,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(Config):
    """Shape of a stack of blocks; names and defaults as in HF's CLIP configs."""

    hidden_size: int = 768  # D of the stack
    intermediate_size: int = 3072  # width of the MLP
    num_hidden_layers: int = 12  # number of blocks
    num_attention_heads: int = 12  # H
    hidden_act: str = "quick_gelu"  # activation of the MLP
    layer_norm_eps: float = 1e-5  # added to the variance
    attention_bias: bool = True  # biases of queries, keys and values
    attention_out_bias: bool = True  # bias of what attention adds
    rms_norm: bool = False  # the blocks' norms are root-mean-square norms
    query_key_norm: bool = False  # norms of queries and keys, over all heads together
    layer_scale: bool = False  # what attention and MLP add is multiplied by learned vectors
    gated_mlp: bool = False  # down(act(gate(x)) * up(x)) in place of down(act(up(x)))
    tanh_gates: bool = False  # what attention and MLP add is multiplied by the tanh of learned numbers
    norms_after: bool = False  # norms follow each sum, as in BERT, instead of preceding attention and MLP

    def __post_init__(self) -> None:
        """Refuses what does not fit together."""
        check_parts("a tower", ("its width", self.hidden_size), ("num_attention_heads", self.num_attention_heads))


BLOCK_KEYS = encoder_block(
    attention_keys("self_attn.{}_proj", "qkv", "self_attn.out_proj", bias=True, out_bias=True),
    ("layer_norm1", "layer_norm2"),
)
"""Key table of one block as HF's CLIP and SigLIP name it."""


Read = Callable[[Float[Array, "N S H E"], Float[Array, "N I H E"], Float[Array, "N I H E"]], Float[Array, "N S H E"]]
"""Attention: maps queries, keys and values to what the queries read."""


def read_all(
    query: Float[Array, "N S H E"], key: Float[Array, "N I H E"], value: Float[Array, "N I H E"]
) -> Float[Array, "N S H E"]:
    """Every token of a picture or text reads all of them."""
    return attention.attend(query, key, value)


class Attention(Projections):
    """Multi-head attention of a picture's or text's tokens."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        """Builds the projections and norms."""
        width, heads = config.hidden_size, config.num_attention_heads
        super().__init__(
            width,
            heads,
            width // heads,
            config.num_hidden_layers,
            bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            rngs=rngs,
        )
        self.config = config
        if config.query_key_norm:
            self.query_norm, self.key_norm = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)

    def __call__(
        self,
        x: Float[Array, "N S D"],
        read: Read = read_all,
        rotation: Rotation | None = None,
        source: Float[Array, "N I D"] | None = None,
    ) -> Float[Array, "N S D"]:
        """What tokens read from each other, or from the tokens of a `source`."""
        query, key, value = self.into_heads(x, x if source is None else source)
        if self.config.query_key_norm:
            query = self.query_norm(join_heads(query)).reshape(query.shape)
            key = self.key_norm(join_heads(key)).reshape(key.shape)
        if rotation is not None:
            query, key = rope.rotate(query, *rotation), rope.rotate(key, *rotation)
        return self.from_heads(read(query, key, value))


class Block(Stackable):
    """Attention and MLP, norms before or after them (HF CLIPEncoderLayer, BlipTextLayer and their kin)."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        """Builds the block's parts."""
        width, norm = config.hidden_size, RMSNorm if config.rms_norm else LayerNorm
        self.config = config
        self.attention_norm = norm(width, config.layer_norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = norm(width, config.layer_norm_eps)
        self.up = Linear(width, config.intermediate_size, bias=True, rngs=rngs)
        self.down = Linear(config.intermediate_size, width, bias=True, rngs=rngs)
        if config.gated_mlp:
            self.gate = Linear(width, config.intermediate_size, bias=True, rngs=rngs)
        shape = (width,) if config.layer_scale else (1,)
        if config.layer_scale or config.tanh_gates:
            self.attention_scale, self.mlp_scale = filled(1.0, shape), filled(1.0, shape)

    def __call__(
        self, x: Float[Array, "N I D"], read: Read = read_all, rotation: Rotation | None = None
    ) -> Float[Array, "N I D"]:
        """Runs the block; `read(query, key, value)` is its attention."""
        if self.config.norms_after:
            x = self.attention_norm(x + self._scaled("attention", self.attention(x, read, rotation)))
            return self.mlp_norm(x + self._scaled("mlp", self._mlp(x)))
        x = x + self._scaled("attention", self.attention(self.attention_norm(x), read, rotation))
        return x + self._scaled("mlp", self._mlp(self.mlp_norm(x)))

    def _mlp(self, x: Float[Array, "N I D"]) -> Float[Array, "N I D"]:
        activation, gated = ACTIVATIONS[self.config.hidden_act], self.config.gated_mlp
        return self.down(activation(self.gate(x)) * self.up(x) if gated else activation(self.up(x)))

    def _scaled(self, name: str, added: Float[Array, "N I D"]) -> Float[Array, "N I D"]:
        if self.config.layer_scale:
            return added * getattr(self, f"{name}_scale")[...]
        if self.config.tanh_gates:
            return added * jnp.tanh(getattr(self, f"{name}_scale")[...])
        return added


def run_blocks(
    layers: Block,
    x: Float[Array, "N I D"],
    states: Sequence[int] | None = None,
    *,
    read: Callable[[Layer], Read] = lambda layer: read_all,
    rotation: Rotation | None = None,
) -> Float[Array, "S N I D"]:
    """Hidden states of stacked blocks: 0 is what enters the first, k + 1 what leaves block k.

    Args:
        layers: the stack.
        x: the tokens.
        states: the hidden states to return, in their order; -1 is the last one. All of them by default. Blocks after
            the last of them do not run.
        read: the attention of every block.
        rotation: rotary angles of the tokens.
    """
    definition, count = nnx.graphdef(layers), jax.tree.leaves(nnx.state(layers))[0].shape[0]
    wanted = list(range(count + 1)) if states is None else [state % (count + 1) for state in states]
    kept = sorted(set(wanted))
    # Every block writes to the place of the next kept state, which is the last to be written there.
    places = np.searchsorted(kept, np.arange(kept[-1] + 1))

    def step(state: tuple[Array, Array], index: Layer, parameters: PyTree) -> tuple[tuple[Array, Array], None]:
        x, found = state
        x = nnx.merge(definition, parameters)(x, read(index), rotation)
        if len(kept) > 1:
            found = jax.lax.dynamic_update_index_in_dim(found, x, jnp.asarray(places)[index + 1], 0)
        return (x, found), None

    found = jnp.zeros((len(kept), *x.shape), x.dtype).at[places[0]].set(x) if len(kept) > 1 else x[:0]
    (last, found), _ = scan_stack(layers, step, (x, found), kept[-1])
    if len(kept) == 1:
        return last[None]
    return found if wanted == kept else found[np.searchsorted(kept, wanted)]
