"""Time in video models: the swap and the steering beside full passes, where words are read, the commands' errors."""

import functools
from pathlib import Path
from typing import Any

import fixtures
import jax.numpy as jnp
import numpy as np
import pytest
from families import EVERY

from jaxid.data.clips import AppearItem, OrderItem, write_appear_folder
from jaxid.data.videos import write_video
from jaxid.errors import DataError, InputError, PromptError
from jaxid.experiments import temporal
from jaxid.families.base import Model
from jaxid.ids.temporal import TemporalIDs
from jaxid.interp.forward import forward
from jaxid.interp.interventions import add, replace
from jaxid.nn.sites import Capture
from jaxid.prompts.pictures import Clip
from jaxid.runs import temporal as runs

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASE = next(case for case in EVERY if case.name == "video-grid")
QUERY = "Does the star come before or after the fish? Answer in one word."


def model() -> Model:
    return fixtures.model(CASE)


def clip(seed: int, *, timed: bool = True) -> Clip:
    """Eight frames of noise."""
    frames = np.random.default_rng(seed).integers(0, 256, (8, 30, 30, 3), np.uint8)
    return Clip(frames, tuple(0.25 * k for k in range(8)), 2.0) if timed else Clip(frames)


@functools.cache
def items() -> tuple[OrderItem, ...]:
    longer = "Is the star yes before or after the fish?"
    return (
        OrderItem(video=clip(0), scene1="star", scene2="fish", query=QUERY, answer="before", row=0),
        OrderItem(video=clip(1), scene1="star yes", scene2="the fish", query=longer, answer="after", row=1),
    )


@functools.cache
def batch() -> temporal.OrderBatch:
    return temporal.prepare(model(), items())


@functools.cache
def ids() -> TemporalIDs:
    rng = np.random.default_rng(2)
    layers = model().num_layers
    return TemporalIDs(
        values=rng.standard_normal((layers, 1, 7, model().width)).astype(np.float32),
        counts=np.ones((1, 7), np.int32),
        objects=("star",),
        frames=tuple(range(1, 8)),
        layer_names=tuple(f"blocks.{k}.resid_post" for k in range(layers)),
        model=model().name,
        fingerprint=model().fingerprint,
    )


def test_words_are_located_behind_the_times() -> None:
    found = batch()
    prompts = found.asked.prompts
    for row, item in enumerate(items()):
        assert prompts.questions[row].startswith("The video lasts for 2.00 seconds, and 8 frames")
        assert prompts.questions[row].endswith(item.query)
        for at, scene in ((found.first[row], item.scene1), (found.second[row], item.scene2)):
            spans = prompts.offsets[row][at]
            assert prompts.texts[row][spans[:, 0].min() : spans[:, 1].max()].strip() == scene
    assert len(set(found.first[1].tolist())) > 1  # of several tokens, all of them
    assert found.asked.truth.tolist() == [0, 1]
    other = OrderItem(video=clip(0), scene1="cup", scene2="fish", query=QUERY, answer="before")
    with pytest.raises(PromptError, match="does not hold the word 'cup'"):
        temporal.prepare(model(), [other])


def backwards() -> Any:
    return temporal.reversed_prompts(model(), batch(), [item.open() for item in items()])


def test_the_source_is_the_clip_played_backwards() -> None:
    ours, theirs = batch().asked.prompts, backwards()
    assert ours.texts == theirs.texts
    assert ours.inputs.pixels is not None and theirs.inputs.pixels is not None
    np.testing.assert_array_equal(theirs.inputs.pixels.reshape(2, 8, -1)[:, ::-1], ours.inputs.pixels.reshape(2, 8, -1))


def test_swap_is_that_of_full_passes() -> None:
    found = temporal.run_swap(model(), batch(), backwards(), chunk=2)
    prompts, other = batch().asked.prompts, backwards()
    sets = (prompts.image_tokens(), prompts.text_tokens(), batch().words)
    for number, at in enumerate(sets):
        source = forward(model(), other, capture=Capture(("resid_post",), positions=jnp.asarray(at))).captured[
            "resid_post"
        ]
        for layer in range(model().num_layers):
            output = forward(model(), prompts, replace(layer, at, source[layer]))
            np.testing.assert_allclose(found.patched[number, layer], batch().asked.read(output), atol=1e-4)
    np.testing.assert_allclose(found.intervened, batch().asked.read(forward(model(), other)), atol=1e-4)
    assert np.abs(found.intervened - found.control).max() > 1e-2


def test_steering_is_that_of_full_passes() -> None:
    layers = [0, 2]
    found = temporal.run_steering(model(), batch(), ids(), layers=layers, multiplier=2.0)
    assert found.steered.shape == (2, 7, 2, 2)
    for row, layer in enumerate(layers):
        for frame in (1, 4, 6):
            vector = 2.0 * (ids()[layer, frame] - ids()[layer, 8 - frame])
            output = forward(model(), batch().asked.prompts, add(layer, batch().second, vector))
            np.testing.assert_allclose(found.steered[row, frame - 1], batch().asked.read(output), atol=1e-4)
    np.testing.assert_allclose(found.steered[:, 3], np.broadcast_to(found.control, (2, 2, 2)), atol=1e-4)
    vectors = temporal.frame_vectors(ids(), layers)
    np.testing.assert_allclose(vectors, -vectors[:, ::-1], atol=1e-6)
    mirrored = temporal.run_steering(model(), batch(), ids(), layers=layers, multiplier=2.0, compat="reference")
    np.testing.assert_allclose(mirrored.change, -found.change, atol=1e-6)


def test_ids_of_another_model() -> None:
    import dataclasses

    with pytest.raises(InputError, match="extracted from"):
        temporal.run_steering(model(), batch(), dataclasses.replace(ids(), fingerprint="other"), layers=[0])


def test_extraction_reads_both_words() -> None:
    rng = np.random.default_rng(4)
    frames = [(i, j) for i in range(1, 8) for j in range(1, 8) if i != j]
    clips = [
        AppearItem(video=clip(int(rng.integers(1000))), object_a="star", frame_a=i, object_b="fish", frame_b=j)
        for i, j in frames
    ]
    found = temporal.extract(model(), clips, pairs=[("star", "fish")], batch_size=11)
    assert found.objects == ("star", "fish") and (found.counts == 6).all()
    # By hand: B's word, less the mean over its frames beside the same frame of A, averaged over A's frames.
    texts = [temporal.with_times(item.open(), temporal.QUESTION.format(a="star", b="fish")) for item in clips]
    prompts = model().prepare([item.open() for item in clips], texts)
    at = jnp.asarray(prompts.word("fish", occurrence=0))[:, None]
    states = np.asarray(
        forward(model(), prompts, capture=Capture(("resid_post",), positions=at)).captured["resid_post"]
    )[:, :, 0]
    table = np.full((8, 8, *states[:, 0].shape), np.nan)
    for row, (i, j) in enumerate(frames):
        table[i, j] = states[:, row]
    expected = np.nanmean(table[1:, 1:] - np.nanmean(table[1:, 1:], axis=1, keepdims=True), axis=0)
    np.testing.assert_allclose(found.values[:, 1], np.moveaxis(expected, 0, 1), atol=1e-4)
    with pytest.raises(InputError, match="was not announced"):
        temporal.extract(model(), clips, pairs=[("fish", "star")])


def command(*arguments: str) -> None:
    from jaxid.cli import main

    main(arguments)


def test_commands_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(fixtures.folder(CASE))
    header = "video_path,scene1,scene2,query,correct_order,query_order\n"
    write_video(tmp_path / "short.mp4", np.zeros((5, 32, 32, 3), np.uint8), rate=4)
    (tmp_path / "manifest.csv").write_text(f'{header}short.mp4,star,fish,"{QUERY}","1,2","1,2"\n')
    (tmp_path / "lacking.csv").write_text(f"{header}short.mp4,star,fish,,1,2\n")
    for arguments, message in (
        (("ids", "temporal", "--data", str(tmp_path), "--out", str(tmp_path / "x"), "--model", folder), ".safetensors"),
        (
            ("run", "temporal-swap", "--data", str(tmp_path), "--out", str(tmp_path / "a"), "--model", folder),
            "5 frames",
        ),
        (
            (
                *("run", "temporal-swap", "--data", str(tmp_path / "lacking.csv")),
                "--out",
                str(tmp_path / "b"),
                "--model",
                folder,
            ),
            "lacks query",
        ),
        (
            (
                *("run", "temporal-steer", "--data", str(tmp_path), "--out", str(tmp_path / "c")),
                "--ids",
                str(tmp_path / "no"),
                "--model",
                folder,
            ),
            "expected a file of temporal IDs",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            command(*arguments)
        shown = capsys.readouterr().err
        assert ended.value.code == 2 and message in shown and len(shown.strip().splitlines()) == 1, shown


def test_bad_clips_are_named_or_left_out(tmp_path: Path) -> None:
    """A clip too short, one unreadable, one misnamed: the run ends with the first, or lists them in the end."""
    frames = [(i, i % 7 + 1) for i in range(1, 8)]
    write_appear_folder(tmp_path / "clips", [("star", "fish")], frames=frames, picture_size=32)
    write_video(tmp_path / "clips" / "appear_fish1_star2.mp4", np.zeros((5, 32, 32, 3), np.uint8), rate=8)
    (tmp_path / "clips" / "appear_fish1_star3.mp4").write_bytes(b"no video")
    out, name = tmp_path / "ids.safetensors", str(fixtures.folder(CASE))
    with pytest.raises(DataError, match=r"appear_fish1_star2.mp4 has 5 frames .* --skip-bad leaves such clips out"):
        runs.extract(tmp_path / "clips", out, model=name)
    (tmp_path / "clips" / "holiday.mp4").write_bytes(b"")
    found = runs.extract(tmp_path / "clips", out, model=name, skip_bad=True)
    assert found["clips"] == len(frames) and found["skipped"]["count"] == 3
    assert [entry["key"] for entry in found["skipped"]["items"]] == ["holiday.mp4", "fish1_star2", "fish1_star3"]
    clean = tmp_path / "clean"
    write_appear_folder(clean, [("star", "fish")], frames=frames, picture_size=32)
    runs.extract(clean, tmp_path / "clean.safetensors", model=name)
    ours, theirs = TemporalIDs.load(out), TemporalIDs.load(tmp_path / "clean.safetensors")
    np.testing.assert_allclose(ours.universal, theirs.universal, atol=1e-5)
    for path in clean.iterdir():
        path.write_bytes(b"no video")
    with pytest.raises(DataError, match="no clip could be used"):
        runs.extract(clean, out, model=name, skip_bad=True)
