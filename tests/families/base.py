"""What a tiny random model of any family needs for the tests that run over all of them."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jaxid.io import write_json
from jaxid.prompts.processor import Prompts

VOCABULARY = tuple(
    """<unk> <s> </s> <pad> <image> USER ASSISTANT : ? . , " Is the star to left or right of fish Where is picture
    cat above below and yes no A""".split()
)
"""Tokens of the tiny models' word-level tokenizer; the index is the id."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

DECODER_PARTS = {"blocks": "model.language_model.layers", "norm": "model.language_model.norm"}
"""Where most of Hugging Face's models keep the decoder's blocks and the final norm; see `Case.parts`."""

LLAMA_SITES = {"attn_out": "self_attn", "resid_mid": "post_attention_layernorm", "mlp_out": "mlp"}


def tensors(batch: Prompts) -> dict[str, torch.Tensor]:
    """Ids, attention mask and pixels of prompts, as most Hugging Face models take them."""
    inputs = batch.inputs
    found = {
        "input_ids": torch.tensor(np.asarray(inputs.token_ids)).long(),
        "attention_mask": torch.tensor(np.asarray(inputs.valid)).long(),
    }
    return found if inputs.pixels is None else found | {"pixel_values": torch.tensor(np.asarray(inputs.pixels))}


def as_written(folder: Path) -> Any:
    """The model of a folder through Hugging Face's own loader."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()


def picture_side(network: Any, inputs: Any) -> dict[str, Any]:
    """Hidden states of the tower and what the projector makes of them; compiled by the caller."""
    return {"tower": network.tower(inputs.pixels), "projector": network.features(inputs)}


def alike(name: str, ours: np.ndarray, theirs: np.ndarray, batch: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Both models' values in one order and shape, where the layouts agree already."""
    del name, batch
    return ours, theirs


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One tiny model.

    Attributes:
        name: how test reports call it.
        build: makes the random Hugging Face model.
        describe: writes what a checkpoint folder holds besides weights and config.
        parts: where the Hugging Face model keeps the tower's blocks ("tower_blocks"), the projector ("projector"), the
            decoder's blocks ("blocks") and the final norm ("norm"). Several towers' blocks: a list joined by commas.
        sites: by site, the part of a decoder block whose output ("attn_out", "mlp_out") or input ("resid_mid") stands
            there; other sites are differences of the residual stream.
        arguments: keyword arguments of the Hugging Face model's forward pass.
        reference: loads the PyTorch model of a folder.
        picture_side: our tower and projector, by name; "tower" has a leading axis of layers.
        alike: brings ours and theirs of "tower" (one layer of it) or "projector" to one order and shape.
        clips: the family reads clips, not pictures.
    """

    name: str
    build: Callable[[], Any]
    describe: Callable[[Path], None]
    parts: Mapping[str, str]
    sites: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_SITES)
    arguments: Callable[[Prompts], dict[str, Any]] = tensors
    reference: Callable[[Path], Any] = as_written
    picture_side: Callable[[Any, Any], dict[str, Any]] = picture_side
    alike: Callable[[str, np.ndarray, np.ndarray, Prompts], tuple[np.ndarray, np.ndarray]] = alike
    clips: bool = False


def randomized(model: Any, seed: str) -> Any:
    """The model with every parameter drawn anew, so that no norm is 1, no bias 0 and no two tensors are alike."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            scale_of_norm = parameter.ndim == 1 and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread * noise + float(scale_of_norm))
    return model.eval()


def write_words(
    folder: Path, special: Sequence[str], template: str, *, first: str | None = None, **settings: Any
) -> Mapping[str, int]:
    """Writes a word-level tokenizer of the words of `VOCABULARY`, and a chat template.

    Args:
        folder: the checkpoint's folder.
        special: special tokens; the first is the padding, the second ends an answer.
        template: the chat template.
        first: begins every text, if the template does not write it.
        settings: further entries of tokenizer_config.json.

    Returns:
        Ids by token.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    words = [word for word in VOCABULARY if not word.startswith("<")]
    ids = {word: number for number, word in enumerate(("<unk>", *special, *words, "user", "assistant", "model"))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, ids[first])]
        )
        settings["bos_token"] = first
    tokenizer.save(str(folder / "tokenizer.json"))
    fixed = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "unk_token": "<unk>",
        "pad_token": special[0],
        "eos_token": special[1],
    }
    write_json(folder / "tokenizer_config.json", fixed | settings)
    (folder / "chat_template.jinja").write_text(template)
    return ids
