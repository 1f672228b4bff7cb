"""Image processors' settings: odd ones are refused in one line, before any weight is read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxid.checkpoints.encoders import load_encoder
from jaxid.checkpoints.loading import find_folder, load
from jaxid.errors import CheckpointError, InputError
from jaxid.families.openclip import OpenCLIPImages

NAN = float("nan")


def copied(name: str, tmp_path: Path, text: str, file: str = "preprocessor_config.json") -> Path:
    """A model's folder without its weights, with another file of settings."""
    for path in find_folder(name).iterdir():
        if path.name != file and path.suffix != ".safetensors":
            (tmp_path / path.name).symlink_to(path.resolve())
    (tmp_path / file).write_text(text)
    return tmp_path


def settings(name: str, **changed: Any) -> str:
    return json.dumps({**json.loads((find_folder(name) / "preprocessor_config.json").read_text()), **changed})


def refused(read: Any, folder: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        read(folder)
    said = str(caught.value)
    assert str(folder) in said and "\n" not in said and len(said) < 700


ODD = [
    ("image_mean", [0.5]),
    ("image_mean", [0.5, 0.5, "x"]),
    ("image_mean", "x"),
    ("image_mean", [NAN, 0, 0]),
    ("image_mean", [1e300, 0, 0]),
    ("image_mean", [[0.5, 0.5, 0.5]]),
    ("image_std", 0),
    ("image_std", [0, 0, 0]),
    ("image_std", [0.5, 0.5, -0.5]),
    ("image_std", [1e-45, 1e-45, 1e-45]),
    ("image_std", {"a": 1}),
    ("resample", 99),
    ("resample", -1),
    ("resample", "x"),
    ("resample", [3]),
    ("size", {"shortest_edge": -3}),
    ("size", {"shortest_edge": 0}),
    ("size", {"shortest_edge": 1.5}),
    ("size", {"shortest_edge": 10**9}),
    ("size", {"height": 10**400}),
    ("size", "x"),
    ("size", {"breadth": 3}),
    ("crop_size", {"height": 10**6, "width": 10**6}),
    ("crop_size", {"height": 10, "width": 10}),
    ("crop_size", -1),
    ("rescale_factor", 0),
    ("rescale_factor", NAN),
    ("rescale_factor", "x"),
    ("rescale_factor", 1e300),
    ("do_resize", "no"),
    ("do_normalize", 3),
    ("do_center_crop", False),
    ("image_processor_type", 3),
    ("image_processor_type", "x"),
]


@pytest.mark.parametrize(("name", "value"), ODD, ids=lambda value: f"{value!r:.30}")
def test_odd_settings_are_refused_before_the_weights(name: str, value: Any, tmp_path: Path) -> None:
    """Pictures of another size than the tower's, too: then neither resizing nor cropping may be off."""
    refused(load, copied("tiny-llava", tmp_path, settings("tiny-llava", **{name: value})), r"image processor|JSON")


def test_the_same_settings_are_read_up_to_the_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        load(copied("tiny-llava", tmp_path, settings("tiny-llava")))


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"', "", "{", "[" * 50_000, '{"a":' * 50_000, "\x00\x01"])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_files_that_hold_no_settings(text: str, file: str, tmp_path: Path) -> None:
    refused(load, copied("tiny-llava", tmp_path, text, file), "JSON")


@pytest.mark.parametrize(("name", "value"), ODD[::4], ids=lambda value: f"{value!r:.30}")
def test_encoders_of_two_towers_are_checked_alike(name: str, value: Any, tmp_path: Path) -> None:
    folder = copied("tiny-clip", tmp_path, settings("tiny-clip", **{name: value}))
    (folder / "model.safetensors").symlink_to(find_folder("tiny-clip") / "model.safetensors")
    refused(load_encoder, folder, r"image processor|JSON")


@pytest.mark.parametrize(
    "changed",
    [
        {"mean": [0.5]},
        {"mean": "x"},
        {"std": [0, 0, 0]},
        {"std": [NAN, 1, 1]},
        {"std": 3},
        {"size": -1},
        {"size": 1.5},
        {"size": "x"},
        {"size": [[8]]},
        {"size": {"a": 1}},
        {"interpolation": ["bicubic"]},
        {"interpolation": 99},
        {"resize_mode": {}, "interpolation": "nearest"},
    ],
    ids=str,
)
def test_settings_of_openclip(changed: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="preprocess_cfg"):
        OpenCLIPImages(8, changed)
    assert OpenCLIPImages(8, {"size": [8, 8]}).side == 8


def test_a_picture_that_a_processor_refuses_is_a_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("tiny-llava")
    monkeypatch.setattr(model.processor, "image_processor", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="the image processor cannot read a picture: division by zero"):
        model.prepare(np.zeros((8, 8, 3), np.uint8), "Where is the star?")
