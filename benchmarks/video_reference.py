"""LLaVA-Video in PyTorch, written from LLaVA-NeXT's definition: Hugging Face has no class for that layout.

The SigLIP tower and the Qwen2 decoder are Hugging Face's modules with PyTorch's own attention. The network is called
like Hugging Face's LLaVA class, so that the same hooks work for both.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model, SiglipVisionConfig, SiglipVisionModel

Json = dict[str, Any]

IMAGE_TOKEN = "<image>"
"""Placeholder in a prompt for every token of a clip."""

PARTS = {
    "model.vision_tower.vision_tower.vision_model.": "model.tower.",
    "model.mm_projector.": "model.projector.",
    "model.image_newline": "model.newline",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}
"""Prefixes of the checkpoint's names, and those used here; the first that matches applies."""


class Model(nn.Module):
    """Everything but the unembedding."""

    def __init__(self, fields: Json, image_token: int):
        """Builds the modules that a flat `llava_qwen` config with a `vision_config` describes."""
        super().__init__()
        width = fields["hidden_size"]
        vision = SiglipVisionConfig(**fields["vision_config"], vision_use_head=False)
        names = Qwen2Config().to_dict().keys() - {"model_type"}
        text: Any = Qwen2Config(
            **{name: value for name, value in fields.items() if name in names},
            rope_parameters={"rope_type": "default", "rope_theta": fields["rope_theta"]},
        )
        text._attn_implementation = vision._attn_implementation = "sdpa"
        self.tower: Any = SiglipVisionModel(vision)
        self.projector = nn.Sequential(nn.Linear(vision.hidden_size, width), nn.GELU(), nn.Linear(width, width))
        self.newline = nn.Parameter(torch.zeros(width))
        self.language_model: Any = Qwen2Model(text)
        self.fields, self.image_token = fields, image_token

    def frames(self, pixels: Float[Tensor, "F C Y X"]) -> Float[Tensor, "F y x D"]:
        """Projected frames, with height and width halved (`get_2dPool`)."""
        states = self.tower.embeddings(pixels)
        for block in self.tower.encoder.layers:
            states = block(states, attention_mask=None)
        projected = self.projector(states)
        side = math.isqrt(projected.shape[1])
        grid = projected.unflatten(1, (side, side)).permute(0, 3, 1, 2).contiguous()
        if self.fields["mm_spatial_pool_mode"] == "average":
            return nn.functional.avg_pool2d(grid, 2).permute(0, 2, 3, 1)
        half = math.ceil(side / 2)
        return nn.functional.interpolate(grid, size=[half, half], mode="bilinear").permute(0, 2, 3, 1)

    def in_lines(self, grid: Float[Tensor, "F y x D"]) -> Float[Tensor, "I D"]:
        """A clip's tokens as a sequence, with `image_newline` after each unit that the config names."""
        frames, height, _, width = grid.shape
        position = self.fields.get("mm_newline_position", "one_token")
        if position == "grid":
            return torch.cat([grid, self.newline.expand(frames, height, 1, width)], dim=2).flatten(0, 2)
        if position == "frame":
            return torch.cat([grid.flatten(1, 2), self.newline.expand(frames, 1, width)], dim=1).flatten(0, 1)
        tokens = grid.flatten(0, 2)
        return torch.cat([tokens, self.newline[None]]) if position == "one_token" else tokens

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        pixel_values: Float[Tensor, "B F C Y X"],
        attention_mask: Int[Tensor, "B T"],
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """A pass over prompts with one clip each and a placeholder for each of its tokens.

        Args:
            input_ids: prompts, padded on the right.
            pixel_values: the frames of all clips.
            attention_mask: 1 at tokens, 0 at padding.
            use_cache: has to be false.

        Returns:
            An object whose `last_hidden_state` is Float[B, T, D], after the final norm.
        """
        if use_cache:
            raise ValueError("use_cache must be false: this network does not keep keys and values.")
        shown = input_ids == self.image_token
        embedded = self.language_model.embed_tokens(input_ids.masked_fill(shown, 0))
        grids = self.frames(pixel_values.flatten(0, 1)).split(pixel_values.shape[1])
        embedded[shown] = torch.cat([self.in_lines(grid) for grid in grids])
        output = self.language_model(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False)
        return SimpleNamespace(last_hidden_state=output.last_hidden_state)


class Video(nn.Module):
    """The network, with modules named as in Hugging Face's LlavaForConditionalGeneration."""

    def __init__(self, fields: Json, image_token: int):
        """Builds the modules."""
        super().__init__()
        self.model = Model(fields, image_token)
        self.lm_head = nn.Linear(fields["hidden_size"], fields["vocab_size"], bias=False)


def load(folder: Path) -> Video:
    """Loads a folder in LLaVA-NeXT's layout whose config describes the tower and whose tokenizer is word-level."""
    from safetensors.torch import load_file

    fields = json.loads((folder / "config.json").read_text())
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    network = Video(fields, words[IMAGE_TOKEN])
    tensors = load_file(folder / "model.safetensors")
    if fields.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    network.load_state_dict({_here(name): tensor.float() for name, tensor in tensors.items()})
    return network.eval()


def _here(name: str) -> str:
    """Name of a checkpoint's tensor in this network."""
    start = next(start for start in PARTS if name.startswith(start))
    return PARTS[start] + name.removeprefix(start)
