"""Llama 3.2 Vision's decoder, some of whose layers read pictures by cross-attention (HF MllamaTextModel)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.kernels.masks import Reads
from jaxid.nn.decoder import Decoder, DecoderBlock, Tap
from jaxid.nn.decoder_config import DecoderConfig, decoder_keys
from jaxid.nn.keys import Key, prefixed
from jaxid.nn.layers import Layer, RMSNorm, filled, layer_of, rms_norm, stacked
from jaxid.nn.views import Heads, Keep, Memory, Queries, Stored, Swapped, View


def mllama_decoder_keys(config: DecoderConfig) -> list[Key]:
    """Key table of the decoder, below HF's `model.`; attention has another name in cross-attention layers."""
    keys, crossing = decoder_keys(config), config.cross_attention_layers
    if not crossing:
        return keys
    own = tuple(layer for layer in range(config.num_hidden_layers) if layer not in crossing)
    attention = [key for key in keys if ".self_attn." in key.source]
    parts = [
        Key("cross_attn.q_norm.weight", "query_norm.scale"),
        Key("cross_attn.k_norm.weight", "key_norm.scale"),
        Key("cross_attn_attn_gate", "attention_gate"),
        Key("cross_attn_mlp_gate", "mlp_gate"),
    ]
    rows = tuple(range(len(crossing)))
    return [
        *(key for key in keys if key not in attention),
        *(dataclasses.replace(key, layers=own) for key in attention),
        *(
            dataclasses.replace(key, source=key.source.replace("self_attn", "cross_attn"), layers=crossing)
            for key in attention
        ),
        *(
            dataclasses.replace(key, layers=crossing, rows=rows)
            for key in prefixed(parts, "layers.{layer}.", "crossing.")
        ),
    ]


class CrossParts(nnx.Module):
    """Parameters that only cross-attention layers have (HF MllamaCrossAttentionDecoderLayer)."""

    def __init__(self, config: DecoderConfig):
        """Starts with open gates, so that pictures matter before any training."""
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attention_gate = filled(1.0, (1,))
        self.mlp_gate = filled(1.0, (1,))


@dataclasses.dataclass(frozen=True)
class Crossed(View):
    """A view in which cross-attention layers read a memory.

    Attributes:
        own: what the other layers read.
        memory: what the cross-attention layers read.
        indices: each layer's index among the cross-attention layers, -1 for other layers.
        query_scale: scale of the norm of queries, for each cross-attention layer.
        epsilon: added to the mean square by that norm.
    """

    own: View
    memory: Memory
    indices: Int[Array, "L"]
    query_scale: Float[Array, "C E"]
    epsilon: float

    def at(self, layer: Layer) -> "Crossed":
        """The view with what the other layers read sliced out."""
        return dataclasses.replace(self, own=self.own.at(layer))

    def store(self, layer: Layer, key: Heads, value: Heads) -> Stored:
        """As in `own`; what a cross-attention layer stores is never read."""
        return self.own.store(layer, key, value)

    def read(self, layer: Layer, query: Queries, stored: Stored, keep: Keep = None) -> Queries:
        """Reads from `own` or from the memory."""
        index = self.indices[layer]

        def remembered() -> Array:
            row = jnp.maximum(index, 0)
            normed = rms_norm(query, layer_of(self.query_scale, row), self.epsilon)
            return self.memory.read(row, normed, keep)

        return jax.lax.cond(index >= 0, remembered, lambda: self.own.read(layer, query, stored, keep))


class MllamaDecoder(Decoder):
    """The stack, with gates on what cross-attention layers add to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds the stack; `CrossParts` are stacked separately."""
        super().__init__(config, rngs=rngs)
        layers = config.cross_attention_layers
        if layers:
            self.crossing = stacked(lambda rngs: CrossParts(config), len(layers), rngs)

    def _indices(self) -> Int[Array, "L"]:
        """Each layer's index among the cross-attention layers, -1 for other layers."""
        indices = np.full(self.config.num_hidden_layers, -1, np.int32)
        indices[list(self.config.cross_attention_layers)] = np.arange(len(self.config.cross_attention_layers))
        return jnp.asarray(indices)

    def remember(self, states: Float[Array, "B I D"], reads: Reads, rows: Bool[Array, "B T"]) -> Memory:
        """The pictures' keys and values in every cross-attention layer; `reads` and `rows` as in `Memory`."""
        scales = self.crossing.key_norm.scale[...]

        def step(_: None, row: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
            layer, scale = row
            attention = self.block(layer).attention
            key, value = attention.remembered(states)
            key = rms_norm(key, scale, self.config.rms_norm_eps)
            return None, (jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2))

        layers = jnp.asarray(np.array(self.config.cross_attention_layers))
        _, (keys, values) = jax.lax.scan(step, None, (layers, scales))
        return Memory(keys, values, reads, rows)

    def view(self, own: View, memory: Memory | None) -> View:
        """Adds the memory to what self-attention reads."""
        if memory is None or not self.config.cross_attention_layers:
            return own
        scale = self.crossing.query_norm.scale[...]
        return Crossed(own, memory, self._indices(), scale, self.config.rms_norm_eps)

    def step(
        self,
        block: DecoderBlock,
        layer: Layer,
        x: Float[Array, "*R B T D"],
        view: View,
        tap: Tap,
        keep: Keep = None,
    ) -> tuple[Float[Array, "*R B S D"], Stored]:
        """A step with gated attention and MLP in cross-attention layers, which add nothing without a picture."""
        if not self.config.cross_attention_layers:
            return super().step(block, layer, x, view, tap, keep)
        index = self._indices()[layer]
        parts = (self.crossing.attention_gate[...], self.crossing.mlp_gate[...])
        attention_gate, mlp_gate = (jnp.tanh(gate[0]) for gate in layer_of(parts, jnp.maximum(index, 0)))
        crossed = view.own if isinstance(view, Swapped) else view
        if isinstance(crossed, Crossed):
            # A token that sees no picture attends to all of them, but its MLP adds nothing.
            rows = crossed.memory.rows[..., None]
            rows = rows if keep is None else jnp.take_along_axis(rows, keep[..., None], axis=1)
            gates = {"attn_out": attention_gate, "mlp_out": jnp.where(rows, mlp_gate, 0)}
        else:
            gates = {"attn_out": jnp.zeros_like(attention_gate), "mlp_out": jnp.zeros_like(mlp_gate)}

        def gated(name: str, value: Array) -> Array:
            if name in gates:
                value = value * jnp.where(index >= 0, gates[name], jnp.ones_like(gates[name]))
            return tap(name, value)

        return super().step(block, layer, x, view, gated, keep)
