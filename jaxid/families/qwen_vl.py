"""Qwen2-VL and Qwen2.5-VL: towers that read pictures of any size, merged patches, decoders that rotate heads in 2-D."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.errors import CheckpointError
from jaxid.families.base import Checkpoint, Family, hidden_states, sections
from jaxid.kernels import attention, masks, rope
from jaxid.nn.decoder import Decoder
from jaxid.nn.decoder_config import ModelConfig, decoder_config, decoder_keys, unembedding_key
from jaxid.nn.fields import Json, check_parts
from jaxid.nn.inputs import Inputs
from jaxid.nn.keys import ROTARY, Key, encoder_block, fused_attention_keys, layer_norm, linear, prefixed
from jaxid.nn.layers import BOOKKEEPING, Layer, LayerNorm, Linear, RMSNorm, flat_product, normal, stacked
from jaxid.nn.network import Network
from jaxid.nn.transformer import Block, BlockConfig, Read, run_blocks
from jaxid.prompts.base import Encoded, ImageProcessor, PictureTokens, Shown, apart, bucketed, processed
from jaxid.prompts.pictures import Clip, Picture, PILImage
from jaxid.prompts.processor import Processor


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVisionConfig(BlockConfig):
    """Shape of the tower; defaults as in HF's Qwen2_5_VLVisionConfig.

    Qwen2.5's blocks have a gated MLP and root-mean-square norms, Qwen2's a plain MLP and layer norms.
    """

    hidden_size: int = 3584  # D of the tower
    intermediate_size: int = 3420  # width of the MLP
    num_hidden_layers: int = 32  # number of blocks
    num_attention_heads: int = 16  # H
    hidden_act: str = "silu"  # activation of the MLP
    layer_norm_eps: float = 1e-6  # added to the variance, in all norms
    rms_norm: bool = True  # the norms are root-mean-square norms
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)) in place of down(act(up(x)))
    out_hidden_size: int = 3584  # D of the decoder
    in_channels: int = 3  # colour channels
    patch_size: int = 14  # side of a patch, pixels
    temporal_patch_size: int = 2  # frames of a patch; a still picture is repeated
    spatial_merge_size: int = 2  # side of the square of patches that becomes a decoder token
    rope_theta: float = 10000.0  # base of the geometric series of wavelengths
    window_size: int = 0  # side of the attention windows, pixels; 0: none
    fullatt_block_indexes: tuple[int, ...] = ()  # blocks that attend to the whole picture

    def __post_init__(self) -> None:
        """Refuses values that do not fit together."""
        # Queries and keys are rotated in pairs, half of them by rows and half by columns.
        heads = ("4 num_heads", 4 * self.num_attention_heads)
        check_parts("vision_config: width", ("embed_dim", self.hidden_size), heads)
        if self.window_size and not self.window_side:
            raise CheckpointError(f"vision_config: window_size {self.window_size} is smaller than a merged patch.")

    @property
    def patch_numbers(self) -> int:
        """Length of a flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_side(self) -> int:
        """Side of a window in decoder tokens, 0 without windows."""
        return self.window_size // self.spatial_merge_size // self.patch_size


def _vision_config(fields: Json, *, old: bool) -> QwenVisionConfig:
    """Reads the `vision_config` of Qwen2-VL (`old`) or Qwen2.5-VL."""
    names = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads", "in_chans": "in_channels"}
    fields = {names.get(name, name): value for name, value in fields.items() if value is not None}
    rotary = dict(fields.pop("rope_scaling", None) or fields.pop("rope_parameters", None) or {})
    kind = rotary.pop("type", "axial")
    if rotary.pop("rope_type", kind) not in ("axial", "default"):
        raise CheckpointError("vision_config.rope_parameters: only rope_type 'axial' is implemented.")
    fields.pop("rope_parameters", None)
    fields |= rotary
    for name in ("patch_size", "temporal_patch_size"):
        if isinstance(fields.get(name), list):
            fields[name] = fields[name][0]
    if fields.pop("spatial_patch_size", fields.get("patch_size", 14)) != fields.get("patch_size", 14):
        raise CheckpointError("vision_config.spatial_patch_size differs from patch_size.")
    if old:  # whose `hidden_size` is the decoder's
        width = fields.pop("embed_dim", 1280)
        fields |= {
            "out_hidden_size": fields.get("hidden_size", 3584),
            "hidden_size": width,
            "intermediate_size": int(width * fields.pop("mlp_ratio", 4)),
            "hidden_act": fields.get("hidden_act", "quick_gelu"),
            "rms_norm": False,
            "gated_mlp": False,
        }
    else:
        fields.setdefault("window_size", 112)
        fields["fullatt_block_indexes"] = tuple(fields.get("fullatt_block_indexes", (7, 15, 23, 31)))
    # `tokens_per_second` only spaces the frames of videos.
    return QwenVisionConfig.from_fields(fields, where="vision_config", ignored={"tokens_per_second"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVLConfig(ModelConfig):
    """Shape of a Qwen2-VL or Qwen2.5-VL model."""

    vision_config: QwenVisionConfig  # the tower
    image_token_index: int = 151655  # id of the token that pictures replace

    @classmethod
    def from_hf(cls, fields: Json) -> "QwenVLConfig":
        """Reads a config.json, flat as published or with a `text_config`.

        Raises:
            CheckpointError: for a section of another kind, or an unknown field.
        """
        old, flat = fields["model_type"] == "qwen2_vl", fields.get("text_config") is None
        fields, text, vision = sections(fields, "image")
        top = {"image_token_index": fields.pop("image_token_index", cls.image_token_index)}
        for name in ("video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id"):
            fields.pop(name, None)
        if flat:  # all other fields are the decoder's
            text, fields = {**fields, **text, "model_type": None}, {}
        unknown = sorted(set(fields) - BOOKKEEPING)
        if unknown:
            raise CheckpointError(
                f"the top level of config.json holds fields that jaxid does not implement: {unknown}."
            )
        parts = {
            "text_config": decoder_config(text, "qwen2_vl_text" if old else "qwen2_5_vl_text"),
            "vision_config": _vision_config(vision, old=old),
        }
        config = cls.from_fields(top | parts, where="the top level")
        if config.vision_config.out_hidden_size != config.text_config.hidden_size:
            raise CheckpointError(
                f"the tower makes tokens of width {config.vision_config.out_hidden_size}, the decoder's have "
                f"{config.text_config.hidden_size}."
            )
        return config


def qwen_vl_keys(config: QwenVLConfig) -> list[Key]:
    """The family's key table, in the names that published checkpoints use."""
    vision, bias = config.vision_config, not config.vision_config.rms_norm
    mlp = ("mlp.up_proj", "mlp.down_proj") if vision.gated_mlp else ("mlp.fc1", "mlp.fc2")
    attention = fused_attention_keys("attn.qkv.", "attn.proj")
    block = encoder_block(attention, ("norm1", "norm2"), mlp, norm_bias=bias)
    if vision.gated_mlp:
        block += linear("mlp.gate_proj", "gate", bias=True)
    sizes = {"c": vision.in_channels, "t": vision.temporal_patch_size, "p": vision.patch_size, "q": vision.patch_size}
    tower = [
        Key("patch_embed.proj.weight", "patch_kernel", "d c t p q -> (c t p q) d", sizes),
        *prefixed(block, "blocks.{layer}.", "layers."),
        *layer_norm("merger.ln_q", "merge_norm", bias=bias),
        *linear("merger.mlp.0", "merge_in", bias=True),
        *linear("merger.mlp.2", "merge_out", bias=True),
    ]
    return [
        *prefixed(tower, "visual.", "tower."),
        *prefixed(decoder_keys(config.text_config), "model.", "decoder."),
        unembedding_key(config.text_config, "lm_head.weight"),
    ]


class QwenTower(nnx.Module):
    """Patches of pictures of any size, blocks with 2-D rotary positions, merging of neighbouring patches.

    Every picture is a padded row of P patches. With windows, each window is padded to its full number of patches, so
    that the row can be cut into windows of equal length.
    """

    def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs):
        """Builds the tower; every block parameter carries a leading layer axis."""
        self.config = config
        merged = config.hidden_size * config.spatial_merge_size**2
        norm = RMSNorm if config.rms_norm else LayerNorm
        self.patch_kernel = normal(rngs, (config.patch_numbers, config.hidden_size), 0.02)
        self.layers = stacked(lambda rngs: Block(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.merge_norm = norm(config.hidden_size, config.layer_norm_eps)
        self.merge_in = Linear(merged, merged, bias=True, rngs=rngs)
        self.merge_out = Linear(merged, config.out_hidden_size, bias=True, rngs=rngs)

    def __call__(
        self,
        pixels: Float[Array, "N P F"],
        positions: Int[Array, "N P 2"],
        valid: Bool[Array, "N P"],
        states: Sequence[int] | None = None,
    ) -> Float[Array, "S N P D"]:
        """Hidden states, as in `run_blocks`: all of them, or those that `states` names."""
        config, depth = self.config, self.config.num_hidden_layers
        quarter = config.hidden_size // config.num_attention_heads // 2
        rotation = rope.axial_rotations(positions, rope.inverse_frequencies(quarter, config.rope_theta))
        pictures, window = pixels.shape[0], (config.window_side * config.spatial_merge_size) ** 2
        everywhere = np.isin(np.arange(depth), config.fullatt_block_indexes) if window else None

        def read_picture(query: Array, key: Array, value: Array) -> Array:
            return attention.attend(query, key, value, masks.everything(valid.shape[1], valid))

        def read_window(query: Array, key: Array, value: Array) -> Array:
            query, key, value = (heads.reshape(-1, window, *heads.shape[2:]) for heads in (query, key, value))
            mixed = attention.attend(query, key, value, masks.everything(window, valid.reshape(-1, window)))
            return mixed.reshape(pictures, -1, *mixed.shape[2:])

        def read(layer: Layer) -> Read:
            if everywhere is None:
                return read_picture
            here = jnp.asarray(everywhere)[layer]

            def either(query: Array, key: Array, value: Array) -> Array:
                return jax.lax.cond(here, read_picture, read_window, query, key, value)

            return either

        x = flat_product(pixels, self.patch_kernel[...])
        return run_blocks(self.layers, x, states, read=read, rotation=rotation)

    def merge(self, states: Float[Array, "N P D"]) -> Float[Array, "N I D2"]:
        """Squares of neighbouring patches as decoder tokens."""
        together = self.config.spatial_merge_size**2
        x = self.merge_norm(states)
        x = x.reshape(x.shape[0], x.shape[1] // together, together * x.shape[2])
        return self.merge_out(jax.nn.gelu(self.merge_in(x), approximate=False))


class QwenVL(Network):
    """The network."""

    def __init__(self, config: QwenVLConfig, *, rngs: nnx.Rngs):
        """Builds tower and decoder."""
        self.config = config
        self.tower = QwenTower(config.vision_config, rngs=rngs)
        self.decoder = Decoder(config.text_config, rngs=rngs)

    def tower_states(self, inputs: Inputs, states: Sequence[int] | None = None) -> Float[Array, "S N P D"]:
        """The tower's hidden states: all of them, or those that `states` names."""
        positions, valid = inputs.extras["patch_positions"], inputs.extras["patch_valid"]
        return self.tower(self.pixels(inputs), positions, valid, states)

    def features(self, inputs: Inputs) -> Float[Array, "N I D"]:
        """The pictures' decoder tokens."""
        return self.tower.merge(self.tower_states(inputs, [-1])[0])


def token_indices(rows: int, columns: int, window: int) -> Int[np.ndarray, "I"]:
    """Index of each of a picture's decoder tokens, in reading order, among its padded tokens.

    Without windows nothing is padded. With them, the windows follow each other, each padded to window * window tokens.

    Args:
        rows: rows of tokens.
        columns: columns of tokens.
        window: side of a window in tokens, 0 without windows.
    """
    if not window:
        return np.arange(rows * columns)
    row, column = (indices.ravel() for indices in np.mgrid[:rows, :columns])
    across = -(-columns // window)
    inside = row % window * window + column % window
    return (row // window * across + column // window) * window**2 + inside


class QwenVLProcessor(Processor):
    """Pictures of any size; a decoder token for every square of patches."""

    config: QwenVLConfig

    frame = ("<|vision_start|>", "<|vision_end|>")
    most_size = 2**24  # of a picture in pixels

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Length of a flattened patch of a colour picture."""
        vision = self.config.vision_config
        return (3 * vision.temporal_patch_size * vision.patch_size**2,)

    @classmethod
    def load_image_processor(cls, folder: Path, config: ModelConfig) -> ImageProcessor:
        """The checkpoint's image processor.

        Raises:
            CheckpointError: if it is missing or unreadable, or does not cut the patches that the tower reads.
        """
        found, vision = super().load_image_processor(folder, config), config.vision_config
        sizes = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        for name, size in sizes.items():
            own = getattr(found, name, None)
            if own != size:
                raise CheckpointError(f"the image processor in {folder} has {name} {own}, config.json has {size}.")
        return found

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens of a photograph of 640 x 480 pixels."""
        grid = self._grids([self.open(np.zeros((480, 640, 3), np.uint8))])[1][0]
        return int(grid[1] * grid[2]) // self.config.vision_config.spatial_merge_size**2

    def _grids(self, opened: Sequence[PILImage]) -> tuple[np.ndarray, np.ndarray]:
        found = processed(self.image_processor, opened)
        return np.asarray(found["pixel_values"], np.float32), np.asarray(found["image_grid_thw"])

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as rows of patches, all padded to the same length."""
        vision = self.config.vision_config
        side, window = vision.spatial_merge_size, vision.window_side
        together = side * side
        patches, grids = self._grids([self.open(picture) for picture in pictures])
        shapes = [(int(rows) // side, int(columns) // side) for _, rows, columns in grids]
        tokens_at = [token_indices(rows, columns, window) for rows, columns in shapes]
        unit = max(1, window * window)
        most = bucketed(max(-(-int(own.max() + 1) // unit) for own in tokens_at)) * unit
        pixels = np.zeros((len(pictures), most, together, patches.shape[1]), np.float32)
        positions = np.zeros((len(pictures), most, together, 2), np.int32)
        valid = np.zeros((len(pictures), most, together), bool)
        tokens, first = [], 0
        for index, ((rows, columns), own) in enumerate(zip(shapes, tokens_at, strict=True)):
            count = rows * columns
            pixels[index, own] = patches[first * together : (first + count) * together].reshape(count, together, -1)
            token, inner = np.mgrid[:count, :together]
            positions[index, own, :, 0] = token // columns * side + inner // side
            positions[index, own, :, 1] = token % columns * side + inner % side
            valid[index, own] = True
            tokens.append(PictureTokens(self.placeholder * count, index * most + own, (rows, columns)))
            first += count
        flat = (len(pictures), most * together)
        extras = {"patch_positions": positions.reshape(*flat, 2), "patch_valid": valid.reshape(flat)}
        return Encoded(pixels.reshape(*flat, -1), tuple(tokens), extras, apart(members))

    def rope_positions(
        self, token_ids: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"], shown: Shown
    ) -> Int[np.ndarray, "B A T"]:
        """Positions in time, height and width.

        A picture's tokens share a time; the text after it continues from the picture's largest position.

        Source: `Qwen2VLModel.get_rope_index`.
        """
        batch, length = token_ids.shape
        found = np.zeros((batch, 3, length), np.int32)
        for row, pictures in enumerate(shown):
            here = np.flatnonzero((token_ids[row] == self.image_token_id) & valid[row])
            position, at = 0, 0
            for picture in pictures:
                assert picture.grid is not None
                rows, columns = picture.grid
                start = int(here[0])
                found[row, :, at:start] = position + np.arange(start - at)
                position += start - at
                at = start + rows * columns
                down, across = (indices.ravel() for indices in np.mgrid[:rows, :columns])
                found[row, :, start:at] = position + np.stack([0 * down, down, across])
                position += max(rows, columns)
                here = here[rows * columns :]
            found[row, :, at:] = position + np.arange(length - at)
        return found


FAMILY = Family(
    model_types=("qwen2_vl", "qwen2_5_vl"),
    config=QwenVLConfig.from_hf,
    network=QwenVL,
    keys=qwen_vl_keys,
    processor=QwenVLProcessor,
    renames=((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),  # transformers >= 4.52
    unused=ROTARY,
    checkpoints={
        "qwen2-2b": Checkpoint("Qwen/Qwen2-VL-2B-Instruct", belief_swap=hidden_states(6, 16)),
        "qwen-3b": Checkpoint("Qwen/Qwen2.5-VL-3B-Instruct", belief_swap=hidden_states(8, 18)),
        "qwen-7b": Checkpoint("Qwen/Qwen2.5-VL-7B-Instruct", belief_swap=hidden_states(6, 16)),
    },
)
