"""InternVL3: ids, tiles and their order as Hugging Face's own processor makes them; published settings."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
from families import internvl as cases
from fixtures import distance
from full_size import CONFIGS
from transformers import AutoImageProcessor, GotOcr2ImageProcessorPil, InternVLProcessor

from jaxid.checkpoints.loading import load
from jaxid.errors import CheckpointError
from jaxid.families.internvl import InternVLConfig
from jaxid.interp.forward import forward
from jaxid.prompts.base import bucketed

CASE, _, LARGE_SQUARES = cases.EVERY
QUESTIONS = ("Is the star to the left or right of the fish?", "Where is the fish?", "yes")

PREPROCESSOR = {
    "crop_size": None,
    "crop_to_patches": False,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "max_patches": 12,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "return_tensors": None,
    "size": {"height": 448, "width": 448},
}
"""As published with InternVL3."""


def hf_processor(case: Any) -> Any:
    """Hugging Face's own, without the part for videos, which needs torchvision."""
    ours = fixtures.model(case).processor
    marks = {name: ours.tokenizer.convert_tokens_to_ids(token) for name, token in cases.TOKENS.items()}
    processor = InternVLProcessor.__new__(InternVLProcessor)
    processor.tokenizer, processor.image_processor, processor.video_processor = (
        ours.tokenizer,
        ours.image_processor,
        None,
    )
    processor.chat_template, processor.image_seq_length = ours.tokenizer.chat_template, 4
    processor.image_token, processor.image_token_id = "<IMG_CONTEXT>", marks["context_image_token"]
    processor.start_image_token, processor.start_image_token_id = "<img>", marks["start_image_token"]
    processor.end_image_token, processor.end_image_token_id = "</img>", marks["end_image_token"]
    processor.video_token = "<video>"
    processor.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")
    return processor


def shapes() -> list[np.ndarray]:
    """Pictures that become 4, 4, 1, 7, 7 and 3 tiles, small copies counted."""
    rng = np.random.default_rng(3)
    sizes = (20, 60), (64, 20), (9, 9), (90, 63), (80, 110), (10, 21)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


@pytest.mark.parametrize("numbers", [[[3], [0], [1]], [[0, 3], [5], [2, 1, 4]]], ids=["one", "several"])
def test_prompts_and_tiles_are_hugging_faces(numbers: list[list[int]]) -> None:
    model, pictures = fixtures.model(CASE), shapes()
    groups = [[pictures[number] for number in some] for some in numbers]
    processor = hf_processor(CASE)
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*[{"type": "image"}] * len(group), {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for group, question in zip(groups, QUESTIONS, strict=True)
    ]
    flat = [picture for group in groups for picture in group]
    theirs = processor(text=texts, images=flat, padding=True, padding_side="right", return_tensors="np")
    prompts = model.prepare(groups, QUESTIONS)
    inputs, length = prompts.inputs, theirs["input_ids"].shape[1]
    np.testing.assert_array_equal(inputs.token_ids[:, :length], theirs["input_ids"])
    np.testing.assert_array_equal(inputs.valid[:, :length], theirs["attention_mask"].astype(bool))
    assert not inputs.valid[:, length:].any()
    ours, slots = CASE.arguments(prompts), np.asarray(inputs.image_rows)
    np.testing.assert_array_equal(ours["pixel_values"].numpy(), theirs["pixel_values"])
    np.testing.assert_array_equal(slots >= 0, inputs.token_ids == model.config.image_token_index)
    # Four tokens for each tile, in the prompts' order, and none for padded rows.
    tiles = len(theirs["pixel_values"])
    np.testing.assert_array_equal(slots[slots >= 0], np.arange(4 * tiles))
    assert len(np.asarray(inputs.pixels)) == bucketed(tiles) > tiles and not np.asarray(inputs.pixels)[tiles:].any()


def test_tiles_by_aspect_ratio() -> None:
    """Worked examples: a grid of the nearest ratio, of more tiles where two are as near, and a small copy."""
    processor = fixtures.model(CASE).processor
    counts = [len(processor.encode([picture], [[0]]).tokens[0].rows) // 4 for picture in shapes()]
    assert counts == [4, 4, 1, 7, 7, 3]
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32], wide[:, 32:] = 128, 255
    pixels = np.asarray(processor.encode([wide], [[0]]).pixels)
    mean, deviation = (np.array(values)[:, None, None] for values in ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)))
    for tile, grey in enumerate((0, 128, 255)):
        expected = np.broadcast_to((grey / 255 - mean) / deviation, (3, 16, 16))
        np.testing.assert_allclose(pixels[tile], expected, atol=1e-5)
    small = pixels[3].mean(axis=(0, 1))
    assert small[0] < small[8] < small[-1] and len(pixels) == 4


def test_a_picture_that_several_prompts_share_is_one() -> None:
    model, picture = fixtures.model(CASE), shapes()[0]
    prompts = model.prepare(picture, QUESTIONS)
    slots = np.asarray(prompts.inputs.image_rows)
    assert len(np.asarray(prompts.inputs.pixels)) == 4
    for row in slots:
        np.testing.assert_array_equal(row[row >= 0], np.arange(16))


def test_padded_rows_change_nothing() -> None:
    model, pictures = fixtures.model(CASE), shapes()
    prompts = model.prepare([pictures[5], pictures[0], pictures[2]], QUESTIONS)
    pixels = np.array(prompts.inputs.pixels)
    used = np.asarray(prompts.inputs.image_rows).max() // 4 + 1
    assert used == 8 == len(pixels)
    longer = np.concatenate([pixels, np.full((2, *pixels.shape[1:]), 3.0, np.float32)])
    filled = dataclasses.replace(prompts, inputs=dataclasses.replace(prompts.inputs, pixels=longer))
    assert distance(forward(model, filled).logits, forward(model, prompts).logits) < 1e-5


def test_published_settings(tmp_path: Path) -> None:
    """Settings name a class that runs on torchvision; pictures are cut although they say no."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    config = InternVLConfig.from_hf(copy.deepcopy(CONFIGS["internvl-8b"]))
    processor = copy.copy(fixtures.model(CASE).processor)
    processor.image_processor, processor.config = processor.load_image_processor(tmp_path, config), config
    assert isinstance(processor.image_processor, GotOcr2ImageProcessorPil)
    assert config.image_tokens == 256 and processor.usual_tokens == (4 * 3 + 1) * 256
    encoded = processor.encode([np.zeros((30, 60, 3), np.uint8)], [[0]])
    assert encoded.pixels.shape == (3, 3, 448, 448) and len(encoded.tokens[0].rows) == 3 * 256


@pytest.mark.parametrize("kind", ["GotOcr2ImageProcessor", "GotOcr2ImageProcessorFast", "GotOcr2ImageProcessorPil"])
def test_every_name_of_the_image_processor_is_read(kind: str, tmp_path: Path) -> None:
    settings = PREPROCESSOR | {"image_processor_type": kind}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    model = fixtures.model(CASE)
    ours = model.processor.load_image_processor(tmp_path, model.config)
    assert type(ours) is type(found) is GotOcr2ImageProcessorPil


def test_marks_are_the_tokenizers(tmp_path: Path) -> None:
    folder = shutil.copytree(fixtures.folder(CASE), tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] |= {"start_image_token": "<video>", "end_image_token": "<img>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text = load(folder).prepare(shapes()[2], QUESTIONS[1]).texts[0]
    assert f"user\n<video>{'<IMG_CONTEXT>' * 4}<img>\nWhere" in text


def test_works_without_pytorch(tmp_path: Path) -> None:
    """The file names a class that asks for torchvision; tiles are the same without it."""
    question, picture = "Where is the fish?", shapes()[0]
    made = fixtures.prepared_without_torch(fixtures.folder(CASE), picture, question, tmp_path / "made.npz")
    expected = fixtures.model(CASE).prepare(picture, question).inputs.pixels
    np.testing.assert_array_equal(made["pixels"], expected)


# --- configs --------------------------------------------------------------------------------------------------------


def changed(part: str | None, **fields: Any) -> dict[str, Any]:
    whole = copy.deepcopy(CONFIGS["internvl-1b"])
    (whole[part] if part else whole).update(fields)
    return whole


@pytest.mark.parametrize(
    ("part", "fields", "named"),
    [
        (None, {"vision_feature_layer": [-1, -2]}, r"vision_feature_layer \[-1, -2\] is a list"),
        (None, {"vision_feature_layer": 25}, r"vision_feature_layer \[25\] .* 24 blocks"),
        (None, {"vision_feature_layer": -26}, r"vision_feature_layer \[-26\] .* 24 blocks"),
        (None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
        (None, {"downsample_ratio": 0.3}, "downsample_ratio 0.3 .* 32 x 32"),
        (None, {"downsample_ratio": 1 / 3}, "downsample_ratio 0.33.* 32 x 32"),
        (None, {"downsample_ratio": 2.0}, "downsample_ratio 2.0"),
        ("vision_config", {"norm_type": "batch_norm"}, "norm_type 'batch_norm'"),
        ("vision_config", {"use_mask_token": True}, "mask token"),
        ("vision_config", {"use_absolute_position_embeddings": False}, "position embeddings"),
        ("vision_config", {"image_size": [448, 224]}, r"image_size \[448, 224\] is not square"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "'siglip_vision_model' is not 'internvl_vision'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(part: str | None, fields: dict[str, Any], named: str) -> None:
    InternVLConfig.from_hf(changed(None))
    with pytest.raises(CheckpointError, match=named):
        InternVLConfig.from_hf(changed(part, **fields))


def test_tokens_of_a_tile() -> None:
    for ratio, expected in ((1.0, 1024), (0.5, 256), (0.25, 64), (0.125, 16)):
        assert InternVLConfig.from_hf(changed(None, downsample_ratio=ratio)).image_tokens == expected
    plain = InternVLConfig.from_hf(changed("vision_config", image_size=448, patch_size=14))
    assert plain == InternVLConfig.from_hf(changed(None)) and plain.vision_config.num_patches == 1024
    config = fixtures.model(LARGE_SQUARES).config
    assert isinstance(config, InternVLConfig) and config.square == 4
