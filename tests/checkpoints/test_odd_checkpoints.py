"""Odd checkpoints: ties that the tensors contradict, odd values in configs, quantised weights."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
import torch
from encoders import ENCODER_CASES
from families import EVERY, Case
from families.base import as_written
from safetensors.torch import load_file, save_file

from jaxid.checkpoints.loading import abstract_parameters, as_stored, find_folder, load, parsed
from jaxid.checkpoints.tensors import TensorFolder, read_parameters
from jaxid.errors import CheckpointError, JaxidError
from jaxid.families.openclip import ARCHITECTURES
from jaxid.families.registry import ENCODERS, FAMILIES
from jaxid.io import reading

BY_NAME = {case.name: case for case in EVERY}
HEAD = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")

# --- ties -----------------------------------------------------------------------------------------------------------


def embedding(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name in weights if name.endswith("embed_tokens.weight"))


def changed(case: Case, folder: Path, change: str, **top: Any) -> Path:
    """A copy of a tiny model whose unembedding is another, or stands alone, and whose config says something else."""
    shutil.copytree(fixtures.folder(case), folder)
    weights = load_file(folder / "model.safetensors")
    name, head = embedding(weights), next((name for name in HEAD if name in weights), "lm_head.weight")
    if change == "head of its own":
        weights[head] = weights[name].flip(0).clone()
    elif change == "same head":
        weights[head] = weights[name].clone()
    elif change == "head alone":
        weights[head] = weights.pop(name)
    else:
        weights.pop(head, None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    for place, value in top.items():
        part = fields["text_config"] if place == "text" else fields
        part.pop("tie_word_embeddings", None)
        if value is not None:
            part["tie_word_embeddings"] = value
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


TIES = [
    ("llava-grouped-tied-linear-full-odd", "head of its own", {}),
    ("llava-plain", "head of its own", {"top": True, "text": False}),
    ("llava-plain", "same head", {"top": False, "text": True}),
    ("llava-plain", "no head", {"top": None, "text": True}),
    ("llava-plain", "head alone", {"top": True, "text": None}),
    ("gemma3", "head of its own", {}),
    ("gemma3", "no head", {"top": None, "text": False}),
    ("gemma3", "head of its own", {"top": False, "text": True}),
    ("internvl", "head of its own", {"top": None, "text": None}),
    ("internvl", "no head", {"top": None, "text": False}),
    ("qwen2.5-vl-windows", "head of its own", {}),
    ("qwen2-vl", "no head", {"top": False, "text": True}),
    ("onevision-clips-tied-layers", "head of its own", {}),
    ("mllama", "same head of other rows", {"top": True, "text": True}),
]


@pytest.mark.parametrize(("name", "change", "top"), TIES, ids=lambda part: str(part).replace(" ", "-"))
def test_the_unembedding_is_hugging_faces(name: str, change: str, top: dict[str, Any], tmp_path: Path) -> None:
    if name == "mllama":  # never tied, and its tensors stay as they are
        shutil.copytree(fixtures.folder(BY_NAME[name]), tmp_path / "model")
        fields = json.loads((tmp_path / "model" / "config.json").read_text())
        fields["tie_word_embeddings"] = fields["text_config"]["tie_word_embeddings"] = True
        (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
        folder = tmp_path / "model"
    else:
        folder = changed(BY_NAME[name], tmp_path / "model", change, **top)
    theirs = as_written(folder)
    ours = load(folder).network().decoder
    wanted = theirs.get_output_embeddings().weight.detach().numpy().T
    np.testing.assert_array_equal(ours.unembed_matrix(), wanted)
    embedded = theirs.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(ours.embedding[...], embedded)


# --- configs --------------------------------------------------------------------------------------------------------

ODD: list[Any] = [0, -1, 1.5, "x", None, True, [], {}, 5, 7, 10**9, 10**20, 1e300, -1e9, "", [None], [10**9], {"a": 1}]


def fields_of(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from fields_of(value, (*prefix, name))


def with_value(fields: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    found = node = copy.deepcopy(fields)
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return found


def read(kind: Any, fields: dict[str, Any], files: TensorFolder | None, known: Any = None) -> Any:
    """All that a config decides: it is parsed, the network is built, and its tensors are read if there are any.

    A config that equals the known one decides the same, and is not built again.
    """
    config = whole = parsed(kind, fields, Path("config.json"))
    if whole == known:
        return whole
    renames, unused = kind.renames, kind.unused
    if files is not None:
        config, renames, unused = as_stored(kind, config, files)
    with reading("config.json", "a config"):
        _, abstract = abstract_parameters(kind, config)
    if files is not None:
        read_parameters(files, abstract, kind.keys(config), renames=renames, unused=unused)
    return whole


CONFIGS = {
    **{
        name: (name, None)
        for name in ("llava-plain", "gemma3", "mllama", "internvl", "qwen2.5-vl-windows", "video-grid")
    },
    "ViT-B-32": ("open_clip", ARCHITECTURES["ViT-B-32"]),
    "coca_ViT-B-32": ("open_clip_coca", ARCHITECTURES["coca_ViT-B-32"]),
    **{case.name: (case.name, "encoder") for case in ENCODER_CASES if case.name != "clip-early"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_odd_values_are_named_or_harmless(name: str) -> None:
    """A fixed sample of every field and value; whatever else is raised would be a traceback."""
    files = None
    if name in BY_NAME:
        folder = fixtures.folder(BY_NAME[name])
        fields, files = json.loads((folder / "config.json").read_text()), TensorFolder(folder)
        kind = FAMILIES[fields["model_type"]]
    elif CONFIGS[name][1] == "encoder":
        case = next(case for case in ENCODER_CASES if case.name == name)
        fields, kind = json.loads(case.build().config.to_json_string()), ENCODERS[name]
    else:
        fields, kind = copy.deepcopy(dict(ARCHITECTURES[name])), ENCODERS[CONFIGS[name][0]]
    known = read(kind, fields, files)
    cases = [(path, odd) for path in fields_of(fields) for odd in ODD if path[-1] != "model_type"]
    refused = 0
    for path, odd in random.Random(0).sample(cases, min(40, len(cases))):
        try:
            read(kind, with_value(fields, path, odd), files, known)
        except JaxidError as error:
            refused += 1
            assert "\n" not in str(error)
            assert "config.json" in str(error) or "does not fit its config" in str(error)
    assert refused > 8


NAMED = [
    ({"hidden_size": 0}, r"config\.json: text_config\.hidden_size must be an integer from 1"),
    ({"hidden_size": 33}, r"hidden_size 33 is not divisible by num_attention_heads 4"),
    ({"num_hidden_layers": 0}, r"text_config\.num_hidden_layers must be an integer from 1 to 10000, not 0"),
    ({"num_hidden_layers": 10**9}, r"text_config\.num_hidden_layers must be"),
    ({"num_attention_heads": 5}, r"is not divisible by num_attention_heads 5"),
    ({"num_key_value_heads": 3}, r"is not divisible by num_key_value_heads 3"),
    ({"rms_norm_eps": "x"}, r"text_config\.rms_norm_eps must be a finite number above 0, not 'x'"),
    ({"rms_norm_eps": 0}, r"rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, r"rms_norm_eps"),
    ({"vocab_size": None}, r"text_config\.vocab_size"),
    ({"head_dim": 7}, r"heads of width 7 cannot be rotated"),
    ({"attention_bias": "x"}, r"text_config\.attention_bias must be true or false"),
    ({"hidden_act": "x"}, r"hidden_act='x'"),
    ({"rope_parameters": []}, r"text_config\.rope_parameters must be an object"),
    ({"rope_parameters": {"rope_type": ["x"]}}, r"rope_parameters\.rope_type must be a string"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, r"rope_parameters\.factor must be a finite number"),
    ({"rope_scaling": {"type": "longrope", "short_factor": 3, "long_factor": [1.0]}}, r"short_factor must be a list"),
    ({"layer_types": [["x"]]}, r"text_config\.layer_types must be a list"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "named"), NAMED, ids=[str(number) for number in range(len(NAMED))])
def test_odd_values_of_the_decoder_are_named(text: dict[str, Any], named: str) -> None:
    fields = json.loads((fixtures.folder(BY_NAME["llava-plain"]) / "config.json").read_text())
    fields["text_config"] |= text
    with pytest.raises(CheckpointError, match=named):
        read(FAMILIES["llava"], fields, None)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"text_config": []}, r"config\.json: text_config must be an object"),
        ({"vision_config": {"patch_size": 1.5}}, r"vision_config\.patch_size must be"),
        ({"vision_config": {"image_size": 0}}, r"vision_config\.image_size must be"),
        ({"vision_config": {"image_size": [32, 32]}}, r"vision_config: image_size must be an integer"),
        ({"vision_config": {"image_size": 16, "patch_size": 32}}, r"image_size 16 with patch_size 32"),
        ({"image_token_index": -1}, r"image_token_index must be an integer from 0"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\).*convert them to bfloat16"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, r"text_config\.quantization_config.*fp8"),
    ],
)
def test_odd_values_at_the_top_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        parsed(FAMILIES["llava"], {"model_type": "llava", **fields}, Path("config.json"))


@pytest.mark.parametrize("text", ["[]", "null", "3", "[" * 100_000, '"x"', '{"model_type": NaN}', "\ufeff{}"])
def test_config_files_of_other_kinds(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_password_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise ValueError("cannot reach https://me:secret@host/x with hf_abcdefghijkl\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for name in ("some/model", "https://me:secret@host/x"):
        with pytest.raises(CheckpointError) as caught:
            find_folder(name)
        assert not {word for word in ("secret", "abcdefghijkl", "\n") if word in str(caught.value)}


def test_the_sizes_of_a_tensor_are_numbers(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        TensorFolder(tmp_path)
