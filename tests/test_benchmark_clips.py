"""The benchmark about clips: its network from LLaVA-NeXT's definition, its prompts, and both systems' results."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import llava_next_video
import numpy as np
import pytest
import torch
from benchmark_files import Modules

import jaxid

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def folder(modules: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small version of the benchmark's model of clips: 8 frames of 3 x 4 tokens, 3 layers."""
    geometry = modules("geometry_video")
    text = dataclasses.replace(
        geometry.CONFIG.text_config,
        vocab_size=1024,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    vision = dataclasses.replace(
        geometry.CONFIG.vision_config,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=40,
        patch_size=8,
    )
    small = dataclasses.replace(geometry.CONFIG, text_config=text, vision_config=vision)
    return geometry.write(tmp_path_factory.mktemp("models") / "tiny-video", small)


@pytest.fixture(scope="module")
def clips(modules: Modules, folder: Path) -> Any:
    """Two prompts about clips, and the same clips played backwards."""
    return modules("works").clip_setting(jaxid.load(str(folder)), folder, 2)


def test_video_has_the_published_tokens(modules: Modules, clips: Any) -> None:
    config = modules("geometry_video").CONFIG
    assert 8 * config.frame_side * (config.frame_side + 1) == 1680
    assert config.text_config.num_hidden_layers == 28
    prompts = clips.batch.prompts
    assert prompts.image_tokens().shape == (2, 8 * 3 * 4)
    words = [
        prompts.texts[row][slice(*prompts.offsets[row, place])] for row, place in enumerate(clips.batch.words[:, 0])
    ]
    assert [word.strip() for word in words] == [question.split()[-11] for question in prompts.questions]
    assert clips.torch_batch.pixels.shape == (2, 8, 3, 40, 40)
    assert torch.equal(clips.torch_other, clips.torch_batch.pixels.flip(1))


@pytest.mark.parametrize("row", [0, 1])
def test_video_reference_equals_another_forward_pass(modules: Modules, folder: Path, clips: Any, row: int) -> None:
    published = modules("published")
    prompt = clips.torch_batch.prompt(row)
    ids = [token for token in prompt.token_ids[0].tolist() if token != 3]
    first = prompt.token_ids[0].tolist().index(3)
    ids.insert(first, llava_next_video.CLIP)
    with torch.no_grad():
        mine = published.log_probs(published.load(folder), prompt)
        output = llava_next_video.load(folder)([ids], list(prompt.pixels), prompt.token_ids.shape[1])
    theirs = output.logits[0, -1].log_softmax(-1)[prompt.answers]
    np.testing.assert_allclose(mine[0], theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "position"), [("average", "frame"), ("bilinear", "one_token"), ("average", "no_token")]
)
def test_video_reference_pools_and_ends_lines_alike(modules: Modules, folder: Path, mode: str, position: str) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"mm_spatial_pool_mode": mode, "mm_newline_position": position}
    other = llava_next_video.load(folder)
    other.fields = fields
    network = modules("video_reference").load(folder)
    network.model.fields = fields
    pixels = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = network.model.in_lines(network.model.frames(pixels))
        np.testing.assert_allclose(mine, other.encode([pixels])[0], atol=1e-5)


@pytest.mark.slow
def test_temporal_swap_of_both_systems(modules: Modules, folder: Path) -> None:
    interventions = modules("interventions")
    (work,) = interventions.make_works(jaxid.load(str(folder)), folder, (1, 1))
    assert (work.name, work.edits, set(work.systems)) == ("temporal_swap", 9, {"published", "jaxid"})
    assert work.systems["published"].edits == [0, 4, 8]
    results = {name: system.call() for name, system in work.systems.items()}
    edits = {name: system.edits for name, system in work.systems.items()}
    assert interventions.check_agreement(work.name, results, edits=edits) < 1e-4
    found = results["jaxid"]
    assert (np.abs(found["edited"][[0, 3, 6]] - found["control"]) > 1e-4).all()  # after the first layer all sets act
    np.testing.assert_allclose(
        found["edited"][2], found["control"], atol=1e-5
    )  # after the last layer nothing reads frames
    np.testing.assert_allclose(found["edited"][5], found["intervened"], atol=1e-5)
