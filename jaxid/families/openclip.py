"""OpenCLIP's layout of CLIP: its configs and tensor names (`open_clip.CLIP`; NegCLIP's files too)."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxid.errors import CheckpointError
from jaxid.families.base import Checkpoint, Family
from jaxid.families.clip import CLIP, CLIPConfig
from jaxid.nn.fields import Json
from jaxid.nn.keys import Key, encoder_block, fused_attention_keys, layer_norm, prefixed
from jaxid.nn.text import TextConfig
from jaxid.nn.vision import VisionConfig, patch_key
from jaxid.prompts.base import check_settings
from jaxid.prompts.dual import DualProcessor
from jaxid.prompts.pictures import PILImage


def _architecture(embed_dim: int, vision: tuple[int, int, int], text: tuple[int, int]) -> Json:
    """A `model_cfg` from the tower's layers, width and patch size and the text encoder's width and heads."""
    layers, width, patch_size = vision
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": 224, "layers": layers, "width": width, "patch_size": patch_size},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": text[0], "heads": text[1], "layers": 12},
    }


def _coca(config: Json, pooler_heads: int) -> Json:
    vision = {**config["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": pooler_heads}
    return {
        **config,
        "vision_cfg": {**vision, "output_tokens": True},
        "text_cfg": {**config["text_cfg"], "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {},
        "custom_text": True,
    }


_B32, _B16 = (_architecture(512, (12, 768, patch), (512, 8)) for patch in (32, 16))
_L14 = _architecture(768, (24, 1024, 14), (768, 12))
ARCHITECTURES: Mapping[str, Json] = {
    "ViT-B-32": _B32,
    "ViT-B-32-quickgelu": {**_B32, "quick_gelu": True},
    "ViT-B-16": _B16,
    "ViT-B-16-quickgelu": {**_B16, "quick_gelu": True},
    "ViT-L-14": _L14,
    "ViT-L-14-quickgelu": {**_L14, "quick_gelu": True},
    "coca_ViT-B-32": _coca(_B32, 8),
    "coca_ViT-L-14": _coca(_L14, 8),
}
"""The `model_cfg` of OpenCLIP's architectures by name, for weight files that come without one."""


def parts(fields: Json, *further: str) -> tuple[TextConfig, VisionConfig]:
    """Text encoder and tower of a `model_cfg`.

    Args:
        fields: the parsed JSON object.
        further: fields of the top level that the caller handles.

    Raises:
        CheckpointError: for a field that is not implemented.
    """
    unknown = sorted(set(fields) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", *further})
    if unknown:
        raise CheckpointError(f"model_cfg holds fields that jaxid does not implement: {', '.join(unknown)}.")
    vision, text = dict(fields["vision_cfg"]), dict(fields["text_cfg"])
    activation = "quick_gelu" if fields.get("quick_gelu") else "gelu"
    width, text_width = vision.pop("width"), text.pop("width")
    class_token = bool(text.pop("embed_cls", False))
    own = {
        "hidden_size": width,
        "intermediate_size": int(width * vision.pop("mlp_ratio", 4.0)),
        "num_hidden_layers": vision.pop("layers"),
        "num_attention_heads": width // vision.pop("head_width", 64),
        "hidden_act": activation,
        "post_norm": not vision.get("attentional_pool", False),
    }
    text_own = {
        "hidden_size": text_width,
        "intermediate_size": int(text_width * text.pop("mlp_ratio", 4.0)),
        "num_hidden_layers": text.pop("layers"),
        "num_attention_heads": text.pop("heads"),
        "max_position_embeddings": text.pop("context_length") + class_token,
        "hidden_act": activation,
        "eos_token_id": 2,  # the highest id
        "reads_padding": not class_token,
        "class_token": class_token,
    }
    ignored = {"attentional_pool", "attn_pooler_heads", "attn_pooler_queries", "output_tokens"}
    return (
        TextConfig.from_fields({**text, **text_own}, where="text_cfg", ignored=ignored),
        VisionConfig.from_fields({**vision, **own}, where="vision_cfg", ignored=ignored),
    )


def openclip_config(fields: Json) -> CLIPConfig:
    """Reads the `model_cfg` of a CLIP.

    Raises:
        CheckpointError: for a field that is not implemented.
    """
    text, vision = parts(fields)
    if text.class_token or not vision.post_norm:
        raise CheckpointError("a CLIP with vision_cfg.attentional_pool or text_cfg.embed_cls is not implemented.")
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=fields["embed_dim"])


def _blocks() -> list[Key]:
    attention = fused_attention_keys("attn.in_proj_", "attn.out_proj")
    block = encoder_block(attention, ("ln_1", "ln_2"), ("mlp.c_fc", "mlp.c_proj"))
    return prefixed(block, "transformer.resblocks.{layer}.", "layers.")


def tower_keys(config: VisionConfig) -> list[Key]:
    """Key table of the tower without the norm after its last block."""
    keys = [
        patch_key("conv1.weight", config),
        Key("class_embedding", "class_token"),
        Key("positional_embedding", "position"),
        *layer_norm("ln_pre", "pre_norm"),
        *_blocks(),
    ]
    return prefixed(keys, "visual.", "tower.")


def text_keys(config: TextConfig, source: str = "") -> list[Key]:
    """Key table of the text encoder and its projection."""
    keys = [
        Key("token_embedding.weight", "embedding"),
        Key("positional_embedding", "position"),
        *_blocks(),
        *layer_norm("ln_final", "final_norm"),
    ]
    if config.class_token:
        keys.append(Key("cls_emb", "class_token"))
    return [
        *prefixed(keys, source, "text_encoder."),
        Key(f"{source}text_projection", "text_projection.kernel"),
    ]


def openclip_keys(config: CLIPConfig) -> list[Key]:
    """The key table of a CLIP."""
    return [
        *tower_keys(config.vision_config),
        *layer_norm("visual.ln_post", "tower.post_norm"),
        Key("visual.proj", "image_projection.kernel"),
        *text_keys(config.text_config),
        Key("logit_scale", "logit_scale"),
    ]


def kind_of(fields: Json) -> str:
    """The name under which the family of a `model_cfg` is registered."""
    return "open_clip_coca" if "multimodal_cfg" in fields else "open_clip"


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class OpenCLIPImages:
    """Resizes the shorter side, crops the centre and normalises; used like an image processor of transformers."""

    def __init__(self, side: int, settings: Json):
        """Reads a `preprocess_cfg`.

        Args:
            side: side of the pictures that the tower takes, in pixels.
            settings: mean, std, interpolation and resize mode; OpenAI's by default.

        Raises:
            CheckpointError: for a setting that is invalid or not implemented.
        """
        from PIL import Image

        size = settings.get("size", side)
        if not size or any(one != side for one in (size if isinstance(size, list | tuple) else [size])):
            raise CheckpointError(f"preprocess_cfg.size {size} is not the tower's {side}.")
        filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
        name, mode = settings.get("interpolation") or "bicubic", settings.get("resize_mode") or "shortest"
        if str(name) not in filters or mode != "shortest":
            raise CheckpointError(f"preprocess_cfg resizes by {name!r}, {mode!r}, which is not implemented.")
        self.side, self.filter = side, filters[name]
        self.image_mean, self.image_std = settings.get("mean") or MEAN, settings.get("std") or STD
        check_settings({"image_mean": self.image_mean, "image_std": self.image_std}, "preprocess_cfg")

    def __call__(
        self, pictures: Sequence[PILImage], return_tensors: str = "np"
    ) -> dict[str, Float[np.ndarray, "N 3 Y X"]]:
        """The pixels of PIL images."""
        del return_tensors
        return {"pixel_values": np.stack([self._prepared(picture) for picture in pictures])}

    def _prepared(self, picture: PILImage) -> Float[np.ndarray, "3 Y X"]:
        width, height = picture.size
        shortest = min(width, height)
        size = (int(self.side * width / shortest), int(self.side * height / shortest))
        resized = picture.resize(size, self.filter)
        # Python rounds half to even, as the published code does.
        left, top = (round((length - self.side) / 2) for length in size)
        cropped = resized.crop((left, top, left + self.side, top + self.side))
        values = np.asarray(cropped, np.float32).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.asarray(value, np.float32)[:, None, None] for value in (self.image_mean, self.image_std))
        return (values - mean) / std


FAMILY = Family(
    model_types=("open_clip",),
    config=openclip_config,
    network=CLIP,
    keys=openclip_keys,
    processor=DualProcessor,
    checkpoints={"openclip-b32": Checkpoint("laion/CLIP-ViT-B-32-laion2B-s34B-b79K")},
)
