"""Makes the reference outputs of `open_clip` in this folder: run by hand, seldom.

`open_clip` imports torchvision, which does not import beside the PyTorch that the tests use, so it has an environment
of its own:

    python3.11 -m venv open-clip-environment
    open-clip-environment/bin/pip install torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0
    open-clip-environment/bin/python tests/golden/make_open_clip.py

The files here were made with these versions, numpy 2.4.6 and pillow 13.0.0, on a CPU. NOTES.md says what every array
is and how `open_clip` computes it.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip  # pyright: ignore[reportMissingImports]
import torch
from open_clip.transform import PreprocessCfg, image_transform  # pyright: ignore[reportMissingImports]
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent

START, END = 62, 63
"""Ids of the tokens around a caption: the two highest of the small vocabulary, as in the full one; 0 is padding."""

LENGTHS = (3, 9, 30)
"""Of the captions but the last, start and end included; the last fills the window."""

CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 8,
        "patch_size": 8,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 64,
        "width": 24,
        "heads": 3,
        "layers": 2,
        "mlp_ratio": 2.0,
    },
}
COCA = {
    "embed_dim": 24,
    "vision_cfg": {
        **CLIP["vision_cfg"],
        "attentional_pool": True,
        "attn_pooler_queries": 6,
        "attn_pooler_heads": 3,
        "output_tokens": True,
    },
    "text_cfg": {**CLIP["text_cfg"], "context_length": 76, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {
        "context_length": 76,
        "vocab_size": 64,
        "width": 24,
        "heads": 3,
        "layers": 1,
        "attn_pooler_heads": 3,
    },
    "custom_text": True,
}

CAPTIONS = (
    "a photo of a cat",
    "An image of a Red Circle to the LEFT of a Blue Triangle.",
    "two  dogs,   three cats;\tand a   bird",
    "it's the dog's ball, isn't it? we'll see: they're here!!",
    "salt &amp; pepper, &lt;b&gt;bold&lt;/b&gt; and &amp;quot;twice&amp;quot;",
    "a sign that reads 2024-10-31 at 12:45, room 007",
    "caf\u00e9 na\u00efve \u2014 \u201cquoted\u201d \u65e5\u672c\u8a9e \U0001f600",
    "not no without but absent above below left right small big",
    "! ?! ... ()",
    "",
    "a star is left of a fish and " * 20,
    "floccinaucinihilipilification of e-mail_addresses@example.com #1",
)
"""What a tokenizer has to get right: case, blanks, contractions, escapes, digits, accents, an over-long caption."""


def main() -> None:
    """Writes every file."""
    write_clip(HERE / "clip")
    write_coca(HERE / "coca")
    write_shapes(HERE / "clip_b32", open_clip.get_model_config("ViT-B-32-quickgelu"), open_clip.CLIP)
    write_shapes(HERE / "coca_b32", open_clip.get_model_config("coca_ViT-B-32"), open_clip.CoCa)
    write_preprocessing(HERE / "preprocess.npz")
    described = {"captions": CAPTIONS, "token_ids": open_clip.tokenize(list(CAPTIONS)).tolist()}
    (HERE / "tokens.json").write_text(json.dumps(described) + "\n")


def write_clip(folder: Path) -> None:
    """Weights and outputs of a tiny `open_clip.CLIP`."""
    model = scrambled(built(open_clip.CLIP, CLIP), seed=1)
    folder.mkdir(exist_ok=True)
    write_config(folder, CLIP)
    write_weights(folder, model)
    torch.save(training_checkpoint(model), folder / "negclip.pt")
    torch.save(training_remnant(model), folder / "remnant.pt")

    visual, pixels, token_ids = model.visual, random_pixels(2), random_captions(77, seed=3)
    visual.output_tokens = True
    image_pooled, image_tokens = visual(pixels)
    visual.output_tokens = False
    image_hidden = hidden(visual.transformer, lambda: visual(pixels))
    image_normed = visual.ln_post(image_hidden[-1])
    text_hidden = hidden(model.transformer, lambda: model.encode_text(token_ids))
    text_normed = model.ln_final(text_hidden[-1])
    image_logits, _ = model.get_logits(pixels, token_ids)
    save(
        folder,
        pixels=pixels,
        token_ids=token_ids.int(),
        image_hidden=image_hidden,
        image_tokens=image_tokens,
        image_tokens_normed=image_normed,
        image_tokens_normed_projected=image_normed @ visual.proj,
        image_pooled=image_pooled,
        image_pooled_unit=model.encode_image(pixels, normalize=True),
        text_hidden=text_hidden,
        text_tokens_normed_projected=text_normed @ model.text_projection,
        text_pooled=model.encode_text(token_ids),
        text_pooled_unit=model.encode_text(token_ids, normalize=True),
        logit_scale=model.logit_scale,
        image_logits=image_logits,
    )


def write_coca(folder: Path) -> None:
    """Weights and outputs of a tiny `open_clip.CoCa`."""
    model = scrambled(built(open_clip.CoCa, COCA), seed=4)
    folder.mkdir(exist_ok=True)
    write_config(folder, COCA)
    write_weights(folder, model)

    visual, text, pixels, token_ids = model.visual, model.text, random_pixels(5), random_captions(76, seed=6)
    image_hidden = hidden(visual.transformer, lambda: visual(pixels))
    queries = visual.attn_pool(image_hidden[-1])
    queries_normed = visual.ln_post(queries)
    text_hidden = hidden(text.transformer, lambda: text(token_ids))
    text_normed = text.ln_final(text_hidden[-1])
    image_pooled, image_tokens = model._encode_image(pixels, normalize=False)
    text_pooled, _ = model._encode_text(token_ids, normalize=False)
    save(
        folder,
        pixels=pixels,
        token_ids=token_ids.int(),
        image_hidden=image_hidden,
        image_queries=queries,
        image_queries_normed=queries_normed,
        image_queries_normed_projected=queries_normed @ visual.proj,
        image_tokens=image_tokens,
        image_pooled=image_pooled,
        image_pooled_unit=model.encode_image(pixels),
        text_hidden=text_hidden,
        text_tokens_normed_projected=text_normed @ text.text_projection,
        text_pooled=text_pooled,
        text_pooled_unit=model.encode_text(token_ids),
        text_mask=text._embeds(token_ids)[1][:: text.heads] == 0,
        logit_scale=model.logit_scale,
    )


def built(network: Any, config: dict[str, Any]) -> Any:
    """A model of `open_clip`, for inference."""
    arguments = {name: value for name, value in config.items() if name != "custom_text"}
    return network(**copy.deepcopy(arguments)).eval().requires_grad_(False)


def scrambled(model: Any, seed: int) -> Any:
    """The model with every parameter drawn anew, so that none is without effect and attention picks some tokens."""
    draws = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=draws)
        if name == "logit_scale":
            value.copy_(torch.tensor(math.log(25.0)))
        elif name.endswith("bias"):
            value.copy_(0.2 * noise)
        elif "ln_" in name:
            value.copy_(1 + 0.3 * noise)
        elif name.endswith(("embedding", "embedding.weight", "cls_emb", "query")):
            value.copy_(0.7 * noise)
        elif name.endswith(("in_proj_weight", "q_proj_weight", "k_proj_weight")):
            value.copy_(1.5 * noise / math.sqrt(value.shape[1]))
        else:
            inputs = value.shape[0] if name.endswith(("visual.proj", "text_projection")) else value[0].numel()
            value.copy_(noise / math.sqrt(inputs))
    return model


def random_pixels(seed: int) -> torch.Tensor:
    """Three pictures, Float[3, 3, 32, 32], in steps of 1/64, which makes a small file."""
    return torch.randint(-128, 128, (3, 3, 32, 32), generator=torch.Generator().manual_seed(seed)) / 64


def random_captions(window: int, seed: int) -> torch.Tensor:
    """Four captions of random tokens, Int[4, window], padded with 0."""
    draws = torch.Generator().manual_seed(seed)
    token_ids = torch.zeros(4, window, dtype=torch.long)
    for row, length in zip(token_ids, (*LENGTHS, window), strict=True):
        row[:length] = torch.randint(1, START, (length,), generator=draws)
        row[0], row[length - 1] = START, END
    return token_ids


def hidden(transformer: Any, run: Callable[[], object]) -> torch.Tensor:
    """What enters the first block, and what leaves each block, while `run` runs: Float[L + 1, N, S, D]."""
    found: list[torch.Tensor] = []
    handles = [transformer.resblocks[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    handles += [block.register_forward_hook(lambda _, __, out: found.append(out)) for block in transformer.resblocks]
    run()
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def training_checkpoint(model: Any) -> dict[str, Any]:
    """What `open_clip`'s training writes: the weights among the state of the optimizer and of the loss scaler.

    The names are those of a run of one process, as NegCLIP's was.
    """
    trained = copy.deepcopy(model).requires_grad_(True)
    groups: list[dict[str, Any]] = [
        {"params": [value for value in trained.parameters() if value.ndim < 2], "weight_decay": 0.0},
        {"params": [value for value in trained.parameters() if value.ndim >= 2], "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6)
    for value in groups[0]["params"]:  # moments of the matrices would double the file
        value.grad = torch.full_like(value, 1e-3)
    optimizer.step()
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    return {
        "epoch": 5,
        "name": "tiny-negclip",
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {**scaler, "growth_interval": 2000, "_growth_tracker": 11},
    }


def training_remnant(model: Any) -> dict[str, Any]:
    """A training checkpoint cut down to one tensor, with what loaders stumble over.

    The name begins with "module.", as after a run of several processes, and the learning rate is a NumPy scalar, as
    the cosine schedule leaves it.
    """
    whole = training_checkpoint(model)
    rates = [{**group, "lr": np.float64(5e-7)} for group in whole["optimizer"]["param_groups"]]
    return {
        **whole,
        "state_dict": {"module.logit_scale": whole["state_dict"]["logit_scale"]},
        "optimizer": {"state": {}, "param_groups": rates},
    }


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """The config file that published `open_clip` checkpoints carry."""
    pictures = dataclasses.asdict(PreprocessCfg(size=config["vision_cfg"]["image_size"]))
    described = {"model_cfg": config, "preprocess_cfg": pictures}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")


def write_weights(folder: Path, model: Any) -> None:
    """The state dict, twice."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "weights.safetensors")
    torch.save(model.state_dict(), folder / "weights.pt")


def write_shapes(folder: Path, config: dict[str, Any], network: Any) -> None:
    """Names and shapes of a full-size model's tensors, none of which is made."""
    folder.mkdir(exist_ok=True)
    write_config(folder, config)
    with torch.device("meta"):
        tensors = built(network, config).state_dict()
    lines = [f"  {json.dumps(name)}: {json.dumps(list(value.shape))}" for name, value in tensors.items()]
    (folder / "shapes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_preprocessing(file: Path) -> None:
    """Three pictures, and what `open_clip` makes of them.

    The two large ones leave an odd number of pixels to crop: half a pixel is rounded to the even side.
    """
    draws = np.random.default_rng(7)
    transform = image_transform(32, is_train=False)
    arrays: dict[str, Any] = {}
    for name, (height, width) in {"wide": (41, 91), "tall": (76, 35), "tiny": (9, 13)}.items():
        slope = np.linspace(0, 170, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
        picture = (slope * [1.0, 0.6, 0.3] + draws.integers(0, 25, (height, width, 3))).astype(np.uint8)
        arrays[f"{name}_picture"] = picture
        arrays[f"{name}_pixels"] = transform(Image.fromarray(picture)).numpy()
    np.savez_compressed(file, **arrays)


def save(folder: Path, **arrays: torch.Tensor) -> None:
    """Writes `outputs.npz`."""
    values: dict[str, Any] = {name: value.numpy() for name, value in arrays.items()}
    np.savez_compressed(folder / "outputs.npz", **values)


if __name__ == "__main__":
    with torch.no_grad():
        main()
