"""LLaVA-Video and LLaVA-OneVision: ids, pixels and the place of every picture token, as Hugging Face makes them."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import llava_next_video
import numpy as np
import pytest
import torch
import transformers
from families import llava_video as cases
from fixtures import distance
from flax import nnx
from full_size import CONFIGS
from PIL import Image
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from jaxid.checkpoints.loading import abstract_parameters, load
from jaxid.checkpoints.tensors import flatten
from jaxid.errors import CheckpointError, InputError, PromptError
from jaxid.families.llava_packing import clip_rows, pooling, taps
from jaxid.families.llava_video import LlavaVideoConfig, LlavaVideoProcessor
from jaxid.families.registry import FAMILIES
from jaxid.interp.forward import forward
from jaxid.nn.inputs import Inputs
from jaxid.prompts.base import bucketed
from jaxid.prompts.pictures import Clip

PICTURES, CLIPS, GRID, FRAME = cases.EVERY
QUESTION = fixtures.QUESTIONS[0]

LLAVA_VIDEO_7B = {
    **CONFIGS["llava-video"],
    "architectures": ["LlavaQwenForCausalLM"],
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "mm_spatial_pool_stride": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
"""The published fields, some of them as other files of the layout write them."""


# --- resampling and layout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "new"), [(27, 14), (5, 3), (4, 2), (1, 1), (81, 40), (7, 7), (3, 8)])
def test_interpolation_is_that_of_torch(length: int, new: int) -> None:
    values = np.random.default_rng(length).standard_normal((length, 3)).astype(np.float32)
    which, weights = taps(length, new)
    ours = (values[which] * weights[..., None]).sum(axis=1)
    columns = torch.tensor(values.T)[None, :, None].expand(1, 3, 2, length)
    theirs = torch.nn.functional.interpolate(columns, [2, new], mode="bilinear")[0, :, 0].T
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("side", [27, 24, 5, 2])
@pytest.mark.parametrize("mode", ["bilinear", "average"])
def test_pooling_is_that_of_torch(side: int, mode: str) -> None:
    grid = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
    matrix = pooling(side, mode)
    ours = np.einsum("vy,ncyx,wx->ncvw", matrix, grid.numpy(), matrix)
    half = [-(-side // 2)] * 2
    pooled = torch.nn.functional.avg_pool2d(grid, 2)
    theirs = pooled if mode == "average" else torch.nn.functional.interpolate(grid, half, mode="bilinear")
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("grid", [3, 4, 0, 5, 6, 0, 7, 8, 0, 9, 10, 0]),
        ("frame", [3, 4, 5, 6, 0, 7, 8, 9, 10, 0]),
        ("one_token", [3, 4, 5, 6, 7, 8, 9, 10, 0]),
        ("no_token", [3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_where_newlines_stand_in_a_clip(position: str, expected: list[int]) -> None:
    assert clip_rows(2, 2, position, 3).tolist() == expected


@pytest.mark.parametrize("mode", ["bilinear", "average"])
@pytest.mark.parametrize("position", ["grid", "frame", "one_token", "no_token"])
def test_clips_are_those_of_the_original(position: str, mode: str) -> None:
    model, reference = fixtures.model(GRID), copy.copy(fixtures.reference(GRID))
    settings = {"mm_newline_position": position, "mm_spatial_pool_mode": mode}
    config = dataclasses.replace(model.config, **settings)
    processor = LlavaVideoProcessor(model.processor.tokenizer, model.processor.image_processor, config)
    clips: Any = fixtures.shown(GRID)
    clips[1] = Clip(clips[1].frames[:2])
    encoded = processor.encode(clips, [[0], [1]])
    network = model.network()
    network.config = config
    none = np.zeros((1, 1), np.int32)
    inputs = Inputs(
        token_ids=none,
        positions=none,
        valid=none > 0,
        last=none[0],
        pixels=jnp.asarray(encoded.pixels),
        image_rows=none,
        extras=encoded.extras,
    )
    features = np.asarray(network.features(inputs))
    reference.fields = {**reference.fields, **settings}
    with torch.no_grad():
        theirs = reference.encode([torch.tensor(encoded.pixels[:3]), torch.tensor(encoded.pixels[3:])])
    for tokens, expected in zip(encoded.tokens, theirs, strict=True):
        assert distance(features[tokens.rows], expected.numpy()) < 1e-5
        assert tokens.text == "<image>" * len(expected)


SIZES = [(384, 384), (480, 640), (640, 480), (896, 896), (100, 2000), (2000, 100), (3000, 4000), (1152, 1153), (30, 7)]


@pytest.mark.parametrize("limit", [9, 1])
@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_packed_as_hugging_face_does(size: tuple[int, int], limit: int) -> None:
    """In full size, each patch a random vector."""
    fields = {"model_type": "llava_onevision", "vision_aspect_ratio": f"anyres_max_{limit}"}
    config = LlavaVideoConfig.from_hf(fields)
    theirs = transformers.LlavaOnevisionConfig(vision_aspect_ratio=fields["vision_aspect_ratio"])
    for alone in (True, False):
        layout = config.layout(*size, alone=alone)
        generator = torch.Generator().manual_seed(1)
        patches = torch.randn(layout.squares, 729, 3, generator=generator)
        newline = torch.randn(3, generator=generator)
        model: Any = SimpleNamespace(config=theirs)
        packed, lengths = LlavaOnevisionModel.pack_image_features(
            model, [patches], [size], newline, fields["vision_aspect_ratio"]
        )
        flat = patches.flatten(0, 1).numpy()
        mixed = np.einsum("rk,rkd->rd", layout.weights, flat[layout.taps])
        ours = np.where((layout.rows >= 0)[:, None], flat[np.maximum(layout.rows, 0)], newline.numpy())
        if len(mixed):
            ours = np.where((layout.rows < -1)[:, None], mixed[np.maximum(-2 - layout.rows, 0)], ours)
        assert lengths.tolist() == [len(ours)]
        np.testing.assert_allclose(ours, packed[0].numpy(), atol=1e-5)
        if alone:
            assert len(ours) == cases.tokens_of_picture(theirs, size)


def test_tokens_in_full_size() -> None:
    original, hf = (LlavaVideoConfig.from_original(LLAVA_VIDEO_7B), LlavaVideoConfig.from_hf({}))
    assert (original.vision_config.patch_side, original.frame_side, hf.frame_side) == (27, 14, 14)
    assert len(clip_rows(8, 14, "grid", 1)) == 1680
    processor = object.__new__(LlavaVideoProcessor)
    processor.config = original
    assert processor.usual_tokens == 1680


def test_batches_of_squares_have_few_sizes() -> None:
    sizes = [bucketed(count) for count in range(1, 65)]
    assert all(count <= size <= 1.25 * count for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 20


# --- Hugging Face's layout ------------------------------------------------------------------------------------------


def hf_processor(case: Any) -> Any:
    """Hugging Face's own, without the part for videos, which needs torchvision."""
    folder = fixtures.folder(case)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings.pop("processor_class")
    processor = transformers.LlavaOnevisionProcessor.__new__(transformers.LlavaOnevisionProcessor)
    processor.__dict__.update(settings)
    processor.image_processor = fixtures.model(case).processor.image_processor.pictures
    return processor


def test_ids_and_pixels_of_pictures() -> None:
    model, pictures, processor = fixtures.model(PICTURES), fixtures.pictures(), hf_processor(PICTURES)
    batch = fixtures.prompts(PICTURES)
    made = processor.image_processor([[picture] for picture in pictures], return_tensors="np")
    assert made["image_sizes"].tolist() == [list(size) for size in cases.SIZES]
    squares = [cut[:count] for cut, count in zip(made["pixel_values"], (5, 4), strict=True)]
    pixels = np.asarray(batch.inputs.pixels)
    np.testing.assert_array_equal(pixels[:9], np.concatenate(squares))
    assert len(pixels) == 10 and not pixels[9:].any()
    processor.image_token = "<image>"
    for row, question in enumerate(fixtures.QUESTIONS):
        tokens = processor.replace_image_token(made, row)
        text = f"<|im_start|>user {tokens}\n{question}<|im_end|><|im_start|>assistant\n"
        assert batch.texts[row] == text
        ids = batch.inputs.token_ids[row][batch.inputs.valid[row]]
        assert ids.tolist() == model.processor.tokenizer(text)["input_ids"]
        assert ids.tolist().count(cases.IDS) == (batch.inputs.image_rows[row] >= 0).sum() == tokens.count("<image>")


def test_pictures_in_one_prompt_are_not_cut() -> None:
    model, pictures = fixtures.model(PICTURES), fixtures.pictures()
    batch = model.prepare([pictures], QUESTION)
    made = hf_processor(PICTURES).image_processor([pictures], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(batch.inputs.pixels, np.concatenate(made))
    assert batch.texts[0].count("<image>") == 2 * (25 + 1)
    with pytest.raises(InputError, match="picture 0 is alone in one prompt and beside others"):
        model.processor.encode(pictures, [[0], [0, 1]])


def test_frames_are_resized_and_normalised_as_the_video_processor_says() -> None:
    model = fixtures.model(CLIPS)
    clip: Any = fixtures.shown(CLIPS)[0]
    batch = model.prepare(clip, QUESTION)
    for ours, frame in zip(np.asarray(batch.inputs.pixels), clip.frames, strict=True):
        resized = np.asarray(Image.fromarray(frame).resize((32, 32), Image.Resampling.BICUBIC), np.float64)
        theirs = (resized / 255 - [0.5, 0.5, 0.5]) / [0.5, 0.5, 0.45]
        np.testing.assert_allclose(ours, theirs.transpose(2, 0, 1), atol=1e-5)
    assert batch.texts[0].count("<video>") == cases.tokens_of_clip(fixtures.reference(CLIPS).config, 3)


@pytest.mark.parametrize("case", [PICTURES, CLIPS], ids=lambda case: case.name)
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_a_picture_and_a_clip_in_one_batch_and_in_one_prompt(case: Any, together: bool) -> None:
    """A clip beside it does not keep a picture from being cut."""
    model, reference, (first, second) = fixtures.model(case), fixtures.reference(case), fixtures.pictures()
    clip = Clip([first, second])
    batch = model.prepare([[first, clip], [clip, second]] if together else [first, clip], fixtures.QUESTIONS)
    pixels, frames = np.asarray(batch.inputs.pixels), np.asarray(batch.inputs.extras["frames"])
    sizes = list(cases.SIZES[: 2 if together else 1])
    numbers = [1] * len(sizes)
    theirs = reference(
        input_ids=torch.tensor(batch.inputs.token_ids).long(),
        attention_mask=torch.tensor(batch.inputs.valid).long(),
        pixel_values=torch.tensor(pixels[: cases.squares_of(sizes, numbers, reference.config)]),
        image_sizes=torch.tensor(sizes),
        batch_num_images=torch.tensor(numbers),
        pixel_values_videos=torch.tensor(pixels[frames]).unflatten(0, (-1, 2)),
    )
    logits = theirs.logits.detach().numpy()[np.arange(2), batch.last()]
    assert distance(forward(model, batch).logits, logits) < 1e-5


def changed(case: Any, tmp_path: Path, **files: Any) -> Path:
    """A copy of a case's folder in which JSON files hold other fields, or are gone."""
    folder = tmp_path / "model"
    shutil.copytree(fixtures.folder(case), folder)
    for name, fields in files.items():
        path = folder / f"{name}.json"
        if fields is None:
            path.unlink()
        else:
            path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_llava_next_files_may_say_llava(tmp_path: Path) -> None:
    fields = json.loads((fixtures.folder(GRID) / "config.json").read_text())
    model = load(changed(GRID, tmp_path, config=fields | {"model_type": "llava"}))
    prompts = model.prepare(fixtures.shown(GRID), fixtures.QUESTIONS)
    assert distance(forward(model, prompts).logits, fixtures.recorded(GRID).logits) < 1e-5


def test_frames_without_settings_of_their_own_are_read_as_pictures(tmp_path: Path) -> None:
    folder = changed(CLIPS, tmp_path, video_preprocessor_config=None)
    assert list(load(folder).processor.image_processor.frames.image_mean) == [0.5, 0.45, 0.4]


def test_frames_may_be_described_beside_the_processor(tmp_path: Path) -> None:
    own = {"size": {"height": 32, "width": 32}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    settings = {"processor_config": {"video_processor": own}, "video_preprocessor_config": None}
    frames = load(changed(CLIPS, tmp_path, **settings)).processor.image_processor.frames
    assert [*frames.image_mean, *frames.image_std] == [0.1] * 3 + [0.2] * 3


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"video_preprocessor_config": {"size": {"height": 16, "width": 32}}}, "does not resize frames to 30 x 30"),
        ({"video_preprocessor_config": {"do_center_crop": True}}, "does not resize frames to 30 x 30"),
        ({"config": {"video_token_index": 5000}}, "no token of id 5000, which clips need"),
    ],
)
def test_folders_that_cannot_show_clips_are_refused(files: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        load(changed(PICTURES, tmp_path, **files))


def test_an_image_processor_that_cuts_otherwise_is_refused(tmp_path: Path) -> None:
    folder = changed(PICTURES, tmp_path, preprocessor_config={"image_grid_pinpoints": [[30, 30]]})
    with pytest.raises(CheckpointError, match=r"cuts a picture into 2 squares, but .* make 3"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image_std": [0, 0, 0]}, "image_std"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"resample": 99}, "resample"),
        ({"size": "x"}, "size"),
        ({"size": 30}, "video processor"),
        ({"size": {"height": 10**9, "width": 10**9}}, "size"),
        ({"rescale_factor": None, "image_std": "x"}, "image_std"),
    ],
)
def test_settings_of_frames_are_checked(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(changed(CLIPS, tmp_path, video_preprocessor_config=fields))
    assert "\n" not in str(caught.value)


def test_the_tokens_of_clips_may_not_be_written() -> None:
    with pytest.raises(PromptError, match="contains the tokenizer's special token '<video>'"):
        fixtures.model(PICTURES).prepare(fixtures.pictures()[0], "Where is the <video>?")


# --- LLaVA-NeXT's layout --------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_original() -> None:
    """LLaVA-NeXT cuts the prompt at `<image>`, and tokenises the pieces."""
    model, clips = fixtures.model(GRID), fixtures.shown(GRID)
    question = "The video lasts for 2.00 seconds, and 3 frames are uniformly sampled.\nIs the star before the fish?"
    batch = model.prepare(clips[0], question)
    pieces = [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        f"\n{question}<|im_end|>\n<|im_start|>assistant\n",
    ]
    before, after = (model.processor.tokenizer(piece)["input_ids"] for piece in pieces)
    expected = [*before, *[cases.IDS] * 3 * 3 * 4, *after]
    assert batch.inputs.token_ids[0][batch.inputs.valid[0]].tolist() == expected
    assert batch.word("star")[0] == len(expected) - len(after) + model.processor.tokenizer.convert_ids_to_tokens(
        after
    ).index("Ġstar")
    alone = model.prepare(None, QUESTION)
    assert alone.texts[0] == pieces[0] + QUESTION + "<|im_end|>\n<|im_start|>assistant\n"


def test_a_tokenizer_that_has_the_image_token_keeps_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(fixtures.folder(GRID), folder)
    cases.write_tokenizer(folder, ("<other>", "<image>"), cases.TEXT_TEMPLATE)
    model = load(folder)
    assert model.processor.image_token_id == cases.IDS + 1
    clip = fixtures.shown(GRID)[0]
    ours, plain = (forward(one, one.prepare(clip, QUESTION)).logits for one in (model, fixtures.model(GRID)))
    assert distance(ours, plain) == 0


def test_pictures_are_refused_where_only_clips_are_read() -> None:
    with pytest.raises(InputError, match=r"wrap frames in jaxid.Clip"):
        fixtures.model(GRID).prepare(fixtures.pictures()[0], QUESTION)
    with pytest.raises(InputError, match=r"picture missing\.png does not exist"):
        fixtures.model(GRID).prepare(Clip(["missing.png"]), QUESTION)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mm_patch_merge_type": None}, "mm_patch_merge_type='flat'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type='mlp3x_gelu'"),
        ({"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride=4"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode 'max'"),
        ({"mm_newline_position": "word"}, "mm_newline_position 'word'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type='qformer'"),
        ({"add_faster_video": True}, "add_faster_video=True"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "clip-vit-large-patch14-336"),
        ({"s2_scales": "336,672"}, "s2_scales='336,672'"),
        ({"vision_config": {"num_hidden_layers": 2, "model_type": "dinov2"}}, "dinov2"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        LlavaVideoConfig.from_original({**LLAVA_VIDEO_7B, **fields})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio 'anyres'"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy 'default'"),
        ({"vision_feature_layer": 27}, "vision_feature_layer"),
        ({"image_grid_pinpoints": [[384, 400]]}, "image_grid_pinpoints"),
    ],
)
def test_settings_of_hugging_faces_layout_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        LlavaVideoConfig.from_hf(fields)


# --- full size ------------------------------------------------------------------------------------------------------


def covered(family: str, fields: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of the tensors that a key table expects, and the number of parameters."""
    kind = FAMILIES[family]
    config = kind.config(fields)
    _, abstract = abstract_parameters(kind, config)
    table: dict[str, tuple[int, ...]] = {}
    for key in kind.keys(config):
        shape, numbered = abstract[key.target].shape, "{layer}" in key.source
        for layer in range(shape[0]) if numbered else [None]:
            single = np.broadcast_to(np.zeros((), np.int8), shape[1:] if numbered else shape)
            table[key.source.format(layer=layer)] = key.to_checkpoint(single).shape
    return table, sum(leaf.size for leaf in flatten(abstract).values())


def test_the_original_in_full_size() -> None:
    table, parameters = covered("llava_qwen", LLAVA_VIDEO_7B)
    tower = FAMILIES["llava_qwen"].config(LLAVA_VIDEO_7B).vision_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    with torch.device("meta"):
        described = {**LLAVA_VIDEO_7B, "vision_config": {name: getattr(tower, name) for name in names}}
        theirs = llava_next_video.LlavaNextVideo(described)
    spelled = {llava_next_video._published(name): tuple(one.shape) for name, one in theirs.state_dict().items()}
    assert table == spelled
    assert parameters == sum(one.numel() for one in theirs.parameters()) == 8_030_348_832


def test_hugging_faces_layout_in_full_size() -> None:
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    text = {"model_type": "qwen2", **sizes, "num_key_value_heads": 4, "vocab_size": 152128}
    table, parameters = covered("llava_onevision", {"model_type": "llava_onevision", "text_config": text})
    with torch.device("meta"):
        theirs = transformers.LlavaOnevisionForConditionalGeneration(
            transformers.LlavaOnevisionConfig(text_config=transformers.Qwen2Config(**text))
        )
    spelled = {}
    for name, one in theirs.state_dict().items():
        for pattern, replacement in FAMILIES["llava_onevision"].renames:
            name = re.sub(pattern, replacement, name)
        spelled[name] = tuple(one.shape)
    assert table == spelled
    assert parameters == sum(one.numel() for one in theirs.parameters())


@pytest.mark.parametrize(
    ("family", "fields", "extras", "rows"),
    [
        ("llava_qwen", LLAVA_VIDEO_7B, {"frames": (8,)}, 1 + 8 * 196),
        ("llava_onevision", {}, {"taps": (7000, 4), "weights": (7000, 4)}, 1 + 8 * 729 + 7000),
        ("llava_onevision", {}, {"frames": (3,)}, 1 + 8 * 729 + 3 * 196),
    ],
)
def test_full_size_features_trace(
    family: str, fields: dict[str, Any], extras: dict[str, tuple[int, ...]], rows: int
) -> None:
    kind = FAMILIES[family]
    config = kind.config(
        fields or {"text_config": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}}
    )
    definition, state = nnx.split(nnx.eval_shape(lambda: kind.network(config, rngs=nnx.Rngs(0))))
    none = jnp.zeros((1, 1), jnp.int32)
    dtypes = {"frames": jnp.int32, "taps": jnp.int32, "weights": jnp.float32}
    inputs = Inputs(
        token_ids=none,
        positions=none,
        valid=none > 0,
        last=none[0],
        pixels=jax.ShapeDtypeStruct((8, 3, 384, 384), jnp.float32),
        image_rows=none,
        extras={name: jax.ShapeDtypeStruct(shape, dtypes[name]) for name, shape in extras.items()},
    )

    def run(state: Any, inputs: Inputs) -> Any:
        network: Any = nnx.merge(definition, state)
        return network.features(inputs)

    features = jax.eval_shape(run, state, inputs)
    assert features.shape == (rows, config.text_config.hidden_size)
