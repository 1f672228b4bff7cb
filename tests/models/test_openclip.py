"""OpenCLIP's CLIP and CoCa agree with golden outputs of `open_clip`, from every kind of file; see golden/NOTES.md."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from encoders import write_word_tokenizer

from jaxid.checkpoints.encoders import load_encoder
from jaxid.checkpoints.loading import abstract_parameters
from jaxid.checkpoints.openclip import TensorArrays
from jaxid.errors import CheckpointError
from jaxid.models.encoders import ENCODERS
from jaxid.models.openclip import ARCHITECTURES, kind_of

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module", params=["clip", "coca"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copy(GOLDEN / request.param / "open_clip_config.json", folder)
    shutil.copy(GOLDEN / request.param / "weights.safetensors", folder / "open_clip_model.safetensors")
    write_word_tokenizer(folder, first="<start>", last="<end>", padding="<pad>", window=77)
    with np.load(GOLDEN / request.param / "outputs.npz") as outputs:
        return load_encoder(folder), dict(outputs)


def assert_close(ours: Any, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= 2e-5 * np.abs(theirs).max()


def test_pictures(model: Any) -> None:
    encoder, golden = model
    network = encoder.network()
    with jax.default_matmul_precision("highest"):
        states, found = jax.jit(lambda x: (network.tower(x), network.image(x)))(golden["pixels"])
    assert_close(states, golden["image_hidden"])
    assert_close(found.pooled, golden["image_pooled"])
    if "image_tokens_normed_projected" in golden:
        assert_close(found.tokens, golden["image_tokens_normed_projected"])
        return
    with jax.default_matmul_precision("highest"):
        assert_close(jax.jit(network.pooler)(states[-1]), golden["image_queries_normed"])
        # A token alone: whatever the query, softmax over one is one.
        alone = [network.image_projection(network.pooler(states[-1][:, [k]])[:, 0]) for k in range(states.shape[2])]
    assert_close(found.tokens, np.stack([np.asarray(one) for one in alone], axis=1))


def test_captions(model: Any) -> None:
    encoder, golden = model
    network, ids = encoder.network(), jnp.asarray(golden["token_ids"])
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda ids, valid: (network.text_encoder(ids, valid), network.text(ids, valid)))
        states, found = run(ids, ids != 0)
    assert_close(states, golden["text_hidden"])
    assert_close(found.pooled, golden["text_pooled"])
    assert_close(found.tokens, golden["text_tokens_normed_projected"][:, : ids.shape[1]])
    if "text_mask" in golden:
        np.testing.assert_array_equal(network.text_encoder.mask(ids != 0), golden["text_mask"].astype(bool))


def test_all_files_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((GOLDEN / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(ARCHITECTURES, "tiny", config)  # type: ignore[arg-type]
    write_word_tokenizer(tmp_path, first="<start>", last="<end>", padding="<pad>", window=77)
    found = []
    for name in ("weights.safetensors", "weights.pt", "negclip.pt"):
        shutil.copy(GOLDEN / "clip" / name, tmp_path)
        found.append(load_encoder(tmp_path / name, architecture="tiny"))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0].parameters, other.parameters)
    with pytest.raises(CheckpointError, match="say of which architecture: ViT-B-32"):
        load_encoder(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="'ViT-Z' is not one of ViT-B-32"):
        load_encoder(tmp_path / "weights.pt", architecture="ViT-Z")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_encoder(tmp_path / "weights.pt", architecture="ViT-B-32")


def test_numbers_of_numpy_are_read_and_objects_are_not(tmp_path: Path) -> None:
    assert list(TensorArrays(GOLDEN / "clip" / "remnant.pt").entries) == ["logit_scale"]
    torch.save({"state_dict": {"a": torch.ones(2)}, "path": tmp_path}, tmp_path / "objects.pt")
    with pytest.raises(CheckpointError, match="holds Python objects"):
        TensorArrays(tmp_path / "objects.pt")


@pytest.mark.parametrize("name", ["clip_b32", "coca_b32"])
def test_names_and_shapes_of_published_sizes(name: str) -> None:
    """Both ways: every tensor has its key, every parameter is set, and shapes fit."""
    fields = json.loads((GOLDEN / name / "open_clip_config.json").read_text())["model_cfg"]
    shapes = json.loads((GOLDEN / name / "shapes.json").read_text())
    kind = ENCODERS[kind_of(fields)]
    assert kind.config(dict(ARCHITECTURES["coca_ViT-B-32" if "coca" in name else "ViT-B-32-quickgelu"])) == kind.config(
        fields
    )
    config = kind.config(fields)
    abstract = abstract_parameters(kind, config)[1]
    known, filled = set(), set()
    for key in kind.keys(config):
        stacked = "{layer}" in key.source
        expected = tuple(abstract[key.target].shape)
        for layer in range(expected[0]) if stacked else [0]:
            source = key.source.format(layer=layer)
            assert key.parameter_shape(tuple(shapes[source])) == (expected[1:] if stacked else expected), source
            known.add(source)
        filled.add(key.target)
    assert filled == set(abstract)
    unused = {source for source in shapes if source.startswith("text_decoder.")}
    assert known == set(shapes) - unused and (not unused or "coca" in name)


def test_pixels_are_open_clips(model: Any) -> None:
    encoder, _ = model
    with np.load(GOLDEN / "preprocess.npz") as golden:
        for name in ("wide", "tall", "tiny"):
            ours = encoder.processor.pixels([golden[f"{name}_picture"]])[0]
            np.testing.assert_allclose(ours, golden[f"{name}_pixels"], atol=1e-6)
