"""Llama 3.2 Vision: ids, pixels and tiles are those of Hugging Face's processor; what no picture family reads."""

import dataclasses
from typing import Any

import fixtures
import numpy as np
import pytest
from families import EVERY, Case
from transformers import AutoProcessor

from jaxid.errors import InputError
from jaxid.prompts.pictures import Clip, open_picture

NAMES = ("gemma3", "mllama", "internvl")
GEMMA, MLLAMA, INTERNVL = (next(case for case in EVERY if case.name == name) for name in NAMES)
QUESTIONS = ["Is the star to the left or right of the fish?", "Where is the fish?", "yes", "no or yes?"]


def shapes() -> list[np.ndarray]:
    """Pictures of several sizes and aspect ratios: wide, tall, tiny and large."""
    rng = np.random.default_rng(3)
    return [
        rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((20, 60), (64, 25), (9, 9), (90, 80))
    ]


def talks(counts: list[int]) -> list[Any]:
    return [
        [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": text}]}]
        for count, text in zip(counts, QUESTIONS, strict=True)
    ]


def expected(groups: list[list[np.ndarray]]) -> Any:
    """What Hugging Face's own processor makes of prompts about some pictures each."""
    theirs = AutoProcessor.from_pretrained(fixtures.folder(MLLAMA))
    conversations = talks([len(group) for group in groups])
    pictures = [[open_picture(picture) for picture in group] for group in groups]
    texts = [theirs.apply_chat_template(talk, add_generation_prompt=True) for talk in conversations]
    # As `apply_chat_template` does with tokens asked for: the template has written the first one.
    options = {"padding": True, "padding_side": "right", "add_special_tokens": False}
    return theirs(text=texts, images=pictures, return_tensors="np", **options)


@pytest.mark.parametrize("pairs", [False, True], ids=["one", "two"])
def test_prompts_and_tiles_are_hugging_faces(pairs: bool) -> None:
    pictures = shapes()
    groups = [[pictures[k], pictures[3 - k]] if pairs else [pictures[k]] for k in range(4)]
    theirs, prompts = expected(groups), fixtures.model(MLLAMA).prepare(groups, QUESTIONS)
    inputs, length = prompts.inputs, theirs["input_ids"].shape[1]
    np.testing.assert_array_equal(inputs.token_ids[:, :length], theirs["input_ids"])
    np.testing.assert_array_equal(inputs.valid[:, :length], theirs["attention_mask"].astype(bool))
    assert not inputs.valid[:, length:].any()
    ours = MLLAMA.arguments(prompts)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        np.testing.assert_allclose(ours[name].numpy(), theirs[name], atol=1e-6)
    assert len(set(inputs.extras["tile_count"].tolist())) > 1
    shown = np.asarray(inputs.token_ids) == fixtures.model(MLLAMA).config.image_token_index
    np.testing.assert_array_equal(np.asarray(inputs.image_rows) >= 0, shown)


def test_memory_masks_are_hugging_faces() -> None:
    """Which picture each token reads: neighbours together, later ones alone; compared with the dense published mask."""
    import jax.numpy as jnp

    model, pictures = fixtures.model(MLLAMA), shapes()
    prompts = model.prepare([[pictures[0], pictures[1]], [pictures[2], pictures[3]]], QUESTIONS[:2])
    image = model.config.image_token_index
    token_ids, valid = np.array(prompts.inputs.token_ids), np.asarray(prompts.inputs.valid)
    first = int(np.flatnonzero(token_ids[1] == image)[0])
    # The second prompt's pictures with a word between them.
    token_ids[1, first : first + 3] = [image, token_ids[1, first + 2], image]
    apart = dataclasses.replace(prompts, inputs=dataclasses.replace(prompts.inputs, token_ids=token_ids))
    dense = MLLAMA.arguments(apart)["cross_attention_mask"].numpy().astype(bool)  # [B, T, pictures, tiles]
    memory = model.network().memory(fixtures.device_inputs(apart))
    assert memory is not None and memory.keys is not None
    tokens = model.config.vision_config.tile_tokens
    repeated = np.repeat(dense.reshape(*dense.shape[:2], -1), tokens, axis=2)
    read = np.asarray(repeated.any(axis=2))
    np.testing.assert_array_equal(np.asarray(memory.rows)[valid], read[valid])
    mask = np.asarray(memory.reads.mask())
    np.testing.assert_array_equal(mask[valid & read], repeated[valid & read])
    assert mask[valid & ~read].all() and (valid & ~read).any()
    assert not dense[1, first + 2 : prompts.last()[1], 0].any() and dense[0, prompts.last()[0]].any(axis=-1).all()
    assert memory.keys.shape[:2] == (2, 2) and jnp.isfinite(memory.keys).all()


@pytest.mark.parametrize("case", [GEMMA, MLLAMA, INTERNVL], ids=lambda case: case.name)
def test_clips_are_refused(case: Case) -> None:
    with pytest.raises(InputError, match="pictures, not clips"):
        fixtures.model(case).prepare(Clip(shapes()[:2]), "Where is the fish?")


def test_sizes_by_which_batches_are_chosen() -> None:
    assert fixtures.model(GEMMA).processor.usual_tokens == 16
    # A picture's memory of 4 tiles of 10 tokens, in 2 of 5 layers.
    assert fixtures.model(MLLAMA).processor.usual_tokens == 4 * 10 * 2 // 5
