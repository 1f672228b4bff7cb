"""One decoder block and its scanned stack: the text side of every model family."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.errors import CheckpointError
from jaxid.kernels import attention, rope
from jaxid.models.common import ACTIVATIONS, Config, Linear, RMSNorm, filled, flat_product, join_heads, normal, stacked
from jaxid.models.keys import Key, heads_in, heads_out, linear, prefixed
from jaxid.models.sites import DECODER_SITES, Capture, Intervention, Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig(Config):
    """How positions turn queries and keys (HF `rope_parameters`)."""

    rope_type: str = "default"  # "default", "linear" or "llama3"
    rope_theta: float = 10000.0  # base of the geometric series of wavelengths
    factor: float = 1.0  # how far positions are stretched ("linear", "llama3")
    low_freq_factor: float = 1.0  # "llama3": turns below which the full stretch applies
    high_freq_factor: float = 4.0  # "llama3": turns above which none applies
    original_max_position_embeddings: int = 8192  # "llama3": context length before stretching

    def __post_init__(self) -> None:
        """Refuses a kind of scaling that is not implemented, when the checkpoint is loaded."""
        if self.rope_type not in ("default", "linear", "llama3"):
            raise CheckpointError(f"rope_type {self.rope_type!r} is not implemented; known: default, linear, llama3.")

    def frequencies(self, head_width: int) -> Float[np.ndarray, "F"]:
        """The angular steps per position."""
        plain = rope.inverse_frequencies(head_width, self.rope_theta)
        if self.rope_type == "default":
            return plain
        if self.rope_type == "linear":
            return (plain / np.float32(self.factor)).astype(np.float32)
        return rope.llama3_frequencies(
            plain,
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            original_max_position_embeddings=self.original_max_position_embeddings,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """Shape of a Llama-like decoder; names and defaults as in HF's LlamaConfig."""

    vocab_size: int = 32000  # V
    hidden_size: int = 4096  # D
    intermediate_size: int = 11008  # width of the gated MLP
    num_hidden_layers: int = 32  # L
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 32  # K, a divisor of H
    head_dim: int = 128  # E
    hidden_act: str = "silu"  # activation of the MLP's gate
    rms_norm_eps: float = 1e-6  # added to the mean square
    attention_bias: bool = False  # biases in the four attention projections
    mlp_bias: bool = False  # biases in the three MLP projections
    tie_word_embeddings: bool = False  # the unembedding is the embedding, transposed
    rope: RopeConfig = RopeConfig()  # positions

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> "DecoderConfig":
        """Reads HF's `text_config` of type llama, old (`rope_theta`, `rope_scaling`) and new form."""
        fields = dict(fields)
        parameters = dict(fields.pop("rope_parameters", None) or {})
        scaling = dict(fields.pop("rope_scaling", None) or {})
        scaling.setdefault("rope_type", scaling.pop("type", "default"))
        if "rope_theta" in fields:
            scaling["rope_theta"] = fields.pop("rope_theta")
        scaling |= parameters
        needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        missing = [name for name in needed.get(scaling["rope_type"], ()) if name not in scaling]
        if missing:
            raise CheckpointError(f"rope_parameters of kind {scaling['rope_type']!r} lack {', '.join(missing)}.")
        if scaling["rope_type"] == "llama3":
            scaling.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings") or 2048)
        rope_config = RopeConfig.from_fields(scaling, where="rope_parameters")
        heads = fields.get("num_attention_heads") or cls.num_attention_heads
        width = fields.get("hidden_size") or cls.hidden_size
        fields["head_dim"] = fields.get("head_dim") or width // heads
        fields["num_key_value_heads"] = fields.get("num_key_value_heads") or heads
        return cls.from_fields(fields | {"rope": rope_config}, where="text_config")


def decoder_keys(config: DecoderConfig) -> list[Key]:
    """Key table of a Llama-like decoder, below HF's `model.` (the unembedding stands outside)."""
    heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
    block = [
        Key("input_layernorm.weight", "attention_norm.scale"),
        *heads_in("self_attn.q_proj", "attention.query", heads, bias=bias),
        *heads_in("self_attn.k_proj", "attention.key", kv_heads, bias=bias),
        *heads_in("self_attn.v_proj", "attention.value", kv_heads, bias=bias),
        *heads_out("self_attn.o_proj", "attention.out", heads, bias=bias),
        Key("post_attention_layernorm.weight", "mlp_norm.scale"),
        *linear("mlp.gate_proj", "mlp.gate", bias=config.mlp_bias),
        *linear("mlp.up_proj", "mlp.up", bias=config.mlp_bias),
        *linear("mlp.down_proj", "mlp.down", bias=config.mlp_bias),
    ]
    return [
        Key("embed_tokens.weight", "embedding"),
        *prefixed(block, "layers.{layer}.", "layers."),
        Key("norm.weight", "norm.scale"),
    ]


Rotation = tuple[Float[Array, "B T F"], Float[Array, "B T F"]]
"""Cosine and sine of every token's rotary angles."""

Read = Callable[[Float[Array, "B S H E"], Float[Array, "B T K E"], Float[Array, "B T K E"]], Float[Array, "B S H E"]]
"""Attention: from queries, keys and values to what the queries read."""

Keep = Callable[[Float[Array, "B T ..."]], Float[Array, "B S ..."]]
"""Picks, of every prompt's tokens, those whose results are wanted."""


def _all(x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
    """Keeps every token."""
    return x


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions; heads are real axes of the weights."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draws projections of variance 1 / inputs."""
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        head_width, scale = config.head_dim, config.hidden_size**-0.5
        self.query = normal(rngs, (width, heads, head_width), scale)
        self.key = normal(rngs, (width, kv_heads, head_width), scale)
        self.value = normal(rngs, (width, kv_heads, head_width), scale)
        self.out = normal(rngs, (heads, head_width, width), scale * (2 * config.num_hidden_layers) ** -0.5)
        self.bias = config.attention_bias
        if self.bias:
            self.query_bias = filled(0.0, (heads, head_width))
            self.key_bias = filled(0.0, (kv_heads, head_width))
            self.value_bias = filled(0.0, (kv_heads, head_width))
            self.out_bias = filled(0.0, (width,))

    def __call__(
        self, x: Float[Array, "B T D"], rotation: Rotation, read: Read, keep: Keep = _all
    ) -> Float[Array, "B S D"]:
        """Mixes tokens: `read(query, key, value)` says who reads whom, `keep` whose results are wanted."""
        query = flat_product(keep(x), self.query[...])
        key, value = flat_product(x, self.key[...]), flat_product(x, self.value[...])
        if self.bias:
            query, key = query + self.query_bias[...], key + self.key_bias[...]
            value = value + self.value_bias[...]
        mixed = read(rope.rotate(query, *map(keep, rotation)), rope.rotate(key, *rotation), value)
        out = flat_product(join_heads(mixed), join_heads(self.out[...], 0))
        return out + self.out_bias[...] if self.bias else out


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draws projections of variance 1 / inputs."""
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = Linear(width, hidden, bias=bias, rngs=rngs)
        self.up = Linear(width, hidden, bias=bias, rngs=rngs)
        self.down = Linear(hidden, width, bias=bias, rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the network to every token."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


Tap = Callable[[str, Float[Array, "B T D"]], Float[Array, "B T D"]]
"""What stands at every site of a block: `(name, value) -> value`."""


class DecoderBlock(nnx.Module):
    """Pre-norm attention and MLP around the residual stream (HF LlamaDecoderLayer)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds the block's parts."""
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], rotation: Rotation, read: Read, tap: Tap, keep: Keep = _all
    ) -> Float[Array, "B S D"]:
        """One step of the residual stream.

        Args:
            x: Float[B, T, D].
            rotation: of every token.
            read: attention over the keys and values that this block makes.
            tap: called as `tap(name, value)` at every site; all but "resid_pre" hold the kept tokens only.
            keep: tokens that leave the block; the others serve as keys and values.

        Returns:
            Float[B, S, D], the kept tokens.
        """
        x = tap("resid_pre", x)
        with jax.named_scope("attention"):
            x = keep(x) + tap("attn_out", self.attention(self.attention_norm(x), rotation, read, keep))
        x = tap("resid_mid", x)
        with jax.named_scope("mlp"):
            x = x + tap("mlp_out", self.mlp(self.mlp_norm(x)))
        return tap("resid_post", x)


class DecoderOutput(NamedTuple):
    """What the stack returns."""

    hidden: Float[Array, "B T D"]  # after the final norm
    captured: dict[str, Float[Array, "..."]]  # "embed" Float[B P D]; block sites Float[L B P D]


class Decoder(nnx.Module):
    """Embedding, a stack of blocks run as one `lax.scan`, final norm and unembedding (HF LlamaModel)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds the stack; every block parameter carries a leading layer axis."""
        self.config = config
        self.embedding = normal(rngs, (config.vocab_size, config.hidden_size), 0.02)
        self.layers = stacked(lambda rngs: DecoderBlock(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.unembedding = normal(rngs, (config.hidden_size, config.vocab_size), config.hidden_size**-0.5)

    def embed(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of the tokens."""
        return jnp.take(self.embedding[...], token_ids, axis=0)

    def unembed_matrix(self) -> Float[Array, "D V"]:
        """The map from the normed residual stream to logits."""
        return self.embedding[...].T if self.config.tie_word_embeddings else self.unembedding[...]

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T T"],
        intervention: Intervention,
        capture: Capture,
    ) -> DecoderOutput:
        """Runs the stack.

        Args:
            embeddings: Float[B, T, D], pictures already merged in.
            positions: place of every token in its prompt, Int[B, T].
            mask: which tokens each token reads, Bool[B, T, T]; none reads a later one.
            intervention: called as `intervention(site, value)` at every site.
            capture: what to return; block sites come stacked over layers.

        Returns:
            The normed final hidden states and the captured values.
        """
        rotation = rope.rotations(positions, self.config.rope.frequencies(self.config.head_dim))
        before = Site("embed", jnp.asarray(-1), positions)
        x = intervention(before, embeddings)
        captured = {"embed": capture.take(x)} if "embed" in capture.sites else {}
        wanted = [name for name in DECODER_SITES if name in capture.sites]
        block_definition, block_parameters = nnx.split(self.layers)

        def read(query: Array, key: Array, value: Array) -> Array:
            return attention.attend(query, key, value, mask, causal=True)

        def step(x: Array, layer: tuple[Any, Array]) -> tuple[Array, dict[str, Array]]:
            parameters, number = layer
            found: dict[str, Array] = {}

            def tap(name: str, value: Array) -> Array:
                value = intervention(Site(name, number, positions), value)
                if name in wanted:
                    found[name] = capture.take(value)
                return value

            return nnx.merge(block_definition, parameters)(x, rotation, read, tap), found

        numbers = jnp.arange(self.config.num_hidden_layers)
        x, stacked_values = jax.lax.scan(step, x, (block_parameters, numbers))
        return DecoderOutput(self.norm(x), captured | stacked_values)
