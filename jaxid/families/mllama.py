"""Llama 3.2 Vision: a tiled tower, read by cross-attention (HF MllamaForConditionalGeneration)."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.errors import CheckpointError, PromptError
from jaxid.families.base import Checkpoint, Family, hidden_states, sections
from jaxid.families.mllama_decoder import MllamaDecoder, mllama_decoder_keys
from jaxid.kernels import attention, masks
from jaxid.kernels.masks import Reads
from jaxid.nn import placement
from jaxid.nn.decoder_config import ModelConfig, decoder_config, unembedding_key
from jaxid.nn.fields import Json
from jaxid.nn.inputs import Inputs
from jaxid.nn.keys import LANGUAGE_MODEL, ROTARY, Key, attention_keys, encoder_block, layer_norm, linear, prefixed
from jaxid.nn.layers import LayerNorm, Linear, filled, normal, stacked
from jaxid.nn.network import Network
from jaxid.nn.transformer import Block, run_blocks
from jaxid.nn.views import Memory
from jaxid.nn.vision import VisionConfig, embedded, patch_key, patches
from jaxid.prompts.base import Encoded, ImageProcessor, PictureTokens, Shown, Tokenizer, apart, processed
from jaxid.prompts.pictures import Clip, Picture
from jaxid.prompts.processor import Processor

_PADDED_TO = 8  # a tile's tokens are padded to a multiple of this


@dataclasses.dataclass(frozen=True, kw_only=True)
class MllamaVisionConfig(VisionConfig):
    """Shape of the tower; defaults as in HF's MllamaVisionConfig."""

    hidden_size: int = 1280  # D of the tower
    intermediate_size: int = 5120  # width of the MLP
    num_hidden_layers: int = 32  # local blocks
    num_global_layers: int = 8  # gated blocks after them
    num_attention_heads: int = 16  # H
    hidden_act: str = "gelu"  # activation of the MLP
    attention_bias: bool = False  # biases of queries, keys and values
    attention_out_bias: bool = False  # bias of what attention adds
    image_size: int = 448  # side of a tile, pixels
    patch_size: int = 14  # side of a patch, pixels
    max_num_tiles: int = 4  # most tiles of a picture
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)  # local blocks whose outputs are read too
    aspect_ratios: int = 8  # ways to arrange tiles

    def __post_init__(self) -> None:
        """Refuses values that do not fit together."""
        super().__post_init__()
        wrong = [layer for layer in self.intermediate_layers_indices if layer >= self.num_hidden_layers]
        if wrong or len(set(self.intermediate_layers_indices)) < len(self.intermediate_layers_indices):
            raise CheckpointError(
                f"intermediate_layers_indices {self.intermediate_layers_indices} must be different layers of the "
                f"tower's {self.num_hidden_layers}."
            )

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile, including its class token."""
        return self.num_patches + 1

    @property
    def output_width(self) -> int:
        """Width of the tower's output."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))


def _vision_config(fields: Json) -> MllamaVisionConfig:
    """Reads the `vision_config`."""
    names = {"attention_heads": "num_attention_heads", "norm_eps": "layer_norm_eps"}
    fields = {names.get(name, name): value for name, value in fields.items() if value is not None}
    ratios = fields.pop("supported_aspect_ratios", None)
    if ratios is not None:
        fields["aspect_ratios"] = len(ratios)
    if "intermediate_layers_indices" in fields:
        fields["intermediate_layers_indices"] = tuple(fields["intermediate_layers_indices"])
    width = fields.pop("vision_output_dim", None)
    config = MllamaVisionConfig.from_fields(fields, where="vision_config")
    if width is not None and width != config.output_width:
        raise CheckpointError(f"vision_config.vision_output_dim is {width}, but its layers give {config.output_width}.")
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class MllamaConfig(ModelConfig):
    """Shape of a Llama 3.2 Vision model; names and defaults as in HF's MllamaConfig."""

    vision_config: MllamaVisionConfig  # the tower
    image_token_index: int = 128256  # id of the token where a picture is shown

    @classmethod
    def from_hf(cls, fields: Json) -> "MllamaConfig":
        """Reads a config.json.

        Raises:
            CheckpointError: for a section of another kind, or an unknown field.
        """
        fields, text, vision = sections(fields, "image", vision_kind="mllama_vision_model")
        # The embedding has more rows than the vocabulary. Hugging Face's class never ties it, whatever the file says.
        text["tie_word_embeddings"] = False
        parts = {"text_config": decoder_config(text, "mllama_text_model"), "vision_config": _vision_config(vision)}
        return cls.from_fields(fields | parts, where="the top level")

    @property
    def image_tokens(self) -> int:
        """Tokens that a picture's tiles can take in the memory that cross-attention reads."""
        return self.vision_config.tile_tokens * self.vision_config.max_num_tiles


def mllama_keys(config: MllamaConfig) -> list[Key]:
    """The family's key table, in the names that published checkpoints use."""
    block = encoder_block(
        attention_keys("self_attn.{}_proj", "qkv", "self_attn.o_proj", bias=False, out_bias=False),
        ("input_layernorm", "post_attention_layernorm"),
    )
    gates = [Key("gate_attn", "attention_scale"), Key("gate_ffn", "mlp_scale")]
    sizes = {"t": config.vision_config.max_num_tiles, "p": config.vision_config.tile_tokens}
    tower = [
        patch_key("patch_embedding.weight", config.vision_config),
        Key("class_embedding", "class_token"),
        Key("gated_positional_embedding.gate", "position_gate"),
        Key("gated_positional_embedding.embedding", "position"),
        Key("gated_positional_embedding.tile_embedding.weight", "tile_position", "a (t p d) -> a t p d", sizes),
        Key("pre_tile_positional_embedding.gate", "before_gate"),
        Key("pre_tile_positional_embedding.embedding.weight", "before", "a (t d) -> a t d", {"t": sizes["t"]}),
        Key("post_tile_positional_embedding.gate", "after_gate"),
        Key("post_tile_positional_embedding.embedding.weight", "after", "a (t d) -> a t d", {"t": sizes["t"]}),
        *layer_norm("layernorm_pre", "pre_norm"),
        *layer_norm("layernorm_post", "post_norm"),
        *prefixed(block, "transformer.layers.{layer}.", "layers."),
        *prefixed([*block, *gates], "global_transformer.layers.{layer}.", "global_layers."),
    ]
    return [
        *prefixed(tower, "vision_model.", "tower."),
        *linear("multi_modal_projector", "projector", bias=True),
        *prefixed(mllama_decoder_keys(config.text_config), "language_model.model.", "decoder."),
        unembedding_key(config.text_config, "language_model.lm_head.weight"),
    ]


class MllamaTower(nnx.Module):
    """Tiles of a picture, each with a class token; attention is over all tiles together (HF MllamaVisionModel)."""

    def __init__(self, config: MllamaVisionConfig, *, rngs: nnx.Rngs):
        """Builds the tower; every block parameter carries a leading layer axis."""
        self.config = config
        width = config.hidden_size
        kinds, tiles = config.aspect_ratios + 1, config.max_num_tiles
        self.patch_kernel = normal(rngs, (config.patch_numbers, width), 0.02)
        self.class_token = normal(rngs, (width,), 0.02)
        self.position_gate, self.before_gate, self.after_gate = (filled(0.0, (1,)) for _ in range(3))
        self.position = normal(rngs, (config.tile_tokens, width), 0.02)
        self.tile_position = normal(rngs, (kinds, tiles, config.tile_tokens, width), 0.02)
        self.before, self.after = (normal(rngs, (kinds, tiles, width), 0.02) for _ in range(2))
        self.pre_norm, self.post_norm = LayerNorm(width, 1e-5), LayerNorm(width, 1e-5)
        gated = dataclasses.replace(config, tanh_gates=True)
        self.layers = stacked(lambda rngs: Block(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.global_layers = stacked(lambda rngs: Block(gated, rngs=rngs), config.num_global_layers, rngs)

    def states(
        self,
        pixels: Float[Array, "N tiles C Y X"],
        ratio: Int[Array, "N"],
        tiles: Int[Array, "N"],
        states: Sequence[int] | None = None,
    ) -> tuple[Float[Array, "L1 N I D"], Float[Array, "G1 N I D"]]:
        """Hidden states of the local and of the global blocks, tiles padded; index 0 is the first block's input.

        Args:
            pixels: tiles, padded with zeros.
            ratio: how each picture's tiles are arranged, as a 1-based index.
            tiles: number of tiles of each picture.
            states: the local hidden states to return, the last one last, and then only the last global one; all by
                default.
        """
        config = self.config
        count, most = pixels.shape[:2]
        flat = patches(pixels.reshape(count * most, *pixels.shape[2:]), config.patch_size)
        x = embedded(flat, self.patch_kernel[...])
        x = x.reshape(count, most, *x.shape[1:])
        x = x + (self.before[...][ratio] * jnp.tanh(self.before_gate[...]))[:, :, None]
        first = jnp.broadcast_to(self.class_token[...], (count, most, 1, config.hidden_size))
        x = jnp.concatenate([first, x], axis=2)
        gate = jnp.tanh(self.position_gate[...])
        x = x + (1 - gate) * self.position[...] + gate * self.tile_position[...][ratio]
        tokens = config.tile_tokens
        padded = -(-tokens // _PADDED_TO) * _PADDED_TO
        x = jnp.pad(self.pre_norm(x), ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))
        real = (jnp.arange(most) < tiles[:, None])[:, :, None] & (jnp.arange(padded) < tokens)
        real = real.reshape(count, -1)
        # As in the published code, only pairs of two padded tokens are masked.
        reads = Reads(high=real.astype(jnp.int32), positions=(~real).astype(jnp.int32))

        def read(query: Array, key: Array, value: Array) -> Array:
            return attention.attend(query, key, value, reads)

        local = run_blocks(self.layers, x.reshape(count, most * padded, -1), states, read=lambda layer: read)
        x = self.post_norm(local[-1]).reshape(count, most, padded, -1)
        x = x + (self.after[...][ratio] * jnp.tanh(self.after_gate[...]))[:, :, None]
        x = x.reshape(count, most * padded, -1)
        return local, run_blocks(self.global_layers, x, None if states is None else [-1], read=lambda layer: read)

    def __call__(
        self, pixels: Float[Array, "N tiles C Y X"], ratio: Int[Array, "N"], tiles: Int[Array, "N"]
    ) -> Float[Array, "N I F"]:
        """The last hidden state of every token and, interleaved feature by feature, those after some local blocks."""
        chosen = [index + 1 for index in self.config.intermediate_layers_indices]
        local, last = self.states(pixels, ratio, tiles, [*chosen, -1])
        chosen = jnp.moveaxis(local[:-1], 0, -1)
        joined = jnp.concatenate([last[-1], chosen.reshape(*chosen.shape[:2], -1)], axis=-1)
        whole = rearrange(joined, "n (t p) d -> n t p d", t=pixels.shape[1])
        return rearrange(whole[:, :, : self.config.tile_tokens], "n t p d -> n (t p) d")


class Mllama(Network):
    """The network; pictures enter by cross-attention, not as tokens."""

    decoder: MllamaDecoder

    def __init__(self, config: MllamaConfig, *, rngs: nnx.Rngs):
        """Builds tower, projector and decoder."""
        self.config = config
        self.tower = MllamaTower(config.vision_config, rngs=rngs)
        self.projector = Linear(config.vision_config.output_width, config.text_config.hidden_size, bias=True, rngs=rngs)
        self.decoder = MllamaDecoder(config.text_config, rngs=rngs)

    def features(self, inputs: Inputs) -> Float[Array, "N I D"]:
        """The pictures' tokens, tile by tile."""
        extras = inputs.extras
        return self.projector(self.tower(self.pixels(inputs), extras["aspect_ratio"], extras["tile_count"]))

    def embed(self, inputs: Inputs) -> Float[Array, "B T D"]:
        """Token embeddings; the picture token has one of its own."""
        return self.decoder.embed(inputs.token_ids)

    def memory(self, inputs: Inputs) -> Memory | None:
        """The tokens of every prompt's pictures, and which of them each token reads.

        A token reads the pictures of the last run of picture tokens up to its own position.
        """
        if inputs.pixels is None:
            return None
        with placement.undivided(not inputs.apart):
            features, shown = self.features(inputs), inputs.extras["shown"]
        tile_count = inputs.extras["tile_count"]
        if not inputs.apart:
            features, tile_count = (array[jnp.maximum(shown, 0)] for array in (features, tile_count))
        states = features.reshape(shown.shape[0], -1, features.shape[-1])
        pictured = (inputs.token_ids == self.config.image_token_index) & inputs.valid
        starts = pictured & ~jnp.pad(pictured, ((0, 0), (1, 0)))[:, :-1]
        count, run = (jnp.cumsum(marks, axis=1, dtype=jnp.int32) for marks in (pictured, starts))
        pictures = jnp.arange(shown.shape[1])
        own_run = jnp.max(
            jnp.where(pictured[:, :, None] & (count[:, :, None] == pictures + 1), run[:, :, None], 0), axis=1
        )
        seen = (pictures < count[:, :, None]) & (run[:, :, None] == own_run[:, None]) & (shown >= 0)[:, None]
        tiles = jnp.arange(self.config.vision_config.max_num_tiles)
        real = (tiles < tile_count.reshape(shown.shape)[:, :, None]) & (shown >= 0)[:, :, None]
        rows = seen.any(axis=2)
        # A key's position is the index of its picture; keys of tiles that do not exist come after all of them.
        tokens, beyond = self.config.vision_config.tile_tokens, masks.NEVER - 1
        positions = jnp.where(real, pictures[:, None], beyond).reshape(real.shape[0], -1)
        reads = Reads(
            low=jnp.where(rows, jnp.argmax(seen, axis=2) - 1, -1),
            high=jnp.where(rows, count - 1, beyond),
            positions=jnp.repeat(positions, tokens, axis=1),
        )
        return self.decoder.remember(states, reads, rows)


class MllamaProcessor(Processor):
    """A picture is one token of the prompt; its tiles are read by cross-attention."""

    config: MllamaConfig

    case = "both"

    def __init__(self, tokenizer: Tokenizer, image_processor: ImageProcessor, config: MllamaConfig):
        """Takes loaded parts and the network's config."""
        super().__init__(tokenizer, image_processor, config)
        # Hugging Face's processor begins a text without a chat template anew after its picture.
        self.frame = ("", tokenizer.bos_token or "")

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens that need as much memory as a picture's keys and values in the cross-attention layers."""
        text = self.config.text_config
        return self.config.image_tokens * len(text.cross_attention_layers) // text.num_hidden_layers

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as tiles, and which pictures each prompt shows."""
        found = processed(self.image_processor, [[self.open(picture)] for picture in pictures])
        shown = np.full((len(members), max(map(len, members))), -1, np.int32)
        for row, own in enumerate(members):
            shown[row, : len(own)] = own
        extras = {
            "aspect_ratio": np.asarray(found["aspect_ratio_ids"], np.int32)[:, 0],
            "tile_count": np.array([own[0] for own in found["num_tiles"]], np.int32),
            "shown": shown,
        }
        tokens = tuple(PictureTokens(self.placeholder, np.zeros(1, np.int32)) for _ in pictures)
        return Encoded(np.asarray(found["pixel_values"], np.float32)[:, 0], tokens, extras, apart(members))

    def image_rows(
        self, token_ids: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"], shown: Shown
    ) -> Int[np.ndarray, "B T"]:
        """0 at a picture's token, from which the start of the text is told; -1 elsewhere.

        Raises:
            PromptError: if a prompt does not show as many pictures as it was given.
        """
        here = (token_ids == self.image_token_id) & valid
        for row, pictures in enumerate(shown):
            if here[row].sum() != len(pictures):
                raise PromptError(f"prompt {row} shows {here[row].sum()} pictures instead of {len(pictures)}.")
        return np.where(here, 0, -1).astype(np.int32)


FAMILY = Family(
    model_types=("mllama",),
    config=MllamaConfig.from_hf,
    network=Mllama,
    keys=mllama_keys,
    processor=MllamaProcessor,
    renames=(*LANGUAGE_MODEL, (r"^model\.(vision_model|multi_modal_projector)\.", r"\1.")),
    unused=ROTARY,
    checkpoints={
        "llama-11b": Checkpoint(
            "meta-llama/Llama-3.2-11B-Vision-Instruct", belief_swap=hidden_states(10, 20), deviation=13
        ),
        "llava-cot": Checkpoint("Xkev/Llama-3.2V-11B-cot"),
    },
)
