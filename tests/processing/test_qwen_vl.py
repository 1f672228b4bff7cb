"""Qwen2-VL and Qwen2.5-VL: ids, patches and positions as Hugging Face makes them, laid out for windows."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from families import Case
from families import qwen_vl as cases
from fixtures import distance
from flax import nnx
from full_size import CONFIGS
from PIL import Image
from processors import bytes_tokenizer
from safetensors.numpy import load_file, save_file
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from jaxid.checkpoints.loading import load
from jaxid.errors import CheckpointError, InputError, PromptError
from jaxid.families.qwen_vl import QwenVLConfig, QwenVLProcessor, token_indices
from jaxid.families.registry import FAMILIES
from jaxid.interp.forward import forward
from jaxid.nn.inputs import Inputs
from jaxid.prompts.base import Encoded
from jaxid.prompts.pictures import Clip
from jaxid.prompts.processor import Processor, Prompts

PLAIN, _, WINDOWS, WIDE_WINDOWS = cases.EVERY
QUESTION = fixtures.QUESTIONS[0]

over_cases = pytest.mark.parametrize("case", cases.EVERY, ids=lambda case: case.name)


def hf_processor(tokenizer: Any, image_processor: Any) -> Any:
    """Hugging Face's own, without the part for videos, which needs torchvision."""
    processor = transformers.Qwen2VLProcessor.__new__(transformers.Qwen2VLProcessor)
    processor.tokenizer, processor.image_processor, processor.video_processor = tokenizer, image_processor, None
    processor.chat_template = tokenizer.chat_template
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    processor.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    return processor


def theirs(ours: Processor, groups: list[list[np.ndarray]], questions: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What Hugging Face's processor makes of prompts with the same tokenizer and image processor."""
    processor = hf_processor(ours.tokenizer, ours.image_processor)
    messages = [
        [{"role": "user", "content": [*[{"type": "image"}] * len(group), {"type": "text", "text": question}]}]
        for group, question in zip(groups, questions, strict=True)
    ]
    texts = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [picture for group in groups for picture in group]
    return dict(processor(text=texts, images=pictures, padding=True, return_tensors="pt"))


def in_order(batch: Prompts, values: Any) -> np.ndarray:
    """Values of patches, four and four as the prompts' image tokens show them."""
    slots = np.asarray(batch.inputs.image_rows)
    values = np.asarray(values)
    merged = values.reshape(-1, cases.MERGE**2, *values.shape[2:])
    return merged[slots[slots >= 0]].reshape(-1, *values.shape[2:])


# --- against Hugging Face's processor -------------------------------------------------------------------------------


def assert_alike(model: Any, processor: Processor, batch: Prompts, groups: list[list[np.ndarray]]) -> None:
    """Ids, patches, their positions and those of tokens are Hugging Face's."""
    found, inputs = theirs(processor, groups, fixtures.QUESTIONS), batch.inputs
    valid, kept = np.asarray(inputs.valid), found["attention_mask"].bool()
    for row in range(2):
        assert inputs.token_ids[row][valid[row]].tolist() == found["input_ids"][row][kept[row]].tolist()
    np.testing.assert_array_equal(in_order(batch, inputs.pixels), found["pixel_values"])
    grids = found["image_grid_thw"]
    places = get_vision_position_ids(grids, cases.MERGE)
    np.testing.assert_array_equal(in_order(batch, inputs.extras["patch_positions"]), places)
    assert in_order(batch, inputs.extras["patch_valid"]).all()
    assert inputs.extras["patch_valid"].sum() == len(places)
    positions, _ = model.get_rope_index(
        found["input_ids"], found["mm_token_type_ids"], image_grid_thw=grids, attention_mask=found["attention_mask"]
    )
    rotary = np.asarray(inputs.rope_positions)
    for row in range(2):
        np.testing.assert_array_equal(rotary[row][:, valid[row]], positions[:, row, kept[row]])


@over_cases
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_prompts_are_hugging_faces(case: Case, together: bool) -> None:
    model, (first, second) = fixtures.model(case), fixtures.pictures()
    groups = [[first, second], [second, first]] if together else [[first], [second]]
    batch = model.prepare(groups, fixtures.QUESTIONS)
    assert len({len(group) for group in batch.inputs.extras["patch_valid"]}) == 1
    assert_alike(fixtures.reference(case).model, model.processor, batch, groups)


def test_prompts_of_a_tokenizer_of_bytes_are_hugging_faces(tmp_path: Path) -> None:
    """As Qwen's own, whose words begin with their space."""
    folder = tmp_path / "model"
    shutil.copytree(fixtures.folder(WINDOWS), folder)
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens(list(cases.SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    token = tokenizer.token_to_id("<|image_pad|>")
    config = dataclasses.replace(fixtures.model(WINDOWS).config, image_token_index=token)
    processor = QwenVLProcessor.from_folder(folder, config)
    groups = [[picture] for picture in fixtures.pictures()]
    batch = processor.prepare(groups, fixtures.QUESTIONS)
    reference = copy.copy(fixtures.reference(WINDOWS).model)
    assert_alike(reference, processor, batch, groups)
    words = processor.tokenizer.convert_ids_to_tokens(batch.inputs.token_ids[range(2), batch.word("fish")].tolist())
    assert words == ["Ġfish", "Ġfish"]
    assert processor.answer_ids(["left", "right"]).tolist() == [tokenizer.token_to_id(w) for w in ("left", "right")]


def test_positions_continue_after_a_prompt() -> None:
    model, picture = fixtures.model(PLAIN), fixtures.pictures()[1]
    batch = model.prepare(picture, fixtures.QUESTIONS)
    longer = batch.extended(np.array([[7, 8, 9], [8, 9, 0]], np.int32), np.array([3, 2], np.int32))
    ids, valid = torch.tensor(longer.inputs.token_ids).long(), torch.tensor(longer.inputs.valid)
    kinds = (ids == model.config.image_token_index).int()
    grids = cases.arguments(model.prepare(picture, QUESTION))["image_grid_thw"].expand(2, 3)
    reference = fixtures.reference(PLAIN).model
    positions, deltas = reference.get_rope_index(ids, kinds, image_grid_thw=grids, attention_mask=valid)
    assert (deltas < 0).all()  # a picture takes less room than tokens
    for row in range(2):
        kept = np.asarray(valid[row])
        ours = np.asarray(longer.inputs.rope_positions)[row][:, kept]
        np.testing.assert_array_equal(ours, positions[:, row, kept])


# --- the layout -----------------------------------------------------------------------------------------------------


def test_positions_of_tokens_in_windows() -> None:
    """Three rows and five columns in windows of 2 x 2: the window at the right and the one below are not full."""
    assert token_indices(3, 5, 2).tolist() == [0, 1, 4, 5, 8, 2, 3, 6, 7, 10, 12, 13, 16, 17, 20]
    assert token_indices(2, 3, 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert token_indices(2, 3, 8).tolist() == [0, 1, 2, 8, 9, 10]


def published(alias: str) -> QwenVLProcessor:
    """The processor of a published checkpoint, but for its tokenizer."""
    processor = object.__new__(QwenVLProcessor)
    processor.config = FAMILIES[CONFIGS[alias]["model_type"]].config(copy.deepcopy(CONFIGS[alias]))
    processor.image_processor = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
        min_pixels=3136, max_pixels=12845056
    )
    processor.placeholder = "<|image_pad|>"
    return processor


def noise(*size: int) -> Image.Image:
    """A PIL image: of arrays one or three pixels high, Hugging Face's processor takes rows for channels."""
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 255, (*size, 3)).astype(np.uint8))


SIZES = [(480, 640), (640, 480), (112, 112), (30, 700), (1, 90), (300, 301)]


@pytest.mark.parametrize("alias", ["qwen2-2b", "qwen-7b"])
def test_pictures_in_full_size(alias: str) -> None:
    processor = published(alias)
    encoded = processor.encode([noise(*size) for size in SIZES], [list(range(len(SIZES)))])
    made = processor.image_processor([noise(*size) for size in SIZES], return_tensors="pt")
    grids = made["image_grid_thw"]
    merged = np.asarray(encoded.pixels).reshape(-1, 4, 1176)
    valid = encoded.extras["patch_valid"].reshape(-1, 4)
    rows = np.concatenate([token.rows for token in encoded.tokens])
    np.testing.assert_array_equal(merged[rows].reshape(-1, 1176), made["pixel_values"])
    assert [token.text.count(processor.placeholder) for token in encoded.tokens] == (grids.prod(dim=1) // 4).tolist()
    assert [token.grid for token in encoded.tokens] == [
        (int(rows) // 2, int(columns) // 2) for _, rows, columns in grids
    ]
    assert (valid == valid[:, :1]).all() and np.flatnonzero(valid[:, 0]).tolist() == sorted(rows.tolist())
    assert not encoded.pixels[~encoded.extras["patch_valid"]].any()
    if alias == "qwen2-2b":
        assert (np.diff(rows)[np.diff(rows) != 1] > 0).all()
        return
    assert encoded.pixels.shape[1] % 64 == 0
    # By their rows, tokens are in Hugging Face's order, and windows begin where its windows do.
    index, starts = get_vision_window_index(grids, 2, 112, 14)
    np.testing.assert_array_equal(np.argsort(rows), index)
    inside = encoded.extras["patch_valid"].reshape(-1, 64).sum(axis=1)
    np.testing.assert_array_equal(np.cumsum(inside[inside > 0]), np.unique(starts)[1:])


@pytest.mark.parametrize(("alias", "unit"), [("qwen2-2b", 4), ("qwen-7b", 64)])
def test_pictures_of_about_one_size_share_a_shape(alias: str, unit: int) -> None:
    processor = published(alias)
    shapes = {processor.encode([noise(480, width)], [[0]]).pixels.shape for width in range(590, 690, 10)}
    assert len(shapes) < 4
    for width in (40, 200, 640):
        encoded: Encoded = processor.encode([noise(480, width)], [[0]])
        needed = int(encoded.tokens[0].rows.max()) + 1
        places = encoded.pixels.shape[1] // 4
        assert needed <= places <= 1.25 * (-(-needed * 4 // unit) * unit // 4)


def test_tokens_of_a_photograph() -> None:
    assert published("qwen2-2b").usual_tokens == published("qwen-7b").usual_tokens == 17 * 23
    assert fixtures.model(PLAIN).processor.usual_tokens == 4 * 5  # max_pixels


@pytest.mark.parametrize("case", [PLAIN, WINDOWS, WIDE_WINDOWS], ids=lambda case: case.name)
def test_padding_of_patches_is_never_read(case: Case) -> None:
    model, batch = fixtures.model(case), fixtures.prompts(case)
    padding, shown = ~np.asarray(batch.inputs.extras["patch_valid"]), np.asarray(batch.inputs.pixels)
    assert padding.any()
    pixels = np.where(padding[..., None], np.float32(9), shown)
    other = dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, pixels=pixels))
    assert distance(forward(model, other).logits, forward(model, batch).logits) < 1e-6
    pixels = np.where(padding[..., None], shown, np.float32(0.9) * shown)
    other = dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, pixels=pixels))
    assert distance(forward(model, other).logits, forward(model, batch).logits) > 1e-3


def test_windows_matter() -> None:
    """Without them, or with other blocks that know none, the tower's end is another."""
    model, inputs = fixtures.model(WIDE_WINDOWS), fixtures.device_inputs(fixtures.prompts(WIDE_WINDOWS))
    network: Any = model.network()

    def features(**changes: Any) -> np.ndarray:
        network.tower.config = dataclasses.replace(model.config.vision_config, **changes)
        return np.asarray(jax.jit(lambda: network.features(inputs))())

    clean = features()
    for changes in ({"fullatt_block_indexes": (0, 2)}, {"window_size": 0}):
        assert distance(features(**changes), clean) > 1e-3


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused() -> None:
    model, (first, second) = fixtures.model(PLAIN), fixtures.pictures()
    with pytest.raises(InputError, match="reads pictures, not clips"):
        model.prepare(Clip([first, second]), QUESTION)
    with pytest.raises(InputError, match="is a strip: 500 x 2 pixels"):
        model.prepare(noise(2, 500), QUESTION)
    with pytest.raises(InputError, match=r"picture missing\.png does not exist"):
        model.prepare("missing.png", QUESTION)
    with pytest.raises(PromptError, match=r"image token '<\|image_pad\|>'"):
        model.prepare(first, "Where is the <|image_pad|>?")


def changed(case: Case, tmp_path: Path, **files: Any) -> Path:
    """A copy of a case's folder in which JSON files hold other fields."""
    folder = tmp_path / "model"
    shutil.copytree(fixtures.folder(case), folder)
    for name, fields in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize("name", ["patch_size", "merge_size", "temporal_patch_size"])
def test_an_image_processor_that_cuts_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"has {name} 3, config.json has [24]"):
        load(changed(WINDOWS, tmp_path, preprocessor_config={name: 3}))


@pytest.mark.parametrize(
    ("alias", "part", "fields", "named"),
    [
        ("qwen-3b", "vision_config", {"out_hidden_size": 1024}, "tokens of width 1024, the decoder's have 2048"),
        ("qwen2-2b", "vision_config", {"hidden_size": 1024}, "tokens of width 1024, the decoder's have 1536"),
        ("qwen-3b", "vision_config", {"spatial_patch_size": 16}, "spatial_patch_size differs"),
        ("qwen-3b", "vision_config", {"rope_parameters": {"rope_type": "yarn"}}, "only rope_type 'axial'"),
        ("qwen2-2b", "vision_config", {"deepstack_visual_indexes": [5]}, r"vision_config.*deepstack_visual_indexes"),
        ("qwen2-2b", "vision_config", {"hidden_act": "swish9"}, r"vision_config.*swish9"),
        ("qwen-7b", None, {"rope_scaling": {"type": "spiral", "factor": 4.0}}, "'spiral'"),
        ("qwen-7b", None, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}}, "sum up to 64"),
        ("qwen-7b", None, {"text_config": {"model_type": "qwen3"}}, "fields that jaxid does not implement"),
        ("qwen-7b", None, {"num_experts": 8}, "num_experts=8"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    alias: str, part: str | None, fields: dict[str, Any], named: str
) -> None:
    whole = copy.deepcopy(CONFIGS[alias])
    (whole[part] if part else whole).update(fields)
    with pytest.raises(CheckpointError, match=named):
        QwenVLConfig.from_hf(whole)


# --- as published ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PLAIN, WINDOWS], ids=lambda case: case.name)
def test_a_folder_as_published_is_the_same_model(case: Case, tmp_path: Path) -> None:
    """A flat config.json, and names as before transformers 4.52."""
    folder = tmp_path / "model"
    shutil.copytree(fixtures.folder(case), folder)
    fields = json.loads((folder / "config.json").read_text())
    text = fields.pop("text_config")
    turning = text.pop("rope_parameters")
    for name in ("model_type", "layer_types"):
        text.pop(name, None)
    text["rope_theta"] = turning.pop("rope_theta")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": turning.pop("mrope_section")}
    fields["vision_config"]["in_chans"] = fields["vision_config"].pop("in_channels", 3)
    (folder / "config.json").write_text(json.dumps({**text, **fields}))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = re.sub(r"^model\.visual\.", "visual.", name)
        tensors[re.sub(r"^model\.language_model\.", "model.", name)] = tensor
    assert {name.split(".")[0] for name in tensors} <= {"visual", "model", "lm_head"}
    save_file(tensors, folder / "model.safetensors")
    model = load(folder)
    assert model.config == fixtures.model(case).config
    batch = fixtures.prompts(case)
    assert distance(forward(model, batch).logits, forward(fixtures.model(case), batch).logits) == 0


@pytest.mark.parametrize("alias", ["qwen2-2b", "qwen-7b"])
def test_full_size_features_trace(alias: str) -> None:
    kind, config = FAMILIES[CONFIGS[alias]["model_type"]], published(alias).config
    definition, state = nnx.split(nnx.eval_shape(lambda: kind.network(config, rngs=nnx.Rngs(0))))
    none = jnp.zeros((1, 1), jnp.int32)
    patches = (2, 32 * 64)
    inputs = Inputs(
        token_ids=none,
        positions=none,
        valid=none > 0,
        last=none[0],
        pixels=jax.ShapeDtypeStruct((*patches, 1176), jnp.float32),
        image_rows=none,
        extras={
            "patch_positions": jax.ShapeDtypeStruct((*patches, 2), jnp.int32),
            "patch_valid": jax.ShapeDtypeStruct(patches, jnp.bool_),
        },
    )

    def run(state: Any, inputs: Inputs) -> Any:
        network: Any = nnx.merge(definition, state)
        return network.features(inputs)

    assert jax.eval_shape(run, state, inputs).shape == (2, 512, config.text_config.hidden_size)
