"""One model in both frameworks: Hugging Face's class with random weights made on the device, and jaxid's parameters.

The weights are drawn by PyTorch and handed over tensor by tensor through DLPack: nothing passes the host, and each
framework then has its own copy.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from published_configs import CONFIGS
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from jaxid.checkpoints.tensors import published_name, unflatten
from jaxid.families.base import Family, Model
from jaxid.families.qwen_vl import QwenVLConfig, QwenVLProcessor, token_indices
from jaxid.families.registry import family
from jaxid.nn.keys import Key
from jaxid.prompts.base import PictureTokens
from jaxid.prompts.processor import Prompts

_SETTINGS: Any = jax.config
PLATFORMS = _SETTINGS.jax_platforms
# This module compiles for devices that are not there, and therefore keeps JAX from those that are.
import accelerator_programs as programs  # noqa: E402

jax.config.update("jax_platforms", PLATFORMS)

NAMES = ("llava-7b", "qwen-7b", "gemma-12b")

SELECTIVE = 4.0
"""Factor of the decoder's queries, for attention that selects a few tokens, so that one edited word matters."""

Json = dict[str, Any]


def fields_of(name: str, *, tiny: bool) -> Json:
    """A model's config.json at published size, or with the same parts at a size for tests."""
    fields = copy.deepcopy(dict(CONFIGS[name]))
    if not tiny:
        return fields
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    tower = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    if name.startswith("llava"):
        fields["text_config"] |= {**sizes, **heads}
        fields["vision_config"] |= {**tower, "image_size": 56, "patch_size": 14}
        return fields | {"image_token_index": 500, "vocab_size": 512}
    if name.startswith("qwen"):
        fields |= {**sizes, **heads, "image_token_id": 500, "vision_start_token_id": 501, "vision_end_token_id": 502}
        fields |= {"video_token_id": 503, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
        fields["vision_config"] |= {
            "depth": 3,
            "patch_size": 28,
            "spatial_patch_size": 28,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        }
        return fields
    fields["text_config"] |= {**sizes, **heads, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}
    fields["vision_config"] |= {**tower, "image_size": 64, "patch_size": 8}
    return fields | {
        "image_token_index": 500,
        "boi_token_index": 501,
        "eoi_token_index": 502,
        "mm_tokens_per_image": 16,
    }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """A model with its prompts.

    Attributes:
        name: its short name.
        geometry: its shapes.
        kind: its family.
        network: Hugging Face's class.
        arguments: the prompts as the class takes them, by the name of the argument.
        model: the same model in jaxid; a trace of its prompts starts from these.
        prompts: the prompts.
        device: PyTorch's device.
    """

    name: str
    geometry: programs.Geometry
    kind: Family
    network: Any
    arguments: Mapping[str, torch.Tensor]
    model: Model
    prompts: Prompts
    device: torch.device

    @property
    def blocks(self) -> Any:
        """The decoder's blocks in PyTorch."""
        return self.network.model.language_model.layers


def make(name: str, device: torch.device, *, tiny: bool) -> Setting:
    """Draws the weights, hands them over, and makes prompts with random pixels and words."""
    fields = fields_of(name, tiny=tiny)
    own = programs.geometry(name, fields)
    kind = family(fields["model_type"], name)
    network = random_network(fields, device, torch.float32 if tiny else torch.bfloat16)
    model = own.model(handed_over(network, kind, own.config, own.leaves))
    prompts, arguments = make_prompts(own, device, network.dtype)
    return Setting(
        name=name,
        geometry=own,
        kind=kind,
        network=network,
        arguments=arguments,
        model=model,
        prompts=prompts,
        device=device,
    )


def random_network(fields: Json, device: torch.device, dtype: torch.dtype) -> Any:
    """Hugging Face's class with weights whose products keep the size of their inputs."""
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(copy.deepcopy(fields))
    with torch.device(device):
        network = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            if "language_model" in name and "q_proj.weight" in name:
                spread *= SELECTIVE
            parameter.normal_(0.0, spread, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1
    network.tie_weights()
    return network.requires_grad_(False)


def handed_over(network: Any, kind: Family, config: Any, leaves: Mapping[str, Any]) -> Json:
    """The network's weights as jaxid's parameters, on the same device."""
    tensors = {published_name(name, kind.renames): tensor for name, tensor in network.state_dict().items()}
    parameters: Json = {}
    parts: dict[str, list[tuple[Key, int | None, str]]] = {}
    for key in kind.keys(config):
        if not key.copy:
            rows = key.tensors(leaves[key.target].shape)
            parts.setdefault(key.target, []).extend((key, row, name) for name, row in rows)
    for target, rows in parts.items():
        found = [_in_jax(key, tensors[name]) for key, _, name in sorted(rows, key=lambda row: row[1] or 0)]
        stacked = rows[0][1] is not None
        parameters[target] = jax.block_until_ready(jnp.stack(found) if stacked else jnp.array(found[0], copy=True))
        if parameters[target].shape != leaves[target].shape:
            raise ValueError(f"{target} became {parameters[target].shape}, not {leaves[target].shape}")
    return unflatten(parameters)


def _in_jax(key: Key, tensor: torch.Tensor) -> Any:
    """`Key.to_parameter` of a tensor that stays on its device."""
    if key.part is not None:
        tensor = tensor.chunk(key.part[1])[key.part[0]]
    return jax.dlpack.from_dlpack(rearrange(tensor.detach(), key.pattern, **key.sizes).contiguous())


def torch_names(setting: Setting, selection: Any) -> Iterator[tuple[str, str, int | None]]:
    """Every trained tensor: its name in PyTorch, its parameter in jaxid, and the row that it fills there."""
    spelled = {published_name(name, setting.kind.renames): name for name, _ in setting.network.named_parameters()}
    rows = dict(selection.rows)
    for key in setting.kind.keys(setting.geometry.config):
        if key.target in rows and not key.copy:
            for name, row in key.tensors(setting.geometry.leaves[key.target].shape):
                if rows[key.target] is None or row in rows[key.target]:
                    yield spelled[name], key.target, row


def make_prompts(
    own: programs.Geometry, device: torch.device, dtype: torch.dtype
) -> tuple[Prompts, dict[str, torch.Tensor]]:
    """Random pictures and words, the same for both frameworks; their content does not affect times."""
    rng, prompts = np.random.default_rng(0), own.prompts()
    inputs, start = prompts.inputs, programs.BEFORE + own.image_tokens
    picture = own.config.image_token_index
    vocabulary = own.text.vocab_size
    ids = rng.integers(3, min(vocabulary, picture) - 20, inputs.token_ids.shape).astype(np.int32)
    ids[:, programs.BEFORE : start] = picture
    pixels = rng.standard_normal(own.pictures, np.float32)
    arguments = {"pixel_values": pixels, "input_ids": ids.astype(np.int64), "attention_mask": np.ones_like(ids)}
    changed: Json = {"token_ids": ids, "pixels": pixels}
    if isinstance(own.config, QwenVLConfig):
        changed |= _patches(own, inputs, arguments)
    elif own.config.text_config.sliding_window is not None:  # Gemma reads pictures both ways
        arguments["token_type_ids"] = (ids == picture).astype(np.int64)
    inputs = dataclasses.replace(inputs, **changed)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in arguments.items()}
    tensors["pixel_values"] = tensors["pixel_values"].to(dtype)
    return dataclasses.replace(prompts, inputs=jax.device_put(inputs)), tensors


def _patches(own: programs.Geometry, inputs: Any, arguments: dict[str, np.ndarray]) -> Json:
    """Qwen's pictures: squares of patches in the order of windows for jaxid, in reading order for the class."""
    vision = own.config.vision_config
    count, most, _ = own.pictures
    side, together = vision.spatial_merge_size, vision.spatial_merge_size**2
    tokens = own.image_tokens
    edge = round(tokens**0.5)
    order = token_indices(edge, edge, vision.window_side)
    patches = arguments["pixel_values"].reshape(count, tokens, together, -1)
    pixels = np.zeros_like(patches)
    pixels[:, order] = patches
    places = np.zeros((count, tokens, together, 2), np.int32)
    token, inner = np.mgrid[:tokens, :together]
    places[:, order] = np.stack([token // edge * side + inner // side, token % edge * side + inner % side], axis=-1)
    rows = np.array(inputs.image_rows)
    start = programs.BEFORE
    rows[:, start : start + tokens] = np.arange(count)[:, None] * tokens + order
    arguments["pixel_values"] = patches.reshape(count * most, -1)
    arguments["image_grid_thw"] = np.tile([1, edge * side, edge * side], (count, 1))
    arguments["mm_token_type_ids"] = (rows >= 0).astype(np.int32)
    owner: Any = SimpleNamespace(image_token_id=own.config.image_token_index)
    shown = [[PictureTokens("", rows[row, start : start + tokens], (edge, edge))] for row in range(count)]
    ids = np.asarray(arguments["input_ids"])
    turned = QwenVLProcessor.rope_positions(owner, ids, np.ones(ids.shape, bool), shown)
    return {
        "pixels": pixels.reshape(own.pictures),
        "image_rows": rows,
        "rope_positions": turned,
        "extras": {"patch_positions": places.reshape(count, most, 2), "patch_valid": np.ones((count, most), bool)},
    }
