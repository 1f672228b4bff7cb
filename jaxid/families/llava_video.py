"""LLaVA-Video and LLaVA-OneVision: SigLIP tower, projector, pooled frames, Qwen2 decoder.

One network in two published layouts: LLaVA-NeXT's own (`model_type` "llava_qwen") and that of Hugging Face's
LlavaOnevisionForConditionalGeneration.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.errors import CheckpointError, InputError
from jaxid.families.base import Checkpoint, Family, sections
from jaxid.families.llava import RENAMES, UNUSED, Llava, LlavaConfig, feature_layers, llava_keys
from jaxid.families.llava_packing import NEWLINE_POSITIONS, POOL_MODES, Layout, clip_rows, picture_layout, pooling
from jaxid.io import read_json, reading
from jaxid.nn.decoder_config import ModelConfig, decoder_config, decoder_keys, unembedding_key
from jaxid.nn.fields import Json
from jaxid.nn.inputs import Inputs
from jaxid.nn.keys import Key, linear, prefixed
from jaxid.nn.layers import normal
from jaxid.nn.network import of_own
from jaxid.nn.vision import state_indices, vision_config, vision_keys
from jaxid.prompts.base import (
    SMALL,
    Encoded,
    ImageProcessor,
    PictureTokens,
    Shown,
    Tokenizer,
    apart,
    bucketed,
    check_settings,
    load_image_processor,
    pixel_values,
    processed,
)
from jaxid.prompts.pictures import Clip, Picture, open_picture
from jaxid.prompts.processor import Processor

SO400M_TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}
"""SigLIP so400m-patch14-384 without its last block, which is in neither layout."""

# Fields of a flat LLaVA-NeXT config that describe the decoder.
_TEXT_FIELDS = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act rms_norm_eps rope_theta rope_parameters sliding_window use_sliding_window max_window_layers layer_types
max_position_embeddings tie_word_embeddings""".split()
)

# Fields about training, about the prompt's text (time instruction) or about pictures, which are not read in this
# layout; and fields that LLaVA-NeXT itself ignores: its SigLIP tower always returns the patches after its last block,
# `image_token_index` never reaches the embedding, and `rope_scaling` is overwritten with None.
_UNREAD = frozenset(
    """add_time_instruction delay_load faster_token_stride force_sample freeze_mm_mlp_adapter frames_upbound
image_aspect_ratio image_crop_resolution image_grid_pinpoints image_split_resolution image_token_index mm_hidden_size
mm_projector_lr mm_resampler_location mm_spatial_pool_out_channels mm_tunable_parts mm_vision_select_feature
mm_vision_select_layer mm_vision_tower_lr pos_skipping_range rope_scaling tokenizer_model_max_length
tokenizer_padding_side tune_mm_mlp_adapter unfreeze_mm_vision_tower use_mm_proj use_pos_skipping
vision_tower_pretrained""".split()
)

# Settings with a single implemented value, and their default.
_ONLY: Mapping[str, tuple[object, object]] = {
    "add_faster_video": (False, False),
    "mm_patch_merge_type": ("spatial_unpad", "flat"),
    "mm_projector_type": ("mlp2x_gelu", "linear"),
    "mm_resampler_type": (None, None),
    "mm_spatial_pool_stride": (2, 2),
    "mm_use_im_patch_token": (False, False),
    "mm_use_im_start_end": (False, False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaVideoConfig(LlavaConfig):
    """Shape of a LLaVA-Video model; names as in LLaVA-NeXT's and HF's configs."""

    image_token_index: int = 151646  # id of the token that pictures replace
    video_token_index: int = 151647  # id of the token that clips replace
    vision_feature_select_strategy: str = "full"  # "default" drops a class token, which SigLIP does not have
    vision_feature_layer: tuple[int, ...] = (-1,)  # tower hidden states to project, concatenated
    image_grid_pinpoints: tuple[
        tuple[int, int], ...
    ] = ()  # heights and widths to which pictures are fitted; none: clips
    max_squares: int = 9  # pictures with the tokens of more squares are interpolated down
    mm_spatial_pool_mode: str = "bilinear"  # how frames are halved, "bilinear" or "average"
    mm_newline_position: str = "one_token"  # what `image_newline` follows in a clip, see NEWLINE_POSITIONS

    @classmethod
    def from_hf(cls, fields: Json) -> "LlavaVideoConfig":
        """Reads a config.json of Hugging Face's LLaVA-OneVision layout.

        Raises:
            CheckpointError: for a tower or decoder of another kind, or an unknown field or setting.
        """
        fields, text, vision = sections(fields, "image", "video", tower=SO400M_TOWER)
        fields["vision_feature_layer"] = feature_layers(fields, -1)
        ratio = fields.pop("vision_aspect_ratio", None) or "anyres_max_9"
        found = re.fullmatch(r"anyres_max_(\d+)", ratio)
        if not found or found[1] == "0":
            raise CheckpointError(f"vision_aspect_ratio {ratio!r} is not 'anyres_max_' followed by an integer.")
        tower = vision_config(vision, "siglip_vision_model")
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
        # There is always an image_newline parameter.
        ignored = {"image_seq_length", "vocab_size", "use_image_newline_parameter", "ignore_index"}
        return _checked(cls.from_fields(fields | read, where="the top level", ignored=ignored))

    @classmethod
    def from_original(cls, fields: Json) -> "LlavaVideoConfig":
        """Reads a flat config.json of LLaVA-NeXT's own layout.

        The tower is given by its name; a checkpoint with another SigLIP tower may describe it in `vision_config`.

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
    def frame_side(self) -> int:
        """Tokens along a side of a frame."""
        return len(pooling(self.vision_config.patch_side, self.mm_spatial_pool_mode))

    def layout(self, height: int, width: int, *, alone: bool) -> Layout:
        """Tokens of a picture of that height and width, see `picture_layout`."""
        pinpoints = self.image_grid_pinpoints
        return picture_layout(height, width, self.vision_config, pinpoints, self.max_squares, alone=alone)


def _checked(config: LlavaVideoConfig) -> LlavaVideoConfig:
    """The config itself, unless its parts do not fit together."""
    strategy = config.vision_feature_select_strategy
    state_indices(config.vision_feature_layer, config.vision_config.num_hidden_layers)
    if strategy != ("default" if config.vision_config.class_token else "full"):
        raise CheckpointError(f"vision_feature_select_strategy {strategy!r} does not select the tower's patches.")
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


class LlavaVideo(Llava):
    """The network: pictures are cut into squares; a frame of a clip is one square, whose patches are pooled.

    `Inputs.extras` may hold "frames", Int[M], the indices of the squares that are frames, and "taps", Int[R, 4], with
    "weights", Float[R, 4], the patches that are mixed into further tokens.
    """

    config: LlavaVideoConfig

    def __init__(self, config: LlavaVideoConfig, *, rngs: nnx.Rngs):
        """Builds tower, projector, decoder and the newline token."""
        super().__init__(config, rngs=rngs)
        width = config.text_config.hidden_size
        self.newline = normal(rngs, (width,), width**-0.5)

    def features(self, inputs: Inputs) -> Float[Array, "R D"]:
        """`image_newline`, then the patches of all squares if there are pictures, frames' tokens and mixed tokens."""
        squares = self.image_features(self.pixels(inputs))
        flat = squares.reshape(-1, squares.shape[-1])
        parts, extras = [self.newline[...][None].astype(flat.dtype)], inputs.extras
        frames = extras.get("frames")
        if frames is None or len(frames) < len(squares):
            parts.append(flat)
        if frames is not None:
            shown = squares if len(frames) == len(squares) else jnp.take(squares, jnp.asarray(frames), axis=0)
            parts.append(self.pooled(shown).reshape(-1, flat.shape[-1]))
        if "taps" in extras:
            mixed = jnp.take(flat, jnp.asarray(extras["taps"]), axis=0).astype(jnp.float32)
            parts.append(jnp.einsum("rk,rkd->rd", jnp.asarray(extras["weights"]), mixed).astype(flat.dtype))
        return jnp.concatenate(parts)

    def pictured(self, inputs: Inputs) -> Float[Array, "B T D"]:
        """The token at every position that a picture or clip has; clips of equal length can be divided."""
        if not inputs.apart:
            return super().pictured(inputs)
        newline = self.newline[...]
        found = of_own(self.pooled(self.image_features(self.pixels(inputs))), inputs.image_rows, shared=1)
        return jnp.where((inputs.image_rows == 0)[..., None], newline.astype(found.dtype), found)

    def pooled(self, squares: Float[Array, "M I D"]) -> Float[Array, "M P D"]:
        """Frames at half their resolution."""
        matrix = jnp.asarray(pooling(self.config.vision_config.patch_side, self.config.mm_spatial_pool_mode))
        grid = rearrange(squares, "m (y x) d -> m y x d", x=self.config.vision_config.patch_side).astype(jnp.float32)
        grid = jnp.einsum("vy,myxd->mvxd", matrix, grid)
        grid = jnp.einsum("wx,mvxd->mvwd", matrix, grid)
        return rearrange(grid, "m v w d -> m (v w) d").astype(squares.dtype)


IMAGE_TOKEN = "<image>"

# LLaVA-NeXT's conversation "qwen_1_5", with clips before the user's text.
QWEN_TEMPLATE = """{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list %}\
{% for part in pictures %}{{ '<image>' + ('\n' if loop.last else ' ') }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{% endif %}\
{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


class LlavaVideoProcessor(Processor):
    """Clips in LLaVA-NeXT's own layout; its way of reading single pictures is not implemented."""

    config: LlavaVideoConfig
    template = QWEN_TEMPLATE
    trial = (Clip([SMALL]),)
    tokenizer_of = "qwen2"

    @staticmethod
    def token_id(tokenizer: Tokenizer, config: ModelConfig) -> int:
        """Id of `<image>`, which is added if the tokenizer lacks it; its embedding is never read."""
        del config
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @classmethod
    def load_image_processor(cls, folder: Path, config: ModelConfig) -> ImageProcessor:
        """SigLIP's image processor; its settings are constants in LLaVA-NeXT."""
        del folder
        side = config.vision_config.image_size
        settings = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return frame_processor(settings)

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens of a clip of eight frames."""
        return len(clip_rows(8, self.config.frame_side, self.config.mm_newline_position, 1))

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Clips as frames and tokens.

        Raises:
            InputError: for a picture, or for a frame that cannot be opened.
        """
        side, frames, tokens, first = self.config.frame_side, [], [], 1
        for clip in pictures:
            if not isinstance(clip, Clip):
                raise InputError(
                    "this checkpoint reads clips, not pictures: wrap frames in jaxid.Clip([picture, ...])."
                )
            frames.append(self.frames(clip, self.image_processor))
            rows = clip_rows(len(clip.frames), side, self.config.mm_newline_position, first)
            tokens.append(PictureTokens(self.placeholder * len(rows), rows))
            first += len(clip.frames) * side * side
        pixels = np.concatenate(frames)
        alone = apart(members) and len(set(map(len, frames))) == 1
        return Encoded(pixels, tuple(tokens), {"frames": np.arange(len(pixels), dtype=np.int32)}, alone)

    def frames(self, clip: Clip, processor: ImageProcessor) -> Float[np.ndarray, "M C Y X"]:
        """The pixels that an image processor makes of a clip's frames."""
        return pixel_values(processor, [open_picture(frame) for frame in clip.frames])


def frame_processor(settings: Json) -> ImageProcessor:
    """An image processor that resizes to a square and normalises."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(**settings)


class Processors(NamedTuple):
    """Image processors of Hugging Face's layout.

    Attributes:
        pictures: cuts pictures into squares.
        frames: resizes frames of clips.
    """

    pictures: ImageProcessor
    frames: ImageProcessor


class OnevisionProcessor(LlavaVideoProcessor):
    """Pictures and clips in Hugging Face's layout."""

    template = tokenizer_of = None
    trial = (SMALL, Clip([SMALL]))
    token_id = staticmethod(Processor.token_id)

    def __init__(self, tokenizer: Tokenizer, image_processor: Processors, config: LlavaVideoConfig):
        """Takes loaded parts and the network's config.

        Raises:
            CheckpointError: if the tokenizer lacks the token of clips.
        """
        super().__init__(tokenizer, image_processor, config)
        self.clip_placeholder = tokenizer.convert_ids_to_tokens(config.video_token_index)
        if self.clip_placeholder in (None, tokenizer.unk_token):
            raise CheckpointError(f"the tokenizer has no token of id {config.video_token_index}, which clips need.")

    @classmethod
    def load_image_processor(cls, folder: Path, config: ModelConfig) -> Processors:
        """The checkpoint's image processor, and one that does to a frame what its video processor does.

        Raises:
            CheckpointError: if one is missing, unreadable or not implemented.
        """
        pictures = load_image_processor(folder, cls.most_size)
        settings = _video_settings(folder) or pictures.to_dict()
        check_settings(settings, folder)
        side = config.vision_config.image_size
        with reading(folder, "a video processor"):
            size = dict(settings.get("size") or {})
        if (size.get("height"), size.get("width")) != (side, side) or settings.get("do_center_crop"):
            raise CheckpointError(f"the video processor in {folder} does not resize frames to {side} x {side} pixels.")
        names = "size resample do_resize do_rescale rescale_factor do_normalize image_mean image_std".split()
        with reading(folder, "a video processor"):
            return Processors(pictures, frame_processor({name: settings[name] for name in names if name in settings}))

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens of a photograph of 640 x 480 pixels."""
        return len(self.config.layout(480, 640, alone=True).rows)

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as squares, clips as frames, and both as tokens.

        Raises:
            InputError: for one that cannot be opened, or a picture that is alone in one prompt and beside others
                in another, since its squares would differ.
        """
        cut = self._cut(pictures, members)
        tiles = [cut[index][0] for index in sorted(cut)]
        clips = [picture for picture in pictures if isinstance(picture, Clip)]
        frames = [self.frames(clip, self.image_processor.frames) for clip in clips]
        count = sum(map(len, tiles))
        if count:
            tiles.append(np.zeros((bucketed(count) - count, *tiles[0].shape[1:]), np.float32))
            count = bucketed(count)
        pixels = np.concatenate([*tiles, *frames])

        # Rows of the features, in the order of `LlavaVideo.features`.
        patches, side = self.config.vision_config.num_patches, self.config.frame_side
        clip_row = 1 + (len(pixels) * patches if count else 0)
        mixed_row = clip_row + sum(map(len, frames)) * side**2
        tokens, mixes, weights, square = [], [], [], 0
        for index, picture in enumerate(pictures):
            if isinstance(picture, Clip):
                rows = clip_rows(len(picture.frames), side, self.config.mm_newline_position, clip_row)
                clip_row += len(picture.frames) * side**2
                tokens.append(PictureTokens(self.clip_placeholder * len(rows), rows))
                continue
            layout = cut[index][1]
            rows = np.where(layout.rows >= 0, 1 + square * patches + layout.rows, 0)
            rows = np.where(layout.rows < -1, mixed_row - 2 - layout.rows, rows)
            tokens.append(PictureTokens(self.placeholder * len(rows), rows))
            mixes.append(square * patches + layout.taps)
            weights.append(layout.weights)
            mixed_row += len(layout.taps)
            square += layout.squares
        extras: dict[str, np.ndarray] = {}
        if frames:
            extras["frames"] = np.arange(count, len(pixels), dtype=np.int32)
        mixed = sum(map(len, mixes))
        if mixed:
            room = ((0, bucketed(mixed) - mixed), (0, 0))
            extras["taps"] = np.pad(np.concatenate(mixes), room).astype(np.int32)
            extras["weights"] = np.pad(np.concatenate(weights), room)
        return Encoded(pixels, tuple(tokens), extras, not count and apart(members) and len(set(map(len, frames))) == 1)

    def _cut(
        self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]
    ) -> dict[int, tuple[Float[np.ndarray, "S C Y X"], Layout]]:
        """Squares and layout of all pictures but clips, by their indices."""
        alone: dict[int, bool] = {}
        for shown in members:
            stills = [index for index in shown if not isinstance(pictures[index], Clip)]
            for index in stills:
                if alone.setdefault(index, len(stills) == 1) != (len(stills) == 1):
                    raise InputError(
                        f"picture {index} is alone in one prompt and beside others in another, and would be cut "
                        "differently: prepare these prompts in separate batches."
                    )
        opened = {index: self.open(pictures[index]) for index in sorted(alone)}
        together = [index for index in opened if not alone[index]]
        processor, squares = self.image_processor.pictures, {}
        if together:
            # A list within the list is the pictures of one prompt.
            made = processed(processor, [[opened[index] for index in together]])["pixel_values"]
            squares = dict(zip(together, made, strict=True))
        cut = {}
        for index, image in opened.items():
            if alone[index]:
                squares[index] = processed(processor, [image])["pixel_values"][0]
            layout = self.config.layout(image.height, image.width, alone=alone[index])
            if len(squares[index]) != layout.squares:
                raise CheckpointError(
                    f"preprocessor_config.json or processor_config.json cuts a picture into {len(squares[index])} "
                    f"squares, but config.json's image_grid_pinpoints make {layout.squares}."
                )
            cut[index] = np.asarray(squares[index], np.float32), layout
        return cut

    def image_rows(
        self, token_ids: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"], shown: Shown
    ) -> Int[np.ndarray, "B T"]:
        """Which row of the features is at each position, or -1; clips have their own token."""
        clips = token_ids == self.config.video_token_index
        return super().image_rows(np.where(clips, self.image_token_id, token_ids).astype(token_ids.dtype), valid, shown)


def _video_settings(folder: Path) -> Json | None:
    """Settings of the checkpoint's video processor, from either place where Hugging Face keeps them."""
    for name, part in (("video_preprocessor_config.json", None), ("processor_config.json", "video_processor")):
        found = read_json(folder / name, missing={})
        found = found if part is None else found.get(part)
        if not isinstance(found, dict | None):
            raise CheckpointError(f"{folder / name} holds {found!r:.100} where {part} should hold settings.")
        if found:
            return found
    return None


ONEVISION = Family(
    model_types=("llava_onevision",),
    config=LlavaVideoConfig.from_hf,
    network=LlavaVideo,
    keys=onevision_keys,
    processor=OnevisionProcessor,
    renames=(*RENAMES, (r"^model\.image_newline$", "image_newline")),
    unused=UNUSED,
)

ORIGINAL = Family(
    model_types=("llava_qwen",),
    config=LlavaVideoConfig.from_original,
    network=LlavaVideo,
    keys=original_keys,
    processor=LlavaVideoProcessor,
    unused=UNUSED,
    checkpoints={"llava-video": Checkpoint("lmms-lab/LLaVA-Video-7B-Qwen2")},
)
