"""What the published code computes, from its description, in PyTorch and NumPy; the default is another thing."""

import colorsys
import dataclasses
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
from families import VOCABULARY
from processors import processor_of, sentencepiece_tokenizer
from run_data import columns, experiment
from run_data import place as place

from jaxid.data.pictures import recoloured
from jaxid.errors import PromptError
from jaxid.experiments import compare, depth, reference_tokens, relations
from jaxid.experiments.activation_swap import AttributeSwap, MirrorSwap, Pair, swap_activations
from jaxid.experiments.depth import Depth
from jaxid.experiments.reference import last_clips, with_bugs
from jaxid.experiments.steer_picture import SteerPicture, steer_apart
from jaxid.experiments.steering import Steer
from jaxid.ids.accumulate import IDBatch

GIVEN: dict[str, Any] = {"out": Path("out"), "data": Path("data")}
IDS: dict[str, Any] = {"ids": Path("ids.safetensors")}


def test_the_text_of_the_mirror_swap_begins_two_tokens_early() -> None:
    """The last two tokens of the picture are swapped with the text; scores without a change are 0."""
    model, batch = fixtures.model(oracle.CASE), oracle.batch("horizontal")
    pictures = [np.ascontiguousarray(np.asarray(item.picture)[:, ::-1]) for item in oracle.items("horizontal")]
    changed = model.prepare(pictures, list(batch.prompts.questions))
    published, sound = with_bugs(MirrorSwap(**GIVEN)), MirrorSwap(**GIVEN)
    text = published.text(Pair(batch, changed))
    assert text is not None and sound.text(Pair(batch, changed)) is None
    found, plain = (swap_activations(model, batch, changed, text=own) for own in (text, None))
    control = oracle.torch_logprobs(batch)
    values = fixtures.record(oracle.CASE, changed)["resid_post"]
    token_ids, last = np.asarray(batch.prompts.inputs.token_ids), np.asarray(batch.prompts.inputs.last)
    target = oracle.torch_logprobs(dataclasses.replace(batch, prompts=changed))
    for layer in range(oracle.LAYERS):
        # All rows have one picture of equal size, which ends at the same place.
        first = int(np.flatnonzero(token_ids[0] == model.config.image_token_index)[-1]) - 1
        places = np.array([[*range(first, end + 1)] + [end] * (int(last.max()) - end) for end in last.tolist()])
        patched = oracle.torch_logprobs(batch, [oracle.replacing(layer, places, values[layer])])
        np.testing.assert_allclose(found.patched[1, layer], patched, atol=1e-4)
        expected = np.nan_to_num((control - patched) / (control - target))
        scores = published.scores(found)[1, layer]
        np.testing.assert_allclose(scores * (control - target), expected * (control - target), atol=3e-4)
    early = np.abs(found.patched[1] - plain.patched[1])
    assert early[0].max() > 1e-4 and early[-1].max() < 1e-5  # after the last layer the picture is read no more


def test_hues_are_blended_as_numbers() -> None:
    """Pixel by pixel with Python's own conversion, whose hues Pillow rounds to 256."""
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[..., 0], picture[..., 2] = 255, 30  # a red of hue 0.98
    item = oracle.items("horizontal")[0]
    kinds = {"published": with_bugs(AttributeSwap(**GIVEN)), "sound": AttributeSwap(**GIVEN)}
    found = {name: kind.change(item, picture) for name, kind in kinds.items()}
    np.testing.assert_array_equal(found["sound"], recoloured(picture, drawn(item.key)))
    draw = drawn(item.key)
    angle, cycles, phase = draw.uniform(0, 2 * np.pi), draw.uniform(0.8, 2.5), draw.uniform()
    for y, x in np.ndindex(4, 6):
        rainbow = ((np.cos(angle) * x / 5 + np.sin(angle) * y / 3) * cycles + phase) % 1
        own, saturation, value = colorsys.rgb_to_hsv(*(picture[y, x] / 255))
        mixed = 0.25 * own + 0.75 * rainbow
        near = [colorsys.hsv_to_rgb(mixed + off, min(1.1 * saturation, 1), value) for off in (-0.008, 0, 0.008)]
        low, high = 255 * np.min(near, axis=0) - 3, 255 * np.max(near, axis=0) + 3
        assert (found["published"][y, x] >= low).all() and (found["published"][y, x] <= high).all()
    assert (found["published"] != found["sound"]).any()


def drawn(key: str) -> np.random.Generator:
    return np.random.default_rng((0, zlib.crc32(key.encode())))


def test_one_picture_steers_the_word_named_second(tmp_path: Path) -> None:
    """At the right token, with the fixed layer's IDs as they are, and the change's sign reversed."""
    model, batch = fixtures.model(oracle.CASE), oracle.batch("horizontal")
    given: Any = {"out": tmp_path, "ids": tmp_path / "ids.safetensors", "picture": tmp_path / "one.png"}
    oracle.ids().save(given["ids"])
    sound = SteerPicture(**given, subject="star", object="fish")
    published = with_bugs(sound)
    np.testing.assert_array_equal(published.read_ids().values, oracle.ids().values)
    options: Any = {"layers": [0, 1], "cells": ((0, 0), (3, 0)), "id_layer": 1, "strength": 3.0}
    found = steer_apart(model, batch, published.read_ids(), **options, positions=published.positions(batch, 2))
    subjects, objects = (oracle.positions(batch, words) for words in zip(*oracle.PAIRS, strict=True))
    push = 3.0 * (oracle.universal()[1, 0, 0] - oracle.universal()[1, 3, 0])
    vectors = np.broadcast_to(np.stack([push, -push]), (4, 2, oracle.WIDTH))
    places = np.stack([objects, subjects], axis=1)
    for layer in (0, 1):
        patched = oracle.torch_logprobs(batch, [oracle.adding(layer, places, vectors)])
        np.testing.assert_allclose(published.change(found)[layer], oracle.torch_logprobs(batch) - patched, atol=1e-4)
    other = steer_apart(model, batch, oracle.ids(), **options, positions=sound.positions(batch, 2))
    assert np.abs(sound.change(other) - published.change(found)).max() > 0.01


def test_batches_edit_the_token_after_the_word() -> None:
    batch = oracle.batch("vertical")
    subjects = oracle.positions(batch, [subject for subject, _ in oracle.PAIRS])[:, None]
    for kind in (Steer, Depth):
        sound = kind(**GIVEN, **IDS)
        np.testing.assert_array_equal(sound.positions(batch), subjects)
        np.testing.assert_array_equal(with_bugs(sound).positions(batch), subjects + 1)
    assert list(with_bugs(Depth(**GIVEN, **IDS)).columns) == [0]


@pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")
def test_depth_steers_along_the_first_column(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(depth.QUESTIONS, "depth", depth.QUESTIONS["height"])
    monkeypatch.setattr(Depth, "figures", lambda *_: ())
    given: Any = {"layers": "1", "limit": 3}
    sound = experiment(Depth, place, tmp_path / "sound", **given).run()
    published = experiment(Depth, place, tmp_path / "published", **given, reference_bugs=True).run()
    assert sound.change["height"].shape == (1, 4, 4, 2) and published.change["height"].shape == (1, 1, 4, 2)


@pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")
def test_steering_is_split_by_the_original_answer(place: Path, tmp_path: Path) -> None:
    given: Any = {"layers": "0-1", "strength": 1.0}
    summary = experiment(Steer, place, tmp_path / "sound", **given).run()
    table = columns(tmp_path / "sound")
    first, second = (
        {row["item"]: row["control"] for row in rows_of(table) if row["word"] == word} for word in summary.words
    )
    answers = {item: summary.words[int(second[item] > first[item])] for item in first}
    for word in summary.words:
        chosen = [row for row in rows_of(table) if answers[row["item"]] == word and row["word"] == "left"]
        assert summary.answered[word] == len({row["item"] for row in chosen})
        for layer, x, y in [(0, 0, 0), (1, 3, 2)]:
            here = [row["change"] for row in chosen if (row["layer"], row["x"], row["y"]) == (layer, x, y)]
            if here:
                assert summary.change_of_answered[word][layer, x, y, 0] == pytest.approx(np.mean(here), abs=1e-5)
    assert sum(summary.answered.values()) == summary.items
    assert {path.name for path in (tmp_path / "sound").glob("*.png")} == {"steering_left_right.png"}
    experiment(Steer, place, tmp_path / "published", **given, reference_bugs=True).run()
    figures = {path.name for path in (tmp_path / "published").glob("*.png")}
    assert figures == {f"steering_left_right_{word}.png" for word, many in summary.answered.items() if many}


def rows_of(table: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


# --- how items are counted -------------------------------------------------------------------------------------------


def counted_table() -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A run of two layers on items of which every third was answered with neither word."""
    rng, rows = np.random.default_rng(4), []
    for item in range(30):
        control = "nonsense" if item % 3 == 0 else ("correct" if rng.random() < 0.7 else "wrong")
        for condition in compare.CONDITIONS:
            for layer in (0, 1):
                rows.append(
                    {
                        "item": f"{item:03d}",
                        "image_id": item,
                        "axis": "horizontal" if item % 2 else "vertical",
                        "condition": condition,
                        "layer": layer,
                        "swapped": bool(rng.random() < (0.8 if condition == "belief" else 0.3)),
                        "control_verdict": control,
                        "verdict": str(rng.choice(["correct", "wrong", "nonsense"])),
                    }
                )
    return rows, {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_noise_covers_unanswered_items_which_count_as_wrong() -> None:
    rows, table = counted_table()
    published = compare.rates(table, [0, 1], as_published=True)
    sound = compare.rates(table, [0, 1])
    for layer in (0, 1):
        here = [row for row in rows if row["layer"] == layer]
        answered = [row for row in here if row["control_verdict"] != "nonsense"]
        for condition, of_published, of_sound in (("belief", answered, answered), ("noise", here, answered)):
            for found, among in ((published, of_published), (sound, of_sound)):
                own = [row["swapped"] for row in among if row["condition"] == condition]
                assert found.swapped[condition][layer] == pytest.approx(np.mean(own))
        right = sum(row["control_verdict"] == "correct" for row in here if row["condition"] == "belief")
        steered = sum(row["verdict"] == "correct" for row in answered if row["condition"] == "belief")
        assert published.accuracy == pytest.approx(right / 30) and sound.accuracy == pytest.approx(right / 20)
        assert published.accuracy_drop[layer] == pytest.approx((right - steered) / 30)
        assert sound.accuracy_drop[layer] == pytest.approx((right - steered) / 20)
    assert published.swapped["noise"] != sound.swapped["noise"]


# --- the last clip ---------------------------------------------------------------------------------------------------


def test_later_clips_overwrite_and_a_clips_second_object_its_first() -> None:
    """Batches hold the first objects of some clips and then their second ones; the order of reading is by clip."""
    rng, clips = np.random.default_rng(2), []
    for _ in range(25):
        i, j = rng.choice(np.arange(2), 2, replace=False)
        pair = int(rng.integers(2))  # objects 0 and 1, either one first
        clips.append((pair, int(i), int(j), rng.normal(size=(2, 3, 4)).astype(np.float32)))

    def batches() -> Iterator[IDBatch]:
        for start in range(0, len(clips), 7):
            part = clips[start : start + 7]
            full = part + part[:1] * (7 - len(part))
            padding = np.arange(7) >= len(part)
            for role in range(2):
                pair = np.array([clip[0] for clip in full])
                yield IDBatch(
                    activations=np.stack([clip[3][role] for clip in full]),
                    object_index=pair if role == 0 else 1 - pair,
                    pair_index=np.where(padding, -1, 2 * pair + role),
                    own_index=np.array([clip[1 + role] for clip in full]),
                    other_index=np.array([clip[2 - role] for clip in full]),
                    order=2 * (start + np.arange(7)) + role,
                )

    last: dict[tuple[int, int], np.ndarray] = {}
    for pair, i, j, activations in clips:
        last[pair, i] = activations[0]
        last[1 - pair, j] = activations[1]
    found = last_clips(batches(), pairs=4, objects=("a", "b"), frames=(1, 2))
    for (row, frame), activation in last.items():
        np.testing.assert_array_equal(found.values[:, row, frame], activation[1:])


# --- which tokens are edited and read --------------------------------------------------------------------------------


def test_all_tokens_like_the_words_last_one_are_edited() -> None:
    """The subject stands twice in the prompt; both places are edited one token late."""
    model = fixtures.model(oracle.CASE)
    batch = relations.prepare(model, oracle.items("vertical"), prompt="{query} Is the star below?")
    found = with_bugs(Steer(**GIVEN, **IDS)).positions(batch)
    for row, (subject, _) in enumerate(oracle.PAIRS):
        ids = np.asarray(batch.prompts.inputs.token_ids[row]).tolist()
        places = [place for place, token in enumerate(ids) if token == VOCABULARY.index(subject)]
        assert sorted(set(found[row].tolist())) == [place + 1 for place in places]
    assert len(set(found[0].tolist())) == 2


def test_tokens_of_answers_of_the_raw_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap reads the entries "left" and "right"; depth the first tokens of " Above" and " Below"."""
    processor = processor_of(sentencepiece_tokenizer)
    sides = dataclasses.replace(oracle.batch("horizontal"), case="published")
    read = reference_tokens.entries_read(processor, sides)
    assert processor.tokenizer.convert_ids_to_tokens(list(read.answer_ids or ())) == ["left", "right"]
    both = dataclasses.replace(sides, answers=["above", "below"], case="both")
    assert reference_tokens.entries_read(processor, both).answer_ids is None
    tokens = {"Above": [5, 6], "Below": [7]}  # as Llama's: "A", "bove" and "Below"
    monkeypatch.setattr(processor, "answer_tokens", lambda words: [tokens[word] for word in words])
    height = dataclasses.replace(sides, answers=["above", "below"])
    assert reference_tokens.first_tokens_read(processor, height).answer_ids == (5, 7)
    assert reference_tokens.first_tokens_read(processor, both).answer_ids is None


def test_positions_counted_from_the_end() -> None:
    prompts = oracle.batch("horizontal").prompts
    found = reference_tokens.from_end(prompts, [range(-1, -4, -1)] * 3 + [range(-2, -3, -1)])
    last = np.asarray(prompts.inputs.last)
    np.testing.assert_array_equal(found[:3], last[:3, None] - np.arange(3))
    assert found[3].tolist() == [last[3] - 1] * 3
    with pytest.raises(PromptError, match="shorter"):
        reference_tokens.from_end(prompts, [[-1000]] * 4)
