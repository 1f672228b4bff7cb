"""Time in video models: the swap and the steering beside full passes, where words are read, the commands' errors."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import fixtures
import jax.numpy as jnp
import numpy as np
import pytest
from families import EVERY
from run_data import columns
from test_cli import refused

from jaxid.data.clips import AppearItem, OrderItem, read_mvbench, write_appear_folder
from jaxid.data.videos import with_times, write_video
from jaxid.errors import DataError, InputError, PromptError
from jaxid.experiments import temporal
from jaxid.experiments.activation_swap import Pair, Patched, swap_activations
from jaxid.experiments.reference import with_bugs
from jaxid.experiments.session import Session
from jaxid.experiments.temporal import TemporalSteer, TemporalSwap, steer_to_frames
from jaxid.experiments.temporal_ids import ExtractTemporalIDs
from jaxid.families.base import Model
from jaxid.ids.extract import TEMPORAL_QUESTION, extract_temporal
from jaxid.ids.temporal import TemporalIDs
from jaxid.interp.forward import forward
from jaxid.interp.interventions import add, replace
from jaxid.nn.sites import Capture
from jaxid.prompts.pictures import Clip

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


@pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")
def test_words_are_located_in_the_published_words_of_the_swap() -> None:
    """Two spaces are lost, and with them the first scene's end; an article that the question drops is no word of it."""
    wording = TemporalSwap.published_wording
    found = temporal.prepare(model(), items(), prompt=TemporalSwap.published_text, wording=wording)
    prompts = found.asked.prompts
    texts = (
        "Does the star comeearlier or later than fish? Answer in one word.",
        "Is the star yesearlier or later than fish?",
    )
    for row, text in enumerate(texts):
        assert prompts.questions[row].endswith(f"{text} Answer in one word.")
        for at, scene in ((found.first[row], items()[row].scene1), (found.second[row], "fish")):
            spans = prompts.offsets[row][at]
            assert scene in prompts.texts[row][spans[:, 0].min() : spans[:, 1].max()]
            assert (np.diff(at) >= 0).all() and spans[:, 1].max() - spans[:, 0].min() <= len(f" {scene}earlier")
    assert found.asked.answers == ["earlier", "later"] and found.asked.truth.tolist() == [0, 1]
    lost = dataclasses.replace(items()[0], scene1="cup")
    with pytest.raises(PromptError, match="does not hold the words 'cup'"):
        temporal.prepare(model(), [lost], wording=wording)


def backwards() -> Any:
    return temporal.reversed_prompts(model(), batch())


def test_the_source_is_the_clip_played_backwards() -> None:
    ours, theirs = batch().asked.prompts, backwards()
    assert ours.texts == theirs.texts
    assert ours.inputs.pixels is not None and theirs.inputs.pixels is not None
    np.testing.assert_array_equal(theirs.inputs.pixels.reshape(2, 8, -1)[:, ::-1], ours.inputs.pixels.reshape(2, 8, -1))


@functools.cache
def swapped() -> Patched:
    return swap_activations(model(), batch().asked, backwards(), words=batch().words, chunk=2)


def test_swap_is_that_of_full_passes() -> None:
    found, prompts = swapped(), batch().asked.prompts
    other = forward(model(), backwards(), capture=Capture(("resid_post",)))
    states, rows = np.asarray(other.captured["resid_post"]), np.arange(2)[:, None]
    sets = (prompts.image_tokens(), prompts.text_tokens(), batch().words)
    longest = max(at.shape[1] for at in sets)
    for number, some in enumerate(sets):
        at = np.pad(some, ((0, 0), (0, longest - some.shape[1])), mode="edge")  # all of one shape: one program
        for layer in range(model().num_layers):
            output = forward(model(), prompts, replace(layer, at, states[layer][rows, at]))
            np.testing.assert_allclose(found.patched[number, layer], batch().asked.read(output), atol=1e-4)
    np.testing.assert_allclose(found.intervened, batch().asked.read(other), atol=1e-4)
    assert np.abs(found.intervened - found.control).max() > 1e-2


def test_steering_is_that_of_full_passes() -> None:
    layers = [0, 2]
    found = steer_to_frames(model(), batch(), ids(), layers=layers, strength=2.0)
    assert found.steered.shape == (2, 7, 2, 2)
    for row, layer in enumerate(layers):
        for frame in (1, 4, 6):
            vector = 2.0 * (ids()[layer, frame] - ids()[layer, 8 - frame])
            output = forward(model(), batch().asked.prompts, add(layer, batch().second, vector))
            np.testing.assert_allclose(found.steered[row, frame - 1], batch().asked.read(output), atol=1e-4)
    np.testing.assert_allclose(found.steered[:, 3], np.broadcast_to(found.control, (2, 2, 2)), atol=1e-4)
    vectors = temporal.frame_vectors(ids(), layers)
    np.testing.assert_allclose(vectors, -vectors[:, ::-1], atol=1e-6)
    steps = TemporalSteer(out=Path("out"), data=Path("data"), ids=Path("ids.safetensors"))
    for one in (steps, with_bugs(steps)):  # the published code has this sign right
        np.testing.assert_array_equal(one.change(found), found.steered - found.control)


def test_ids_of_another_model() -> None:
    with pytest.raises(InputError, match="extracted from"):
        steer_to_frames(model(), batch(), dataclasses.replace(ids(), fingerprint="other"), layers=[0])


def test_extraction_reads_both_words() -> None:
    rng = np.random.default_rng(4)
    frames = [(i, j) for i in range(1, 8) for j in range(1, 8) if i != j]
    clips = [
        AppearItem(video=clip(int(rng.integers(1000))), object_a="star", frame_a=i, object_b="fish", frame_b=j)
        for i, j in frames
    ]
    found = extract_temporal(model(), clips, pairs=[("star", "fish")], batch_size=11)
    assert found.objects == ("star", "fish") and (found.counts == 6).all()
    # By hand: B's word, less the mean over its frames beside the same frame of A, averaged over A's frames.
    texts = [with_times(item.open(), TEMPORAL_QUESTION.format(a="star", b="fish")) for item in clips]
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
        extract_temporal(model(), clips, pairs=[("fish", "star")])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips with a question each, and IDs of the tiny model."""
    folder = tmp_path_factory.mktemp("time")
    rows = ["video_path,scene1,scene2,query,correct_order,query_order"]
    for row, order in enumerate(("1,2", "2,1", "1,2")):
        frames = np.random.default_rng(row).integers(0, 256, (16, 32, 32, 3), np.uint8)
        write_video(folder / f"{row}.mp4", frames, rate=8)
        rows.append(f'{row}.mp4,star,fish,"{QUERY}","{order}","1,2"')
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    ids().save(folder / "ids.safetensors")
    return folder


def experiment(kind: type[Any], place: Path, out: Path, **changed: Any) -> Any:
    given = {"model": str(fixtures.folder(CASE)), "data": place, "out": out, "batch_size": 2, "progress": False}
    given["prompt"] = "plain"
    return kind(**given | changed)


def test_swap_as_a_run(place: Path, tmp_path: Path) -> None:
    summary = experiment(TemporalSwap, place, tmp_path).run()
    table, layers = columns(tmp_path), model().num_layers
    assert summary.items == 3 and len(table["score"]) == 3 * layers * 3 * 2
    read = read_mvbench(place)
    assert [item.answer for item in read] == ["before", "after", "before"]
    for row in (0, 2):  # of the first batch, and of the padded one
        asked = temporal.prepare(model(), [read[row]] * 2)
        found = swap_activations(model(), asked.asked, temporal.reversed_prompts(model(), asked), words=asked.words)
        own = {name: values[table["item"] == read[row].key] for name, values in table.items()}
        np.testing.assert_allclose(own["patched"].reshape(3, layers, 2), found.patched[:, :, 0], atol=1e-4)
        np.testing.assert_allclose(own["control"][:2], found.control[0], atol=1e-4)
        np.testing.assert_allclose(own["intervened"][:2], found.intervened[0], atol=1e-4)
        assert set(own["answer"]) == {read[row].answer}
    first = (table["tokens"] == "image") & (table["layer"] == 0)
    for run, share in (("control", summary.accuracy), ("intervened", 1 - summary.accuracy_backwards)):
        preferred = table[run][first].reshape(3, 2).argmax(axis=1)
        assert share == pytest.approx((preferred == [0, 1, 0]).mean())
    same = np.zeros((2, 2), np.float32)
    patched = np.stack([same[None]] * 3)
    nothing = Patched(control=same, intervened=same, patched=patched, layers=np.zeros(1, int))
    steps = experiment(TemporalSwap, place, tmp_path)
    assert np.isnan(steps.scores(nothing)).all() and (with_bugs(steps).scores(nothing) == 0).all()


def test_steering_as_a_run(place: Path, tmp_path: Path) -> None:
    steps = experiment(TemporalSteer, place, tmp_path, ids=place / "ids.safetensors", layers="0,2", strength=2.0)
    summary, table = steps.run(), columns(tmp_path)
    asked = temporal.prepare(model(), read_mvbench(place))
    found = steer_to_frames(model(), asked, ids(), layers=[0, 2], strength=2.0)
    assert len(table["change"]) == 2 * 7 * 3 * 2
    np.testing.assert_allclose(summary.change_mean, found.change.mean(axis=2), atol=1e-4)
    np.testing.assert_allclose(summary.change_std, found.change.std(axis=2), atol=1e-4)
    for layer, frame, word in ((0, 1, "before"), (2, 6, "after")):
        chosen = (table["layer"] == layer) & (table["frame"] == frame) & (table["word"] == word)
        expected = found.change[layer // 2, frame - 1, :, ("before", "after").index(word)]
        np.testing.assert_allclose(np.sort(table["change"][chosen]), np.sort(expected), atol=1e-4)
    assert (tmp_path / "temporal_steering.png").stat().st_size > 1000
    assert experiment(TemporalSteer, place, tmp_path, ids=place).default_layers(model()) == [1]  # 13 of 28


def test_commands_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = "video_path,scene1,scene2,query,correct_order,query_order\n"
    write_video(tmp_path / "short.mp4", np.zeros((5, 32, 32, 3), np.uint8), rate=4)
    (tmp_path / "manifest.csv").write_text(f'{header}short.mp4,star,fish,"{QUERY}","1,2","1,2"\n')
    (tmp_path / "lacking.csv").write_text(f"{header}short.mp4,star,fish,,1,2\n")
    swap, steer = ("run", "temporal-swap"), ("run", "temporal-steer", "--ids", tmp_path / "no")
    for command, data, out, message in (
        (("ids", "temporal"), tmp_path, "x", ".safetensors"),
        (swap, tmp_path, "a", "5 frames"),
        (swap, tmp_path / "lacking.csv", "b", "lacks query"),
        (steer, tmp_path, "c", "expected a file of temporal IDs"),
    ):
        arguments = ("--data", data, "--out", tmp_path / out, "--model", fixtures.folder(CASE))
        assert message in refused(capsys, *command, *arguments)


def test_bad_clips_are_named_or_skipped(tmp_path: Path) -> None:
    """A clip too short, one unreadable, one misnamed: the run ends with the first, or lists them in the end."""
    frames = [(i, i % 7 + 1) for i in range(1, 8)]
    write_appear_folder(tmp_path / "clips", [("star", "fish")], frames=frames, picture_size=32)
    write_video(tmp_path / "clips" / "appear_fish1_star2.mp4", np.zeros((5, 32, 32, 3), np.uint8), rate=8)
    (tmp_path / "clips" / "appear_fish1_star3.mp4").write_bytes(b"no video")
    out = tmp_path / "ids.safetensors"
    extraction = ExtractTemporalIDs(data=tmp_path / "clips", out=out, model=str(fixtures.folder(CASE)))
    with pytest.raises(DataError, match=r"item 'fish1_star2'.*appear_fish1_star2.mp4 has 5 frames, .* --skip-bad"):
        extraction.run()
    (tmp_path / "clips" / "holiday.mp4").write_bytes(b"")
    found = dataclasses.replace(extraction, skip_bad=True).run()
    assert found.clips == len(frames) and found.skipped["count"] == 3
    assert [entry["key"] for entry in found.skipped["items"]] == ["holiday.mp4", "fish1_star2", "fish1_star3"]
    stored = json.loads(out.with_suffix(".json").read_text())
    assert stored["rank_correlation"] == pytest.approx(found.rank_correlation.tolist())
    assert out.with_suffix(".png").stat().st_size > 1000
    clean = dataclasses.replace(extraction, data=tmp_path / "clean", out=tmp_path / "clean.safetensors")
    write_appear_folder(clean.data, [("star", "fish")], frames=frames, picture_size=32)
    clean.run()
    ours, theirs = TemporalIDs.load(out), TemporalIDs.load(clean.out)
    np.testing.assert_allclose(ours.universal, theirs.universal, atol=1e-5)
    # As published, the last clip of an object and frame is its ID.
    dataclasses.replace(clean, out=tmp_path / "bugs.safetensors", reference_bugs=True).run()
    bugs = TemporalIDs.load(tmp_path / "bugs.safetensors")
    assert (bugs.counts == 1).all() and np.abs(bugs.universal - theirs.universal).max() > 0.1
    for path in clean.data.iterdir():
        path.write_bytes(b"no video")
    with pytest.raises(DataError, match=r"no clip .*could be used"):
        dataclasses.replace(clean, skip_bad=True).run()


@pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")
def test_the_published_code_counts_tokens_instead_of_finding_words(tmp_path: Path) -> None:
    """Scenes are at fixed distances from the end, clips begin the prompt, and texts have one token too many."""
    given: Any = {"model": str(fixtures.folder(CASE)), "data": tmp_path, "out": tmp_path / "out", "prompt": "published"}
    ids().save(tmp_path / "ids.safetensors")
    swap = with_bugs(TemporalSwap(**given))
    steer = with_bugs(TemporalSteer(**given, ids=tmp_path / "ids.safetensors"))
    swapped, steered = (one.questions(Session(one), items()) for one in (swap, steer))
    ends = swapped.asked.prompts.last() + 1
    words = [(len(item.scene1.split(" ")), len(item.scene2.split(" "))) for item in items()]
    assert words == [(1, 1), (2, 2)]
    for row, (end, (first, second)) in enumerate(zip(ends.tolist(), words, strict=True)):
        start = end - 20 - second
        assert sorted(set(swapped.first[row].tolist())) == sorted(start - k for k in range(first))
        assert sorted(set(swapped.second[row].tolist())) == sorted(end - 12 - k for k in range(second))
        end = int(steered.asked.prompts.last()[row]) + 1
        assert sorted(set(steered.second[row].tolist())) == [end - 20 - second + k for k in range(second)]
    pair, prompts = Pair(swapped, swapped.asked.prompts), swapped.asked.prompts
    clip_tokens = prompts.image_tokens().shape[1]
    assert (swap.pictures(pair) == np.arange(clip_tokens)).all()
    for own, end in zip(np.asarray(swap.text(pair)), ends.tolist(), strict=True):
        others = end - clip_tokens
        assert sorted(set(own.tolist())) == list(range(end - others - 1, end))
    sound = TemporalSwap(**given)
    assert sound.pictures(pair) is None is sound.text(pair)


def test_given_positions_of_the_clip_are_swapped() -> None:
    options: Any = {"words": batch().words, "chunk": 2}
    image = batch().asked.prompts.image_tokens()
    same = swap_activations(model(), batch().asked, backwards(), pictures=image, **options)
    np.testing.assert_allclose(same.patched, swapped().patched, atol=1e-4)
    halved = image[:, np.arange(image.shape[1]) // 2 * 2]  # every other one, twice: of the same shape
    half = swap_activations(model(), batch().asked, backwards(), pictures=halved, **options)
    assert np.abs(half.patched[0, :2] - swapped().patched[0, :2]).max() > 1e-3
