"""CLIP-like models of published size: names and shapes of all tensors, and a forward pass traced without memory."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from flax import nnx

from jaxid.checkpoints.loading import abstract_parameters
from jaxid.families.registry import ENCODERS

LARGE = {
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "projection_dim": 768,
}
LARGE_TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SIZES: dict[str, tuple[Any, Any]] = {
    "clip-b32": (transformers.CLIPModel, transformers.CLIPConfig()),
    "clip-b16": (transformers.CLIPModel, transformers.CLIPConfig(vision_config={"patch_size": 16})),
    "clip-l14": (
        transformers.CLIPModel,
        transformers.CLIPConfig(**LARGE, vision_config=LARGE_TOWER | {"patch_size": 14}),
    ),
    "clip-l14-336": (
        transformers.CLIPModel,
        transformers.CLIPConfig(**LARGE, vision_config=LARGE_TOWER | {"patch_size": 14, "image_size": 336}),
    ),
    "siglip-b16": (transformers.SiglipModel, transformers.SiglipConfig()),
    "blip-b16": (transformers.BlipForImageTextRetrieval, transformers.BlipConfig()),
    "flava": (transformers.FlavaModel, transformers.FlavaConfig()),
}


@pytest.mark.parametrize("name", SIZES)
def test_tensors_and_a_pass(name: str) -> None:
    make, theirs = SIZES[name]
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in make(theirs).state_dict().items()}
    kind = ENCODERS[theirs.model_type]
    config = kind.config(theirs.to_dict())
    definition, abstract = abstract_parameters(kind, config)
    import re

    needed = {key for key in shapes if not any(re.search(pattern, key) for pattern in kind.unused)}
    known = set()
    for key in kind.keys(config):
        stacked, expected = "{layer}" in key.source, tuple(abstract[key.target].shape)
        for layer in range(expected[0]) if stacked else [0]:
            source = key.source.format(layer=layer)
            assert key.parameter_shape(shapes[source]) == (expected[1:] if stacked else expected), source
            known.add(source)
    assert known == needed
    assert {key.target for key in kind.keys(config)} == set(abstract)

    def run(state: Any, pixels: Any, token_ids: Any) -> Any:
        network = nnx.merge(definition, state)
        return network.image(pixels), network.text(token_ids, token_ids > 0)

    state = nnx.eval_shape(lambda: nnx.state(kind.network(config, rngs=nnx.Rngs(0))))
    side, length = config.vision_config.image_size, min(30, config.text_config.context)
    pixels = jax.ShapeDtypeStruct((2, 3, side, side), jnp.float32)
    image, text = jax.eval_shape(run, state, pixels, jax.ShapeDtypeStruct((4, length), jnp.int32))
    patches = (side // config.vision_config.patch_size) ** 2 + config.vision_config.class_token
    assert image.tokens.shape[:2] == (2, patches) and text.tokens.shape[:2] == (4, length)
    assert image.tokens.shape[2] == text.tokens.shape[2] == image.pooled.shape[1] == text.pooled.shape[1]
