"""LLaVA-Video and LLaVA-OneVision: SigLIP tower, projector, pooled frames, Qwen2 decoder.

One network in two published layouts: LLaVA-NeXT's own (`model_type` "llava_qwen") and that of Hugging Face's
LlavaOnevisionForConditionalGeneration.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxid.errors import CheckpointError
from jaxid.families.base import Family
from jaxid.families.llava import RENAMES, UNUSED, Llava, LlavaConfig, llava_keys
from jaxid.nn.decoder_config import decoder_config, decoder_keys, unembedding_key
from jaxid.nn.inputs import Inputs
from jaxid.nn.keys import Key, linear, prefixed
from jaxid.nn.layers import normal, with_token_indices
from jaxid.nn.vision import state_indices, vision_config, vision_keys

SO400M_TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}
"""SigLIP so400m-patch14-384 without its last block, which neither layout keeps."""

POOL_MODES = ("bilinear", "average")
NEWLINE_POSITIONS = ("grid", "frame", "one_token", "no_token")

# Fields of a flat LLaVA-NeXT config that describe the decoder.
_TEXT_FIELDS = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act rms_norm_eps rope_theta rope_parameters sliding_window use_sliding_window max_window_layers layer_types
max_position_embeddings tie_word_embeddings""".split()
)

# Fields that say how the model was trained; that the prompt's text answers (time instruction); that only concern
# pictures, which are not read in this layout; or that LLaVA-NeXT's SigLIP tower does not read (it always gives the
# patches after the last block left to it). `image_token_index` is a number that never reaches the embedding, and
# LLaVA-NeXT overwrites `rope_scaling` with None.
_UNREAD = frozenset(
    """add_time_instruction delay_load faster_token_stride force_sample freeze_mm_mlp_adapter frames_upbound
image_aspect_ratio image_crop_resolution image_grid_pinpoints image_split_resolution image_token_index mm_hidden_size
mm_projector_lr mm_resampler_location mm_spatial_pool_out_channels mm_tunable_parts mm_vision_select_feature
mm_vision_select_layer mm_vision_tower_lr pos_skipping_range rope_scaling tokenizer_model_max_length
tokenizer_padding_side tune_mm_mlp_adapter unfreeze_mm_vision_tower use_mm_proj use_pos_skipping
vision_tower_pretrained""".split()
)

# Settings of which one value is implemented, and what an absent field means.
_ONLY: Mapping[str, tuple[Any, Any]] = {
    "add_faster_video": (False, False),
    "mm_patch_merge_type": ("spatial_unpad", "flat"),
    "mm_projector_type": ("mlp2x_gelu", "linear"),
    "mm_resampler_type": (None, None),
    "mm_spatial_pool_stride": (2, 2),
    "mm_use_im_patch_token": (False, False),
    "mm_use_im_start_end": (False, False),
}


def taps(length: int, new: int) -> tuple[Int[np.ndarray, "new 2"], Float[np.ndarray, "new 2"]]:
    """Linear interpolation of a row of values to another length, as `torch.nn.functional.interpolate` does it.

    Args:
        length: number of values.
        new: number wanted.

    Returns:
        Which two values each new one mixes, and their weights (corners not aligned, nothing smoothed).
    """
    # PyTorch multiplies and subtracts in one rounding of float32, which at place 80 is worth 1e-5 of a weight.
    step = float(np.float32(length) / np.float32(new))
    places = np.maximum(step * (np.arange(new) + 0.5) - 0.5, 0.0).astype(np.float32)
    first = np.minimum(places.astype(np.int64), length - 1)
    share = places - first.astype(np.float32)
    both = np.stack([first, np.minimum(first + 1, length - 1)], axis=1)
    return both, np.stack([np.float32(1) - share, share], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaVideoConfig(LlavaConfig):
    """Shape of a LLaVA-Video model; names as in LLaVA-NeXT's and HF's configs."""

    image_token_index: int = 151646  # id of the token that pictures replace
    video_token_index: int = 151647  # id of the token that clips replace
    vision_feature_select_strategy: str = "full"  # "default" drops a class token, which SigLIP does not have
    vision_feature_layer: tuple[int, ...] = (-1,)  # tower hidden states to project, concatenated
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()  # heights and widths that a picture is cut from; none: clips
    max_squares: int = 9  # a picture's tokens are interpolated down to about those of so many squares
    mm_spatial_pool_mode: str = "bilinear"  # how frames are halved, "bilinear" or "average"
    mm_newline_position: str = "one_token"  # behind what of a clip `image_newline` stands: "grid" rows, "frame" ...

    # For the host's side too, which does not import the networks.
    taps = staticmethod(taps)

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> "LlavaVideoConfig":
        """Reads a config.json of Hugging Face's LLaVA-OneVision layout.

        Raises:
            CheckpointError: for a tower or decoder of another kind, or an unknown field or setting.
        """
        fields = with_token_indices(fields, "image", "video")
        text, vision = dict(fields.pop("text_config", None) or {}), fields.pop("vision_config", None)
        if fields.pop("tie_word_embeddings", None):
            text["tie_word_embeddings"] = True
        layer = fields.pop("vision_feature_layer", -1)
        fields["vision_feature_layer"] = (layer,) if isinstance(layer, int) else tuple(layer)
        ratio = fields.pop("vision_aspect_ratio", None) or "anyres_max_9"
        found = re.fullmatch(r"anyres_max_(\d+)", ratio)
        if not found or found[1] == "0":
            raise CheckpointError(f"vision_aspect_ratio {ratio!r} is not 'anyres_max_' and a number.")
        tower = vision_config(SO400M_TOWER if vision is None else vision, "siglip_vision_model")
        side = tower.image_size
        steps = range(side, 7 * side, side)
        pinpoints = fields.pop("image_grid_pinpoints", None) or [(y, x) for y in steps for x in steps]
        read = {
            "text_config": decoder_config(text, "qwen2"),
            "vision_config": tower,
            "max_squares": int(found[1]),
            "image_grid_pinpoints": tuple((y, x) for y, x in pinpoints),
        }
        if any(length < side or length % side for size in read["image_grid_pinpoints"] for length in size):
            raise CheckpointError(
                f"image_grid_pinpoints {pinpoints} are not all multiples of the tower's {side} pixels."
            )
        # The image_newline parameter is always there.
        ignored = {"image_seq_length", "vocab_size", "use_image_newline_parameter", "ignore_index"}
        return _checked(cls.from_fields(fields | read, where="the top level", ignored=ignored))

    @classmethod
    def from_original(cls, fields: dict[str, Any]) -> "LlavaVideoConfig":
        """Reads a flat config.json of LLaVA-NeXT's own layout.

        The tower is known by its name; a checkpoint with another SigLIP tower may describe it as `vision_config`.

        Raises:
            CheckpointError: for another tower, or an unknown field or setting.
        """
        fields = {name: value for name, value in fields.items() if name not in _UNREAD and value is not None}
        for name, (implemented, default) in _ONLY.items():
            value = fields.pop(name, default)
            if value != implemented:
                raise CheckpointError(f"{name}={value!r} is not implemented, only {implemented!r}.")
        vision, name = fields.pop("vision_config", None), str(fields.pop("mm_vision_tower", None))
        if vision is None and not name.rstrip("/").endswith("siglip-so400m-patch14-384"):
            raise CheckpointError(
                f"mm_vision_tower {name!r} is not implemented, only google/siglip-so400m-patch14-384."
            )
        text = {key: fields.pop(key) for key in _TEXT_FIELDS & set(fields)}
        read = {
            "text_config": decoder_config(text, "qwen2"),
            "vision_config": vision_config(SO400M_TOWER if vision is None else vision, "siglip_vision_model"),
        }
        return _checked(cls.from_fields(fields | read, where="the top level"))

    @property
    def patch_side(self) -> int:
        """Rows, and columns, of a square's patches."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def frame_side(self) -> int:
        """Rows, and columns, of a frame's tokens."""
        return len(pooling(self.patch_side, self.mm_spatial_pool_mode))


def _checked(config: LlavaVideoConfig) -> LlavaVideoConfig:
    """The config itself, if its parts fit together."""
    strategy = config.vision_feature_select_strategy
    state_indices(config.vision_feature_layer, config.vision_config.num_hidden_layers)
    if strategy != ("default" if config.vision_config.class_token else "full"):
        raise CheckpointError(f"vision_feature_select_strategy {strategy!r} does not leave the tower's patches.")
    if config.mm_spatial_pool_mode not in POOL_MODES:
        raise CheckpointError(f"mm_spatial_pool_mode {config.mm_spatial_pool_mode!r} is not one of {POOL_MODES}.")
    if config.mm_newline_position not in NEWLINE_POSITIONS:
        raise CheckpointError(f"mm_newline_position {config.mm_newline_position!r} is not one of {NEWLINE_POSITIONS}.")
    return config


def onevision_keys(config: LlavaVideoConfig) -> list[Key]:
    """Key table of Hugging Face's layout, in the names that its published checkpoints use."""
    return [*llava_keys(config), Key("image_newline", "newline")]


def original_keys(config: LlavaVideoConfig) -> list[Key]:
    """Key table of LLaVA-NeXT's layout."""
    bias = config.multimodal_projector_bias
    return [
        *prefixed(vision_keys(config.vision_config), "model.vision_tower.vision_tower.vision_model.", "tower."),
        *linear("model.mm_projector.0", "projector_in", bias=bias),
        *linear("model.mm_projector.2", "projector_out", bias=bias),
        Key("model.image_newline", "newline"),
        *prefixed(decoder_keys(config.text_config), "model.", "decoder."),
        unembedding_key(config.text_config, "lm_head.weight"),
    ]


def pooling(length: int, mode: str) -> Float[np.ndarray, "new length"]:
    """The matrix that halves a row of values: rounded up where it interpolates, down where it averages pairs."""
    if mode == "average":
        pairs = np.repeat(np.eye(length // 2, dtype=np.float32) / 2, 2, axis=1)
        return np.pad(pairs, ((0, 0), (0, length % 2)))
    new = math.ceil(length / 2)
    which, weights = taps(length, new)
    return (np.eye(length, dtype=np.float32)[which] * weights[..., None]).sum(axis=1)


class LlavaVideo(Llava):
    """The network: pictures are cut into squares, frames of clips are one square each, which are pooled.

    `Inputs.extras` may hold "frames", Int[M], which squares are frames, and "taps", Int[R, 4], with "weights",
    Float[R, 4], which patches of all squares are mixed to further tokens.
    """

    config: LlavaVideoConfig

    def __init__(self, config: LlavaVideoConfig, *, rngs: nnx.Rngs):
        """Builds tower, projector, decoder and the token at the end of lines."""
        super().__init__(config, rngs=rngs)
        width = config.text_config.hidden_size
        self.newline = normal(rngs, (width,), width**-0.5)

    def features(self, inputs: Inputs) -> Float[Array, "R D"]:
        """`image_newline`; every patch of every square, if there are pictures; the frames' tokens; mixed tokens."""
        squares = self.image_features(self.pixels(inputs))
        flat = squares.reshape(-1, squares.shape[-1])
        parts, extras = [self.newline[...][None].astype(flat.dtype)], inputs.extras
        frames = extras.get("frames")
        if frames is None or len(frames) < len(squares):
            parts.append(flat)
        if frames is not None:
            pooled = self.pooled(jnp.take(squares, jnp.asarray(frames), axis=0))
            parts.append(pooled.reshape(-1, flat.shape[-1]))
        if "taps" in extras:
            mixed = jnp.take(flat, jnp.asarray(extras["taps"]), axis=0).astype(jnp.float32)
            parts.append(jnp.einsum("rk,rkd->rd", jnp.asarray(extras["weights"]), mixed).astype(flat.dtype))
        return jnp.concatenate(parts)

    def pooled(self, squares: Float[Array, "M I D"]) -> Float[Array, "M P D"]:
        """Frames at half the resolution."""
        matrix = jnp.asarray(pooling(self.config.patch_side, self.config.mm_spatial_pool_mode))
        grid = rearrange(squares, "m (y x) d -> m y x d", x=self.config.patch_side).astype(jnp.float32)
        grid = jnp.einsum("vy,myxd->mvxd", matrix, grid)
        grid = jnp.einsum("wx,mvxd->mvwd", matrix, grid)
        return rearrange(grid, "m v w d -> m (v w) d").astype(squares.dtype)


ONEVISION = Family(
    model_types=("llava_onevision",),
    config=LlavaVideoConfig.from_hf,
    network=LlavaVideo,
    keys=onevision_keys,
    renames=(*RENAMES, (r"^model\.image_newline$", "image_newline")),
    unused=UNUSED,
)

ORIGINAL = Family(
    model_types=("llava_qwen",),
    config=LlavaVideoConfig.from_original,
    network=LlavaVideo,
    keys=original_keys,
    unused=UNUSED,
    aliases={"llava-video": "lmms-lab/LLaVA-Video-7B-Qwen2"},
)
