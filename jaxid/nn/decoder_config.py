"""The config of a decoder, and its reader for the `text_config` of every kind of language model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.errors import CheckpointError, InputError
from jaxid.kernels import rope
from jaxid.nn.fields import Json, check_parts
from jaxid.nn.keys import LINEAR, Key, attention_keys, linear, prefixed
from jaxid.nn.layers import Config

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of self-attention, in Hugging Face's names."""

ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "llama3": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "short_factor", "long_factor"),
}
"""Kinds of rotary embedding, and the settings that only these kinds read."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""Settings that a file must contain for each kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig(Config):
    """How positions rotate queries and keys (HF `rope_parameters`)."""

    rope_type: str = "default"  # one of ROPE_TYPES
    rope_theta: float = 10000.0  # base of the geometric series of wavelengths
    factor: float = 1.0  # how far positions are stretched
    low_freq_factor: float = 1.0  # "llama3": turns below which the full stretch applies
    high_freq_factor: float = 4.0  # "llama3": turns above which none applies
    original_max_position_embeddings: int = 8192  # "llama3", "yarn", "longrope": context length before stretching
    mrope_section: tuple[int, ...] = ()  # pairs rotated by time, height, width; empty: all by one position
    context: int = 0  # "dynamic": length beyond which the base grows
    attention_factor: float = 1.0  # "yarn", "longrope": factor of cosine and sine
    beta_fast: float = 32.0  # "yarn": turns above which no stretch applies
    beta_slow: float = 1.0  # "yarn": turns below which the full stretch applies
    truncate: bool = True  # "yarn": whether the ramp between them begins and ends at whole pairs
    short_factor: tuple[float, ...] = ()  # "longrope": stretch of every pair, up to the original context length
    long_factor: tuple[float, ...] = ()  # "longrope": stretch of every pair, beyond that length

    def __post_init__(self) -> None:
        """Refuses kinds of scaling that are not implemented, and impossible settings."""
        if self.rope_type not in ROPE_TYPES:
            raise CheckpointError(f"rope_type {self.rope_type!r} is not implemented; known: {', '.join(ROPE_TYPES)}.")
        if self.rope_type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise CheckpointError(f"low_freq_factor and high_freq_factor are both {self.low_freq_factor}.")
        stretched = self.rope_type in ("yarn", "longrope")
        if stretched and (self.rope_theta <= 1 or self.original_max_position_embeddings < 2):
            raise CheckpointError(f"{self.rope_type!r} needs rope_theta and original_max_position_embeddings above 1.")

    @property
    def reads_length(self) -> bool:
        """Whether the frequencies depend on the length of the prompt."""
        return self.rope_type in ("dynamic", "longrope")

    def frequencies(self, head_width: int, length: Int[Array, ""] | None = None) -> Float[np.ndarray | Array, "F"]:
        """The angular steps per position.

        Args:
            head_width: width of a head, E.
            length: length of the longest prompt in the batch, for kinds that depend on it; by default no longer than
                the context before stretching.
        """
        plain = rope.inverse_frequencies(head_width, self.rope_theta)
        if self.rope_type == "linear":
            return (plain / np.float32(self.factor)).astype(np.float32)
        if self.rope_type == "dynamic" and length is not None:
            context = self.context
            grown = rope.dynamic_frequencies(
                length, head_width, self.rope_theta, factor=self.factor, max_position_embeddings=context
            )
            return jnp.where(length > context, grown, plain)
        if self.rope_type == "longrope":
            short, long = (plain / np.array(factors, np.float32) for factors in (self.short_factor, self.long_factor))
            return short if length is None else jnp.where(length > self.original_max_position_embeddings, long, short)
        if self.rope_type == "yarn":
            return rope.yarn_frequencies(
                head_width,
                self.rope_theta,
                factor=self.factor,
                original_max_position_embeddings=self.original_max_position_embeddings,
                beta_fast=self.beta_fast,
                beta_slow=self.beta_slow,
                truncate=self.truncate,
            )
        if self.rope_type == "llama3":
            return rope.llama3_frequencies(
                plain,
                factor=self.factor,
                low_freq_factor=self.low_freq_factor,
                high_freq_factor=self.high_freq_factor,
                original_max_position_embeddings=self.original_max_position_embeddings,
            )
        return plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """Shape of a decoder; names as in Hugging Face's configs, defaults as in LlamaConfig."""

    vocab_size: int = 32000  # V
    hidden_size: int = 4096  # D
    intermediate_size: int = 11008  # width of the gated MLP
    num_hidden_layers: int = 32  # L
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 32  # K, a divisor of H
    head_dim: int = 128  # E
    hidden_act: str = "silu"  # activation of the MLP's gate
    rms_norm_eps: float = 1e-6  # added to the mean square
    attention_bias: bool = False  # biases of queries, keys and values
    attention_out_bias: bool = False  # bias of what attention adds to the residual stream
    mlp_bias: bool = False  # biases in the three MLP projections
    tie_word_embeddings: bool = False  # the unembedding is the embedding, transposed
    rope: RopeConfig = RopeConfig()  # rotary embedding, of the full-attention layers if there are others
    sliding_rope: RopeConfig | None = None  # rotary embedding of the sliding-window layers
    layer_types: tuple[str, ...] = ()  # kind of self-attention of every layer; empty: full everywhere
    sliding_window: int = 0  # positions that a sliding-window layer reads
    norm_offset: float = 0.0  # added to every norm's scale (Gemma: 1)
    query_key_norm: bool = False  # norms of queries and keys in every head
    post_norms: bool = False  # norms also of what attention and MLP add to the residual stream
    query_pre_attn_scalar: float = 0.0  # scores are divided by its square root; 0: that of the head width
    embedding_scale: float = 1.0  # factor of the embeddings
    bidirectional_pictures: bool = False  # tokens of one picture read each other
    extra_embeddings: int = 0  # rows of the embedding beyond V, for tokens that are never generated
    cross_attention_layers: tuple[int, ...] = ()  # layers that read the picture's memory instead of earlier tokens

    def __post_init__(self) -> None:
        """Refuses what does not fit together."""
        heads = ("num_attention_heads", self.num_attention_heads)
        check_parts("text_config", ("hidden_size", self.hidden_size), heads)
        check_parts("text_config", heads, ("num_key_value_heads", self.num_key_value_heads))
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise CheckpointError(f"layer_types names {len(self.layer_types)} layers, not {self.num_hidden_layers}.")
        strange = set(self.layer_types) - {FULL, SLIDING}
        if strange:
            raise CheckpointError(f"layer_types {sorted(strange)} are not implemented; known: {FULL}, {SLIDING}.")
        if SLIDING in self.layer_types and self.sliding_window < 1:
            raise CheckpointError("layer_types names sliding_attention, but sliding_window is missing.")
        crossing = self.cross_attention_layers
        if not all(0 <= layer < self.num_hidden_layers for layer in crossing) or len(set(crossing)) < len(crossing):
            raise CheckpointError(
                f"cross_attention_layers {crossing} must be distinct indices below {self.num_hidden_layers}."
            )
        half = self.head_dim // 2
        for one in filter(None, (self.rope, self.sliding_rope)):
            if self.head_dim % 2 or (one.rope_type == "dynamic" and half < 2):
                raise CheckpointError(f"heads of width {self.head_dim} cannot be rotated in pairs.")
            factors = {len(one.short_factor), len(one.long_factor)}
            if one.rope_type == "longrope" and factors != {half}:
                raise CheckpointError(f"short_factor and long_factor have {sorted(factors)} entries, not {half}.")
        if self.rope.mrope_section and sum(self.rope.mrope_section) != half:
            raise CheckpointError(f"mrope_section {self.rope.mrope_section} does not sum up to {half} pairs.")

    @property
    def reads_length(self) -> bool:
        """Whether rotary frequencies depend on the length of the prompt."""
        return self.rope.reads_length or (self.sliding_rope is not None and self.sliding_rope.reads_length)

    @property
    def slides(self) -> tuple[bool, ...]:
        """Which layers have sliding-window attention."""
        return tuple(kind == SLIDING for kind in self.layer_types) or (False,) * self.num_hidden_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """The fields that all vision-language models' configs have."""

    text_config: DecoderConfig  # the decoder
    vision_config: Any  # the tower, in the family's own config class
    image_token_index: int  # id of the token that pictures replace

    @property
    def image_tokens(self) -> int:
        """Decoder tokens of a picture, I.

        Raises:
            InputError: in families where it depends on the picture.
        """
        raise InputError(f"in a {type(self).__name__}, the number of tokens of a picture depends on its size.")


# Defaults of Hugging Face's config classes where they differ from LlamaConfig's.
_QWEN2 = {
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "attention_bias": True,
    "attention_out_bias": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN_VL = _QWEN2 | {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_window_layers": 80,
}
_GEMMA3 = {
    "max_position_embeddings": 131072,
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256.0,
    "norm_offset": 1.0,
    "query_key_norm": True,
    "post_norms": True,
    "bidirectional_pictures": True,
}
_MLLAMA = {
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "extra_embeddings": 8,
    "cross_attention_layers": (3, 8, 13, 18, 23, 28, 33, 38),
}
KINDS: Mapping[str, Json] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": _QWEN2,
    "qwen2_vl_text": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL,
    "gemma3_text": _GEMMA3,
    "mllama_text_model": _MLLAMA,
}
"""Kinds of decoder: defaults by the `model_type` of their `text_config`."""


def decoder_config(fields: Json, kind: str) -> DecoderConfig:
    """Reads Hugging Face's `text_config`, in its old (`rope_theta`, `rope_scaling`) and new form.

    Args:
        fields: the parsed JSON object.
        kind: its `model_type`, if it does not contain one.

    Raises:
        CheckpointError: for a kind, field or setting that is not implemented.
    """
    fields = dict(fields)
    kind = fields.get("model_type") or kind
    if kind not in KINDS:
        raise CheckpointError(f"text_config.model_type {kind!r} is not one of {', '.join(KINDS)}.")
    implied = KINDS[kind]
    # null means as many key-value heads as heads; a missing field has the default of its kind.
    every_head = "num_key_value_heads" in fields and fields["num_key_value_heads"] is None
    fields = {**implied, **{name: value for name, value in fields.items() if value is not None}}
    if every_head:
        fields.pop("num_key_value_heads", None)
    if kind == "gemma3_text" and "hidden_activation" in fields:
        fields["hidden_act"] = fields.pop("hidden_activation")
    if kind == "llama":
        fields["attention_out_bias"] = fields.get("attention_bias", False)
    elif kind == "gemma3_text":
        fields["embedding_scale"] = fields["hidden_size"] ** 0.5
        if fields.get("attention_bias"):
            fields["attention_out_bias"] = True
    _read_layer_types(fields, kind)
    full, sliding = _read_rope(fields, kind)
    heads = fields.get("num_attention_heads", DecoderConfig.num_attention_heads)
    fields.setdefault("head_dim", fields.get("hidden_size", DecoderConfig.hidden_size) // heads)
    fields.setdefault("num_key_value_heads", heads)
    fields["cross_attention_layers"] = tuple(fields.get("cross_attention_layers", ()))
    _refuse(fields, ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"))
    return DecoderConfig.from_fields(fields | {"rope": full, "sliding_rope": sliding}, where="text_config")


def _read_layer_types(fields: Json, kind: str) -> None:
    """Replaces the various settings for sliding-window layers by `layer_types`, in place."""
    layers = fields.get("num_hidden_layers", DecoderConfig.num_hidden_layers)
    pattern = fields.pop("sliding_window_pattern", None) or fields.pop("_sliding_window_pattern", None) or 6
    fields.pop("_sliding_window_pattern", None)
    uses_window, first = fields.pop("use_sliding_window", False), fields.pop("max_window_layers", layers)
    types = fields.pop("layer_types", None)
    if types is None and kind == "gemma3_text":
        types = [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]
    elif types is None and uses_window:
        types = [SLIDING if layer >= first else FULL for layer in range(layers)]
    if types is None or set(types) <= {FULL}:
        types = ()
        fields.pop("sliding_window", None)
    fields["layer_types"] = tuple(types)


def _read_rope(fields: Json, kind: str) -> tuple[RopeConfig, RopeConfig | None]:
    """Removes the rotary settings from the fields, and returns those of full and of sliding layers.

    If a setting is given more than once, the precedence is that of Hugging Face's configs
    (`convert_rope_params_to_dict`).
    """
    scaling, parameters = fields.pop("rope_scaling", None) or {}, fields.pop("rope_parameters", None) or {}
    theta, local = fields.pop("rope_theta", None), fields.pop("rope_local_base_freq", None)
    original, context = fields.pop("original_max_position_embeddings", None), fields["max_position_embeddings"]
    if kind == "gemma3_text":
        full = {"rope_theta": theta or 1000000.0, **(parameters.get(FULL) or {"rope_type": "default"}), **scaling}
        sliding = {"rope_theta": local or 10000.0, **(parameters.get(SLIDING) or {})}
        for settings in (full, sliding):
            settings.pop("truncate", None)  # Hugging Face ignores it in settings by kind of layer
        return _rope_config(full, context), _rope_config(sliding, context)
    settings = dict(scaling or parameters)
    if kind in ("qwen2_vl_text", "qwen2_5_vl_text"):
        if settings.get("rope_type", settings.get("type")) == "mrope":
            settings["rope_type"] = "default"
        settings["mrope_section"] = settings.get("mrope_section") or (16, 24, 24)
    if original is not None:
        settings["original_max_position_embeddings"] = original
    return _rope_config({"rope_theta": theta, **settings}, context), None


def _rope_config(settings: Json, context: int) -> RopeConfig:
    """Reads the rotary settings of one kind of layer; `context` is the model's number of positions."""
    old = settings.pop("type", None)
    kind = settings.setdefault("rope_type", old or "default")
    missing = [name for name in _NEEDED.get(kind, ()) if name not in settings]
    if missing:
        raise CheckpointError(f"rope_parameters of kind {kind!r} lack {', '.join(missing)}.")
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings.pop("partial_rotary_factor", 1) != 1:
        raise CheckpointError("partial_rotary_factor: partial rotation of heads is not implemented.")
    foreign = {name for names in ROPE_TYPES.values() for name in names} - set(ROPE_TYPES.get(kind, ()))
    for name in foreign & set(settings):
        raise CheckpointError(f"rope_parameters of kind {kind!r} do not read {name}={settings[name]!r}.")
    if kind == "dynamic":
        settings["context"] = context
    if kind in ("llama3", "yarn", "longrope"):
        original = settings.setdefault("original_max_position_embeddings", context)
        stretch = settings.setdefault("factor", context / original)
        slopes = settings.pop("mscale", 0.0), settings.pop("mscale_all_dim", 0.0)
        if kind != "llama3" and "attention_factor" not in settings:
            yarn = kind == "yarn"
            scaling = rope.yarn_scaling(stretch, *slopes) if yarn else rope.longrope_scaling(stretch, original)
            settings["attention_factor"] = scaling
    for name in ("mrope_section", "short_factor", "long_factor"):
        settings[name] = tuple(settings.get(name, ()))
    for name in ("beta_fast", "beta_slow"):
        if not settings.get(name):
            settings.pop(name, None)
    return RopeConfig.from_fields(settings, where="rope_parameters")


def _refuse(fields: Json, names: tuple[str, ...]) -> None:
    """Removes settings that are off, in place; those that are on remain, and are refused as unknown."""
    for name in names:
        if not fields.get(name):
            fields.pop(name, None)


def decoder_keys(config: DecoderConfig) -> list[Key]:
    """Key table of a decoder, below HF's `model.`, without the unembedding."""
    layers = [
        Key("input_layernorm.weight", "attention_norm.scale"),
        *linear("mlp.gate_proj", "mlp.gate", bias=config.mlp_bias),
        *linear("mlp.up_proj", "mlp.up", bias=config.mlp_bias),
        *linear("mlp.down_proj", "mlp.down", bias=config.mlp_bias),
        *attention_keys(
            "self_attn.{}_proj",
            "qkv",
            "self_attn.o_proj",
            bias=config.attention_bias,
            out_bias=config.attention_out_bias,
        ),
    ]
    if config.post_norms:
        layers += [
            Key("post_attention_layernorm.weight", "attention_post_norm.scale"),
            Key("pre_feedforward_layernorm.weight", "mlp_norm.scale"),
            Key("post_feedforward_layernorm.weight", "mlp_post_norm.scale"),
        ]
    else:
        layers.append(Key("post_attention_layernorm.weight", "mlp_norm.scale"))
    if config.query_key_norm:
        layers += [
            Key("self_attn.q_norm.weight", "attention.query_norm.scale"),
            Key("self_attn.k_norm.weight", "attention.key_norm.scale"),
        ]
    keys = prefixed(layers, "layers.{layer}.", "layers.")
    return [Key("embed_tokens.weight", "embedding"), *keys, Key("norm.weight", "norm.scale")]


def unembedding_key(config: DecoderConfig, source: str) -> Key:
    """Row of the unembedding, which may be a copy of the embedding."""
    if config.tie_word_embeddings:
        return Key(source, "decoder.embedding", copy=True)
    return Key(source, "decoder.unembedding", LINEAR)
