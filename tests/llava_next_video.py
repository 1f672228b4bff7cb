"""LLaVA-Video as LLaVA-NeXT defines it, in PyTorch: Hugging Face has no class for that layout."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, Qwen2Config, Qwen2Model, SiglipVisionConfig, SiglipVisionModel

CLIP = -200
"""Stands for a clip in `input_ids`."""


class Tower(nn.Module):
    """SigLIP without its last block and head; what leaves the last block left is read, before the norm behind it."""

    def __init__(self, fields: dict[str, Any]):
        super().__init__()
        config = SiglipVisionConfig(**{**fields, "num_hidden_layers": fields["num_hidden_layers"] + 1})
        self.vision_tower: Any = SiglipVisionModel(config)
        del self.vision_tower.encoder.layers[-1:]
        self.vision_tower.head = nn.Identity()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        states = self.vision_tower.embeddings(pixels)
        for layer in self.vision_tower.encoder.layers:
            states = layer(states, attention_mask=None)
        return states


class LlavaNextVideo(nn.Module):
    """The network of a flat `llava_qwen` config; a `vision_config` in it describes a small tower."""

    def __init__(self, fields: dict[str, Any]):
        super().__init__()
        self.fields = fields
        text = {name: value for name, value in fields.items() if name in Qwen2Config().to_dict()}
        text.pop("model_type", None)
        rope = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
        config: Any = Qwen2Config(**text, rope_parameters=rope)
        config._attn_implementation = "eager"
        self.model: Any = Qwen2Model(config)
        self.model.vision_tower = Tower(fields["vision_config"])
        inner, width = fields["vision_config"]["hidden_size"], fields["hidden_size"]
        self.model.mm_projector = nn.Sequential(nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width))
        self.model.image_newline = nn.Parameter(torch.zeros(width))
        self.lm_head = nn.Linear(width, fields["vocab_size"], bias=False)
        if fields.get("tie_word_embeddings"):
            self.lm_head.weight = self.model.embed_tokens.weight

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """`get_2dPool`: [F, I, D] to half the rows and columns."""
        side = math.isqrt(features.shape[1])
        grid = features.view(len(features), side, side, -1).permute(0, 3, 1, 2).contiguous()
        if self.fields["mm_spatial_pool_mode"] == "average":
            grid = nn.functional.avg_pool2d(grid, 2)
        else:
            half = math.ceil(side / 2)
            grid = nn.functional.interpolate(grid, size=[half, half], mode="bilinear")
        return grid.permute(0, 2, 3, 1)

    def encode(self, clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Every clip's decoder tokens, [I, D]."""
        if not clips:
            return []
        projected = self.model.mm_projector(self.model.vision_tower(torch.cat(list(clips))))
        return [self.in_lines(self.pool(one)) for one in projected.split([len(clip) for clip in clips])]

    def in_lines(self, grid: torch.Tensor) -> torch.Tensor:
        """A clip's tokens, [F, Y, X, D], in a row, with `image_newline` where the config wants it."""
        frames, height, _, width = grid.shape
        newline = self.model.image_newline
        position = self.fields.get("mm_newline_position", "one_token")
        if position == "grid":
            return torch.cat([grid, newline.expand(frames, height, 1, width)], dim=2).flatten(0, 2)
        if position == "frame":
            return torch.cat([grid.flatten(1, 2), newline.expand(frames, 1, width)], dim=1).flatten(0, 1)
        tokens = grid.flatten(0, 2)
        return torch.cat([tokens, newline[None]]) if position == "one_token" else tokens

    def forward(
        self, input_ids: Sequence[Sequence[int]], clips: Sequence[torch.Tensor], length: int, use_cache: bool = False
    ) -> Any:
        """Prompts of any lengths, `CLIP` standing for a clip; padded on the right to a length."""
        del use_cache
        dtype, width = self.lm_head.weight.dtype, self.fields["hidden_size"]
        made = self.encode([clip.to(dtype) for clip in clips])
        embedded, mask = torch.zeros(len(input_ids), length, width, dtype=dtype), torch.zeros(len(input_ids), length)
        for row, ids in enumerate(input_ids):
            parts = [made.pop(0) if one == CLIP else self.model.embed_tokens(torch.tensor([one])) for one in ids]
            whole = torch.cat(parts)
            embedded[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        hidden = self.model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden))

    @torch.no_grad()
    def generate(
        self, input_ids: Sequence[Sequence[int]], clips: Sequence[torch.Tensor], length: int, generation_config: Any
    ) -> torch.Tensor:
        """The likeliest tokens of one prompt, each from a full pass."""
        settings: GenerationConfig = generation_config
        ids, first = list(input_ids[0]), length
        for step in range(settings.max_new_tokens):
            logits = self([ids], clips, first + step).logits
            ids.append(int(logits[0, -1].argmax()))
        return torch.tensor([ids])

    def save_pretrained(self, folder: Path) -> None:
        """Writes config and weights in the published names."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.fields))
        tensors = {_published(name): tensor.contiguous() for name, tensor in self.state_dict().items()}
        if self.fields.get("tie_word_embeddings"):
            del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _published(name: str) -> str:
    """The Hub's files have one level more than transformers' class today."""
    return name.replace("vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model.")


def load(folder: Path) -> LlavaNextVideo:
    """The network of a folder."""
    network = LlavaNextVideo(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    spelled = {_published(name): name for name in network.state_dict()}
    network.load_state_dict({spelled[name]: tensor for name, tensor in tensors.items()})
    return network.eval()
