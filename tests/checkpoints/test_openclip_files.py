"""OpenCLIP's folders and single files through the loader: weights of every kind, tokenizer, pictures, refusals."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from jaxid.checkpoints import encoders, openclip
from jaxid.checkpoints.encoders import load_encoder
from jaxid.errors import CheckpointError, InputError
from jaxid.families.base import Encoder
from jaxid.io import write_json

GOLDEN = Path(__file__).parents[1] / "golden"

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = ["!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
PIECES += ["!</w>", "&</w>", "<</w>", '"</w>', "'</w>", ".</w>", "ca", "cat</w>", ",</w>", START, END]
"""A byte-pair vocabulary as long as the golden models', with CLIP's conventions: "!" is 0, the end token is last."""


def write_bpe_tokenizer(folder: Path, pieces: list[str] = PIECES) -> None:
    """A small tokenizer of CLIP's kind, in Hugging Face's layout."""
    write_json(folder / "vocab.json", {piece: number for number, piece in enumerate(pieces)})
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **special})


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer; the golden CLIP's shape is the architecture "tiny", with the exact GELU "exact"."""
    write_bpe_tokenizer(tmp_path)
    config = json.loads((GOLDEN / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    known = {**openclip.ARCHITECTURES, "tiny": config, "exact": config | {"quick_gelu": False}}
    monkeypatch.setattr(openclip, "ARCHITECTURES", known)
    return tmp_path


def fill(folder: Path, name: str, source: str, target: str) -> None:
    """Golden config and weights, under the names that OpenCLIP publishes."""
    shutil.copy(GOLDEN / name / "open_clip_config.json", folder)
    shutil.copy(GOLDEN / name / source, folder / target)


def assert_same(one: Encoder, other: Encoder) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.parameters, other.parameters)


# --- weights ------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_holds_the_same(tiny: Path) -> None:
    found = [
        load_encoder(GOLDEN / "clip" / name, architecture="tiny", tokenizer=tiny)
        for name in ("weights.safetensors", "weights.pt", "negclip.pt")
    ]
    for source, target in (
        ("weights.safetensors", "open_clip_model.safetensors"),
        ("weights.pt", "open_clip_pytorch_model.bin"),
        ("negclip.pt", "open_clip_pytorch_model.pt"),
    ):
        fill(tiny, "clip", source, target)
        found.append(load_encoder(tiny))
        (tiny / target).unlink()
    for other in found[1:]:
        assert_same(found[0], other)
    token = load_file(GOLDEN / "clip" / "weights.safetensors")["token_embedding.weight"]
    np.testing.assert_array_equal(found[0].parameters["text_encoder"]["embedding"], token)


def test_checkpoints_of_long_training_runs_are_read(tiny: Path) -> None:
    """Names of several devices, and the NumPy number that the schedule of the learning rate leaves."""
    remnant = openclip.open_weights(GOLDEN / "clip" / "remnant.pt")
    assert list(remnant.entries) == ["logit_scale"]
    weights = torch.load(GOLDEN / "clip" / "weights.pt", weights_only=True)
    np.testing.assert_array_equal(remnant.read("logit_scale"), weights["logit_scale"])
    whole = {"state_dict": {f"module.{name}": value for name, value in weights.items()}, "lr": np.float64(5e-7)}
    torch.save(whole, tiny / "epoch_5.pt")
    parts = [
        load_encoder(path, architecture="tiny", tokenizer=tiny)
        for path in (tiny / "epoch_5.pt", GOLDEN / "clip" / "weights.pt")
    ]
    assert_same(*parts)


def test_coca_comes_from_its_folder(tiny: Path) -> None:
    fill(tiny, "coca", "weights.safetensors", "open_clip_model.safetensors")
    safe = load_encoder(tiny)
    (tiny / "open_clip_model.safetensors").unlink()
    fill(tiny, "coca", "weights.pt", "open_clip_pytorch_model.bin")
    assert_same(safe, load_encoder(tiny))
    with np.load(GOLDEN / "coca" / "outputs.npz") as outputs:
        pooled = jax.jit(safe.network().image)(outputs["pixels"]).pooled
        np.testing.assert_allclose(pooled, outputs["image_pooled"], atol=2e-5 * np.abs(outputs["image_pooled"]).max())


def test_half_precision_files_are_read(tiny: Path) -> None:
    weights = torch.load(GOLDEN / "clip" / "weights.pt", weights_only=True)
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({name: value.to(dtype) for name, value in weights.items()}, tiny / "half.pt")
        found = load_encoder(tiny / "half.pt", architecture="tiny")
        expected = weights["visual.class_embedding"].to(dtype).float()
        np.testing.assert_array_equal(found.parameters["tower"]["class_token"], expected)


def changed(change: str) -> Mapping[str, np.ndarray]:
    tensors = load_file(GOLDEN / "clip" / "weights.safetensors")
    if change == "missing":
        del tensors["ln_final.weight"]
    elif change == "unknown":
        tensors["text_decoder.extra"] = np.zeros(3, np.float32)
    elif change == "shape":
        tensors["visual.proj"] = np.zeros((32, 23), np.float32)
    else:
        tensors["visual.proj"] = np.zeros((32, 24), np.int64)
    return tensors


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("missing", "'ln_final.weight' is missing"),
        ("unknown", "unknown tensor 'text_decoder.extra'"),
        ("shape", r"'visual.proj' has shape \(32, 23\)"),
        ("integers", "'visual.proj' holds .*, no floating-point numbers"),
    ],
)
def test_what_does_not_fit_is_refused(tiny: Path, suffix: str, change: str, named: str) -> None:
    path, tensors = tiny / f"weights.{suffix}", changed(change)
    if suffix == "pt":
        torch.save({name: torch.tensor(value) for name, value in tensors.items()}, path)
    else:
        save_file(dict(tensors), path)
    with pytest.raises(CheckpointError, match=named):
        load_encoder(path, architecture="tiny")


def test_no_object_of_a_file_is_made(tiny: Path) -> None:
    torch.save({"state_dict": {"logit_scale": torch.ones(())}, "where": Path("there")}, tiny / "objects.pt")
    with pytest.raises(CheckpointError, match="holds Python objects"):
        load_encoder(tiny / "objects.pt", architecture="tiny")
    marker = tiny / "ran"
    (tiny / "code.pt").write_bytes(f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(CheckpointError, match=r"code\.pt"):
        load_encoder(tiny / "code.pt", architecture="tiny")
    assert not marker.exists()
    torch.save([torch.ones(2)], tiny / "list.pt")
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        load_encoder(tiny / "list.pt", architecture="tiny")


# --- which model ----------------------------------------------------------------------------------------------------


def test_the_architecture_is_part_of_the_model(tiny: Path) -> None:
    """Names and shapes do not tell the activation, so two architectures of one file are told apart."""
    path = GOLDEN / "clip" / "negclip.pt"
    quick, exact = (load_encoder(path, architecture=name, tokenizer=tiny) for name in ("tiny", "exact"))
    assert quick.fingerprint != exact.fingerprint
    assert quick.fingerprint == load_encoder(path, architecture="tiny", tokenizer=tiny).fingerprint
    assert quick.config.vision_config.hidden_act == "quick_gelu"
    assert exact.config.text_config.hidden_act == "gelu"


def test_a_file_needs_a_known_architecture(tiny: Path) -> None:
    path = GOLDEN / "clip" / "negclip.pt"
    with pytest.raises(CheckpointError, match=r"say of which architecture: ViT-B-32, ViT-B-32-quickgelu, .*coca_ViT"):
        load_encoder(path)
    with pytest.raises(CheckpointError, match=r"'ViT-Z' is not one of ViT-B-32, .*coca_ViT-B-32"):
        load_encoder(path, architecture="ViT-Z")
    with pytest.raises(CheckpointError, match=r"does not fit its config: tensor 'token_embedding.weight' is missing"):
        load_encoder(GOLDEN / "coca" / "weights.pt", architecture="tiny", tokenizer=tiny)


def test_folders_and_missing_files_take_no_architecture(tiny: Path) -> None:
    fill(tiny, "clip", "weights.pt", "open_clip_pytorch_model.bin")
    for name in (tiny, tiny / "negclip.pt"):
        with pytest.raises(InputError, match="applies to a single weight file only, and"):
            load_encoder(name, architecture="tiny")


def test_incomplete_folders_say_what_they_lack(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config.json nor open_clip_config.json.*by its own path"):
        load_encoder(tiny)
    shutil.copy(GOLDEN / "clip" / "open_clip_config.json", tiny)
    with pytest.raises(CheckpointError, match=r"has none of open_clip_model.safetensors, open_clip_pytorch_model.bin"):
        load_encoder(tiny)
    for text in ("{", "[]", '{"model": 3}', '{"model_cfg": 3}'):
        (tiny / "open_clip_config.json").write_text(text)
        with pytest.raises(
            CheckpointError, match=r"open_clip_config.json (cannot be read|holds list|is not an OpenCLIP config)"
        ):
            load_encoder(tiny)
    (tiny / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}')
    (tiny / "open_clip_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"open_clip_config.json cannot be read as a config: .*width"):
        load_encoder(tiny)


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("clip")
    write_bpe_tokenizer(folder)
    fill(folder, "clip", "weights.safetensors", "open_clip_model.safetensors")
    return load_encoder(folder)


@pytest.mark.parametrize("name", ["wide", "tall", "tiny"])
def test_pixels_are_open_clips(clip: Encoder, name: str) -> None:
    with np.load(GOLDEN / "preprocess.npz") as golden:
        ours = clip.processor.pixels([golden[f"{name}_picture"]])[0]
        np.testing.assert_allclose(ours, golden[f"{name}_pixels"], atol=1e-6)


def test_preparation_follows_the_config(tiny: Path, clip: Encoder) -> None:
    fill(tiny, "clip", "weights.safetensors", "open_clip_model.safetensors")
    fields = json.loads((tiny / "open_clip_config.json").read_text())
    with np.load(GOLDEN / "preprocess.npz") as golden:
        picture = golden["wide_picture"]

    def pixels(**settings: Any) -> np.ndarray:
        write_json(tiny / "open_clip_config.json", {**fields, "preprocess_cfg": settings})
        return load_encoder(tiny).processor.pixels([picture])[0]

    usual = clip.processor.pixels([picture])[0]
    np.testing.assert_array_equal(pixels(), usual)  # files that are silent mean OpenAI's
    assert pixels(mean=[0.0] * 3, std=[1.0] * 3).min() >= 0
    assert np.abs(pixels(interpolation="bilinear") - usual).max() > 0.01
    for settings, named in (
        ({"resize_mode": "squash"}, "'squash'"),
        ({"interpolation": "random"}, "'random'"),
        ({"size": 224}, "size 224 is not the tower's 32"),
    ):
        with pytest.raises(CheckpointError, match=named):
            pixels(**settings)


# --- captions -------------------------------------------------------------------------------------------------------


def pieces(clip: Encoder, caption: str) -> list[tuple[str, str]]:
    """Every token, and the characters of the caption as it was given that it stands for."""
    batch = clip.processor.captions([caption])
    ids, places = batch.token_ids[0][batch.valid[0]], batch.offsets[0][batch.valid[0]]
    assert batch.texts == (caption,) and ids[0] == len(PIECES) - 2 and ids[-1] == len(PIECES) - 1
    return [(PIECES[number], caption[first:last]) for number, (first, last) in zip(ids, places, strict=True)][1:-1]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a  CAT.", [("a</w>", "a"), ("cat</w>", "CAT"), (".</w>", ".")]),
        ("a &amp; cat", [("a</w>", "a"), ("&</w>", "&amp;"), ("cat</w>", "cat")]),
        ("&amp;quot;cat", [('"</w>', "&amp;quot;"), ("cat</w>", "cat")]),
        ("&#99;at&lt;", [("cat</w>", "&#99;at"), ("<</w>", "&lt;")]),
        ("\u201ccat\u201d a", [('"</w>', "\u201c"), ("cat</w>", "cat"), ('"</w>', "\u201d"), ("a</w>", "a")]),
        ("a\u2019 cat", [("a</w>", "a"), ("'</w>", "\u2019"), ("cat</w>", "cat")]),
        ("a & cat", [("a</w>", "a"), ("&</w>", "&"), ("cat</w>", "cat")]),
    ],
)
def test_captions_are_cleaned_and_keep_their_places(
    clip: Encoder, caption: str, expected: list[tuple[str, str]]
) -> None:
    assert pieces(clip, caption) == expected


def test_cleaning_maps_every_character(clip: Encoder) -> None:
    text = "x &lt;b&gt; &amp;amp; AT&T &copy2 \u2018y\u2019 &unknown; \u00e9"
    plain, spans = openclip.cleaned(text)
    assert plain == "x <b> & AT&T \u00a92 'y' &unknown; \u00e9"
    assert len(spans) == len(plain)
    assert all(first < last for first, last in spans)
    assert text[slice(*spans[plain.index("&")])] == "&amp;amp;"
    for word in ("x", "b", "AT&T", "y", "&unknown;", "\u00e9"):
        place = plain.index(word)
        assert text[spans[place][0] : spans[place + len(word) - 1][1]] == word


def test_captions_are_filled_with_zeros_and_cut_at_the_end_token(clip: Encoder) -> None:
    short = clip.processor.captions(["a cat"])
    assert short.token_ids.shape == (1, 77) and not short.token_ids[0, 4:].any() and not short.valid[0, 4:].any()
    with pytest.warns(UserWarning, match="caption 0 loses '&lt; a cat'"):
        cut = clip.processor.captions(["cat &amp; cat &lt; a cat"], 5)
    assert [PIECES[number] for number in cut.token_ids[0]] == [START, "cat</w>", "&</w>", "cat</w>", END]


def test_the_tokenizer_comes_from_where_it_was_asked_for(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tiny, "clip", "weights.safetensors", "open_clip_model.safetensors")
    other, bare = tmp_path_factory.mktemp("other"), tmp_path_factory.mktemp("bare")
    write_bpe_tokenizer(other, [PIECES[0], *reversed(PIECES[1:-2]), *PIECES[-2:]])
    first, second = (load_encoder(tiny, tokenizer=asked).processor.captions(["cat"]) for asked in (None, other))
    assert PIECES[first.token_ids[0, 1]] == "cat</w>" != PIECES[second.token_ids[0, 1]]

    fill(bare, "clip", "weights.safetensors", "open_clip_model.safetensors")
    asked: list[str] = []
    monkeypatch.setattr(openclip, "downloaded", lambda repository, *_: asked.append(repository) or tiny)
    for tokenizer in (None, "some/repository"):
        found = load_encoder(bare, tokenizer=tokenizer).processor.captions(["cat"])
        np.testing.assert_array_equal(found.token_ids, first.token_ids)
    assert asked == ["openai/clip-vit-base-patch32", "some/repository"]


def test_tokenizers_that_do_not_fit_are_refused(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    fill(tiny, "clip", "weights.safetensors", "open_clip_model.safetensors")
    other = tmp_path_factory.mktemp("other")
    write_bpe_tokenizer(other, [*PIECES[:-2], "extra", *PIECES[-2:]])
    with pytest.raises(CheckpointError, match="has 65 tokens, the model 64"):
        load_encoder(tiny, tokenizer=other)
    with pytest.raises(CheckpointError, match=r"some/repository is neither in the .* cache nor reachable.*`tokenizer`"):
        load_encoder(tiny, tokenizer="some/repository")


def test_hugging_face_folders_bring_their_own_tokenizer() -> None:
    with pytest.raises(InputError, match="brings its own tokenizer"):
        encoders.load_encoder("tiny-clip", tokenizer="some/repository")
