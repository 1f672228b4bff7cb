"""The tiny CLIP-like models that tests compare with Hugging Face's, each through the real loader."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from families.base import randomized

from jaxid.checkpoints.encoders import load_encoder
from jaxid.families.base import Encoder
from jaxid.io import write_json

SCRATCH = tempfile.TemporaryDirectory(prefix="jaxid-encoders-")
WORDS = """a an image of red blue star fish above below to the left right and not without but no small big .""".split()
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]

Tokens = Callable[[Any, np.ndarray, np.ndarray, np.ndarray], dict[str, torch.Tensor]]


def write_word_tokenizer(folder: Path, *, first: str | None, last: str | None, padding: str, window: int) -> None:
    """A word-level tokenizer that frames captions as the family's own does."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    special = list(dict.fromkeys(token for token in (padding, first, last, "<unk>") if token))
    ids = {word: number for number, word in enumerate([*WORDS, *special])}
    # CLIP pools at the highest id.
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    frame = " ".join(part for part in (first, "$A", last) if part)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(token, ids[token]) for token in (first, last) if token]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": window,
        "pad_token": padding,
        "unk_token": "<unk>",
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_image_processor(folder: Path, kind: str, side: int) -> None:
    square = {"height": side, "width": side}
    crops = kind in ("CLIPImageProcessor", "FlavaImageProcessor")
    settings: dict[str, Any] = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": side} if kind == "CLIPImageProcessor" else square,
        "resample": 3,
        "do_center_crop": crops,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    write_json(folder / "preprocessor_config.json", settings | ({"crop_size": square} if crops else {}))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncoderCase:
    """One tiny model.

    Attributes:
        name: how test reports call it.
        build: makes the random Hugging Face model.
        image: from the Hugging Face model and pixels: every token in the joint space, and the pooled picture.
        text: likewise, of token ids and mask.
        tower: where the Hugging Face model keeps the picture blocks.
        text_blocks: where it keeps the captions' blocks.
        frame: first, last and padding token.
        image_processor: its class.
        window: tokens of the longest caption.
    """

    name: str
    build: Callable[[], Any]
    image: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    text: Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    tower: str
    text_blocks: str
    frame: tuple[str | None, str | None, str]
    image_processor: str
    window: int = 12
    side: int = 32


@functools.cache
def folder(case: EncoderCase) -> Path:
    """The checkpoint folder, as `save_pretrained` writes it."""
    path = Path(SCRATCH.name) / case.name
    case.build().save_pretrained(path)
    first, last, padding = case.frame
    write_word_tokenizer(path, first=first, last=last, padding=padding, window=case.window)
    write_image_processor(path, case.image_processor, case.side)
    return path


@functools.cache
def encoder(case: EncoderCase) -> Encoder:
    """The tiny model through jaxid's loader."""
    return load_encoder(folder(case))


@functools.cache
def reference(case: EncoderCase) -> Any:
    """The same through Hugging Face's loader."""
    kind = type(case.build())
    return kind.from_pretrained(folder(case), attn_implementation="eager").eval()


PLAIN = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = PLAIN | {"hidden_size": 20, "vocab_size": len(WORDS) + 4, "max_position_embeddings": 12}
PICTURE = PLAIN | {"image_size": 32, "patch_size": 8}


def clip(name: str, *, eos: int, **text: Any) -> EncoderCase:
    def build() -> Any:
        config = transformers.CLIPConfig(
            text_config={**TEXT, "eos_token_id": eos, **text}, vision_config=PICTURE, projection_dim=16
        )
        return randomized(transformers.CLIPModel(config), name)

    def image(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = model.vision_model(pixel_values=pixels)
        tokens = model.visual_projection(model.vision_model.post_layernorm(found.last_hidden_state))
        return tokens, model.visual_projection(found.pooler_output)

    def text_of(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = model.text_model(input_ids=ids, attention_mask=mask)
        return model.text_projection(found.last_hidden_state), model.text_projection(found.pooler_output)

    return EncoderCase(
        name=name,
        build=build,
        image=image,
        text=text_of,
        tower="vision_model.encoder.layers",
        text_blocks="text_model.encoder.layers",
        frame=("<start>", "<end>", "<pad>"),
        image_processor="CLIPImageProcessor",
    )


def _siglip_build() -> Any:
    vision = PICTURE | {"patch_size": 8, "hidden_size": 24}
    config = transformers.SiglipConfig(text_config=TEXT | {"projection_size": 24}, vision_config=vision)
    return randomized(transformers.SiglipModel(config), "siglip")


def _siglip_image(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = model.vision_model(pixel_values=pixels)
    states = found.last_hidden_state
    alone = [model.vision_model.head(states[:, [token]]) for token in range(states.shape[1])]
    return torch.stack(alone, dim=1), found.pooler_output


def _siglip_text(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    del mask  # the published tokenizer makes none
    found = model.text_model(input_ids=ids)
    return model.text_model.head(found.last_hidden_state), found.pooler_output


def _blip_build() -> Any:
    text = TEXT | {"hidden_size": 24, "encoder_hidden_size": 24}
    config = transformers.BlipConfig(text_config=text, vision_config=PICTURE, image_text_hidden_size=16)
    return randomized(transformers.BlipForImageTextRetrieval(config), "blip")


def _blip_image(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = model.vision_proj(model.vision_model(pixel_values=pixels).last_hidden_state)
    return tokens, tokens[:, 0]


def _blip_text(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = model.text_proj(model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state)
    return tokens, tokens[:, 0]


def _flava_build() -> Any:
    config = transformers.FlavaConfig(
        text_config=TEXT | {"hidden_size": 24},
        image_config=PICTURE,
        multimodal_config=PLAIN | {"num_hidden_layers": 1},
        hidden_size=24,
        projection_dim=16,
    )
    return randomized(transformers.FlavaModel(config), "flava")


def _flava_image(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = model.get_image_features(pixel_values=pixels).pooler_output
    return tokens, tokens[:, 0]


def _flava_text(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    return tokens, tokens[:, 0]


_END = len(WORDS) + 2  # behind the words: padding, start, end
BERT = ("[CLS]", "[SEP]", "[PAD]")
ENCODER_CASES = (
    clip("clip", eos=_END),
    clip("clip-early", eos=2, hidden_act="gelu"),
    EncoderCase(
        name="siglip",
        build=_siglip_build,
        image=_siglip_image,
        text=_siglip_text,
        tower="vision_model.encoder.layers",
        text_blocks="text_model.encoder.layers",
        frame=(None, "</s>", "</s>"),
        image_processor="SiglipImageProcessor",
    ),
    EncoderCase(
        name="blip",
        build=_blip_build,
        image=_blip_image,
        text=_blip_text,
        tower="vision_model.encoder.layers",
        text_blocks="text_encoder.encoder.layer",
        frame=BERT,
        image_processor="BlipImageProcessor",
    ),
    EncoderCase(
        name="flava",
        build=_flava_build,
        image=_flava_image,
        text=_flava_text,
        tower="image_model.encoder.layer",
        text_blocks="text_model.encoder.layer",
        frame=BERT,
        image_processor="FlavaImageProcessor",
    ),
)
