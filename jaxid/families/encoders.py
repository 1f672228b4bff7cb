"""Which families of CLIP-like models there are, and the aliases of published checkpoints."""

from collections.abc import Mapping

from jaxid.families import blip, clip, coca, flava, openclip, siglip
from jaxid.families.registry import Family

ENCODERS: Mapping[str, Family] = {
    "blip": Family(
        config=blip.BlipConfig.from_hf, network=blip.Blip, keys=blip.blip_keys, renames=(), unused=blip.UNUSED
    ),
    "clip": Family(
        config=clip.CLIPConfig.from_hf, network=clip.CLIP, keys=clip.clip_keys, renames=(), unused=clip.UNUSED
    ),
    "flava": Family(
        config=flava.FlavaConfig.from_hf,
        network=flava.Flava,
        keys=flava.flava_keys,
        renames=flava.RENAMES,
        unused=flava.UNUSED,
    ),
    "open_clip": Family(
        config=openclip.openclip_config, network=clip.CLIP, keys=openclip.openclip_keys, renames=(), unused=()
    ),
    "open_clip_coca": Family(
        config=coca.CoCaConfig.from_openclip,
        network=coca.CoCa,
        keys=coca.coca_keys,
        renames=(),
        unused=coca.UNUSED,
    ),
    "siglip": Family(
        config=siglip.SiglipConfig.from_hf,
        network=siglip.Siglip,
        keys=siglip.siglip_keys,
        renames=(),
        unused=clip.UNUSED,
    ),
}
"""Families by the `model_type` of their config.json, and OpenCLIP's two."""

ENCODER_ALIASES: Mapping[str, str] = {
    "clip-b32": "openai/clip-vit-base-patch32",
    "clip-b16": "openai/clip-vit-base-patch16",
    "clip-l14": "openai/clip-vit-large-patch14",
    "clip-l14-336": "openai/clip-vit-large-patch14-336",
    "siglip-b16": "google/siglip-base-patch16-224",
    "blip-b16": "Salesforce/blip-itm-base-coco",
    "flava": "facebook/flava-full",
    "openclip-b32": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "coca-b32": "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
}
"""Short names of published checkpoints."""
