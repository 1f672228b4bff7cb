"""Deviation and occlusion with the published code's bugs, against what that code is described to do."""

import collections
import dataclasses
import functools
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
import torch
from families import CASES, VOCABULARY
from PIL import Image, ImageFilter
from run_data import columns, experiment
from scipy import stats

from jaxid.data.coco_boxes import PlacedItem
from jaxid.data.coco_spatial import ANSWERS, INSTANCES_FILE, write_coco_spatial
from jaxid.data.scenes import sample_free
from jaxid.errors import DataError, InputError
from jaxid.experiments.deviation import Deviation, measure_deviations, separation
from jaxid.experiments.occlusion import Occlusion, ask, blurred, occlude, random_boxes
from jaxid.experiments.reference import with_bugs
from jaxid.experiments.reference_diagnosis import answer_inside, blurred_crops, first_tokens, random_places, rounded
from jaxid.experiments.relations import answer_of, prepare
from jaxid.experiments.session import Session
from jaxid.io import write_json, write_table
from jaxid.prompts.processor import Prompts

pytestmark = [
    # The random models' vocabulary lacks most of what the drawn pictures hold.
    pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning"),
]

CASE = CASES[0]
ITEMS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnosis")
    write_coco_spatial(folder / "data", sample_free(np.random.default_rng(1), ITEMS, num_objects=(2, 2)), 48)
    dataclasses.replace(oracle.ids(), fingerprint=fixtures.model(CASE).fingerprint).save(folder / "ids.safetensors")
    return folder


def both(kind: type[Any], place: Path, **options: Any) -> tuple[Any, Any]:
    """An experiment as we have it, and with the bugs."""
    one = experiment(kind, place, "out", **options)
    return one, with_bugs(dataclasses.replace(one, reference_bugs=True))


# --- the deviation ---------------------------------------------------------------------------------------------------


@functools.cache
def written_by_torch(row: int, steps: int = 6) -> list[str]:
    """The words that Hugging Face's model writes after a question, greedily."""
    inputs = oracle.batch("horizontal").prompts.inputs
    tokens = torch.tensor(np.asarray(inputs.token_ids[row : row + 1, : inputs.last[row] + 1])).long()
    pixels = torch.tensor(np.asarray(inputs.pixels)[row : row + 1])
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}
    made = fixtures.reference(CASE).generate(**given, max_new_tokens=steps, do_sample=False)
    return [VOCABULARY[token] for token in made[0, tokens.shape[1] :].tolist() if 4 < token < len(VOCABULARY)]


def test_written_answers_are_judged() -> None:
    model, batch = fixtures.model(CASE), oracle.batch("horizontal")
    texts = [written_by_torch(row) for row in range(4)]
    # The words that tell the texts apart best take the part of the answers, so that all three verdicts occur.
    counted = collections.Counter(word for text in texts for word in set(text) if word.islower())
    pairs = [(one, other) for one in counted for other in counted if one != other]

    def judged(pair: tuple[str, str]) -> list[int]:
        found = [[index for index, word in enumerate(pair) if word in " ".join(text)] for text in texts]
        return [own[0] if len(own) == 1 else -1 for own in found]

    answers = max(pairs, key=lambda pair: len(set(judged(pair))))
    expected = np.array(judged(answers))
    assert len(set(expected.tolist())) > 1
    asked = dataclasses.replace(batch, answers=list(answers))
    boxes = np.full((4, 2, 4), 0.2)
    one = measure_deviations(model, asked, oracle.ids(), boxes, max_new_tokens=6, said=answer_inside)
    np.testing.assert_array_equal(one.said, expected)
    np.testing.assert_array_equal(one.correct, expected == oracle.TRUTHS)
    assert [text.split() for text in one.texts] == texts
    # Ours judges by the more probable word, and writes nothing.
    ours = measure_deviations(model, asked, oracle.ids(), boxes)
    np.testing.assert_array_equal(ours.said, np.asarray(ours.control).argmax(axis=1))
    assert (ours.said != expected).any() and set(ours.texts) == {""}


def test_an_answer_may_be_a_part_of_a_word() -> None:
    words = ["left", "right"]
    for text, inside, whole in (
        ("The leftmost one.", 0, -1),
        ("Left.", 0, 0),
        ("It is upright, on the left", -1, 0),
        ("RIGHT", 1, 1),
        ("left or right", -1, -1),
        ("neither", -1, -1),
    ):
        assert (answer_inside(text, words), answer_of(text, words)) == (inside, whole)


@pytest.mark.parametrize("locate", [Prompts.words, first_tokens])
def test_words_are_found_by_their_last_token(locate: Any) -> None:
    """Of the star beside a left star, the published code reads the left star's word."""
    model, (item, *_) = fixtures.model(CASE), oracle.items("vertical")
    item = dataclasses.replace(item, subject="left star", object="star")
    batch = prepare(model, [item] * 2)
    found = measure_deviations(model, batch, oracle.ids(), np.full((2, 2, 4), 0.2), layers=[1], locate=locate)
    text, states = model.prepare(None, [item.query] * 2), []
    for prompts in (batch.prompts, text):
        tokens = np.asarray(prompts.inputs.token_ids)[0].tolist()
        stars = [index for index, token in enumerate(tokens) if token == VOCABULARY.index("star")]
        assert len(stars) == 2
        at = stars[0] if locate is first_tokens else stars[1]
        states.append(fixtures.record(CASE, prompts)["resid_post"][1, 0, [stars[0], at]])
    u, v = (np.asarray(direction[1]) for direction in oracle.ids().plane())
    np.testing.assert_allclose(found.words[0, 0], (states[0] - states[1]) @ np.stack([u, v], axis=1), atol=1e-4)


def test_options_of_the_published_deviation(place: Path) -> None:
    ours, theirs = both(Deviation, place)
    assert (ours.default_new_tokens, theirs.default_new_tokens) == (0, 250)
    assert theirs.said is answer_inside and ours.said is answer_of
    assert theirs.locate is first_tokens and ours.locate is Prompts.words
    assert ours.published_text == theirs.published_text == "{query} Answer {first} or {second} only."
    with pytest.raises(InputError, match="judges the answers that are written"):
        both(Deviation, place, max_new_tokens=0)


def test_the_first_box_is_taken(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    shutil.copy(place / "ids.safetensors", tmp_path)
    path = tmp_path / "data" / INSTANCES_FILE
    content = json.loads(path.read_text())
    ours, theirs = both(Deviation, tmp_path)
    item = ours.items(Session(ours))[0].item
    # A crowd of what is named like the subject and more comes first.
    content["categories"].append({"id": 999, "name": f"toy {item.subject}"})
    entry = {"id": 10**6, "image_id": item.image_id, "category_id": 999, "bbox": [1, 2, 3, 4], "iscrowd": 1}
    content["annotations"].insert(0, entry)
    path.write_text(json.dumps(content))
    mine, published = (
        next(one for one in steps.items(Session(steps)) if one.key == item.key) for steps in (ours, theirs)
    )
    assert published.boxes[0].tolist() == [1, 2, 3, 4]
    assert mine.boxes[0].tolist() != [1, 2, 3, 4]
    np.testing.assert_array_equal(mine.boxes[1], published.boxes[1])


def test_items_without_an_answer_are_in_no_group() -> None:
    margins = np.array([3.0, 1, -2, 0.5, -4, 9])
    verdicts = np.array(["correct", "wrong", "wrong", "correct", "correct", "nonsense"])
    table = {
        "layer": np.full(6, 2),
        "role": np.full(6, "subject"),
        "margin": margins,
        "verdict": verdicts,
        "correct": verdicts == "correct",
    }
    found = separation(table, 2)
    assert found.accuracy == 3 / 6
    assert found.mann_whitney["u"] == stats.mannwhitneyu([3, 0.5, -4], [1, -2]).statistic
    assert (found.halves["easy"]["count"], found.halves["hard"]["count"]) == (3, 2)
    assert found.halves["easy"]["accuracy"] == 2 / 3


def test_a_run_whose_answers_are_nonsense(place: Path, tmp_path: Path) -> None:
    options = {"reference_bugs": True, "max_new_tokens": 3, "case": "lower", "layers": "1"}
    summary = experiment(Deviation, place, tmp_path / "out", **options).run()
    table = columns(tmp_path / "out")
    said = [answer_inside(text, ANSWERS[axis]) for text, axis in zip(table["text"], table["axis"], strict=True)]
    expected = ["nonsense" if index < 0 else None for index in said]
    assert [one if one == "nonsense" else None for one in table["verdict"].tolist()] == expected
    assert set(table["text"]) != {""}
    answered = table["verdict"] != "nonsense"
    assert summary.answered_items == len(set(table["item"][answered])) < summary.items == ITEMS
    assert summary.accuracy == table["correct"][table["role"] == "subject"].mean()
    assert f"{ITEMS - summary.answered_items} without an answer" in next(iter(Deviation.report(None, summary)))  # pyright: ignore


# --- the occlusion ---------------------------------------------------------------------------------------------------


def test_boxes_are_rounded() -> None:
    size = (60, 40)
    boxes = [[0.5, 1.5, 2.5, 3.49], [59.7, 39.2, 0.4, 0.2], [10.2, 5.8, 60, 2.6], [58.4, 1, 0.3, 0.5]]
    for box, found in zip(boxes, rounded(np.array(boxes), size).tolist(), strict=True):
        x, y, width, height = (round(edge) for edge in box)
        x, y = max(0, min(x, size[0] - 1)), max(0, min(y, size[1] - 1))
        width, height = max(1, min(width, size[0] - x)), max(1, min(height, size[1] - y))
        assert found == [x, y, x + width, y + height]
    assert rounded(np.array([0.5, 1.5, 2.5, 3.5]), size).tolist() == [0, 2, 2, 6]


def test_nothing_runs_into_a_blurred_crop() -> None:
    picture = np.zeros((80, 100, 3), np.uint8)
    picture[20:60, 30:70, 0] = 255
    box = np.array([[30, 20, 70, 60]])
    (published,), (ours,) = blurred_crops(picture, box, 20), blurred(picture, box, 20)
    np.testing.assert_array_equal(published, picture)  # it stays red
    assert ours[40, 50, 0] < 230 and ours[21, 31, 0] < 150
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    expected = Image.fromarray(noise)
    expected.paste(expected.crop((10, 5, 30, 20)).filter(ImageFilter.GaussianBlur(3)), (10, 5))
    np.testing.assert_array_equal(blurred_crops(noise, np.array([[10, 5, 30, 20]]), 3)[0], np.asarray(expected))


def overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    across, down = (
        min(one[n] + one[n + 2], other[n] + other[n + 2]) - max(one[n], other[n]) for n in (0, 1)
    )  # fmt: skip
    return across > 0 and down > 0


def places_by_hand(
    seed: int, size: tuple[int, int], like: list[float], avoid: list[list[float]]
) -> tuple[int, list[list[int]]]:
    """500 tries in all; the missing of ten places repeat random ones; without any, the upper left corner."""
    rng, tries, found = random.Random(seed), 0, []
    width, height = round(like[2]), round(like[3])
    while len(found) < 10 and tries < 500:
        tries += 1
        box = [rng.randint(0, size[0] - width), rng.randint(0, size[1] - height), width, height]
        if not any(overlap(box, other) for other in avoid):
            found.append(box)
    count = len(found)
    while found and len(found) < 10:
        found.append(rng.choice(found))
    return count, found or [[0, 0, width, height]] * 10


@pytest.mark.parametrize(
    ("size", "boxes", "counts"),
    [
        ((60, 40), [[5.3, 4.6, 15.2, 10.5], [30.0, 20, 20, 18]], {10}),  # there is room
        ((60, 40), [[1.0, 1, 40, 38.2], [41.0, 1, 10, 30]], {0}),  # there is none
        ((120, 40), [[0.0, 0, 60, 38], [0.0, 38, 2, 2]], set(range(3, 11))),  # of 61 columns, one is free
    ],
    ids=["room", "none", "little"],
)
def test_one_budget_of_tries_serves_all_places(size: Any, boxes: list[list[float]], counts: set[int]) -> None:
    found, counted = [], set()
    for seed in range(5):
        found = random_places(random.Random(seed), size, np.array(boxes[0]), np.array(boxes)).astype(int).tolist()
        count, expected = places_by_hand(seed, size, boxes[0], boxes)
        assert found == expected and len(found) == 10
        assert count == 0 or not any(overlap(box, other) for box in found for other in boxes)
        counted.add(count)
    assert counted <= counts and (len(counts) == 1 or min(counted) < 10)
    if counts == {0}:
        assert found == [[0, 0, 40, 38]] * 10
        with pytest.raises(DataError, match="too crowded"):  # ours refuses the item
            edges = rounded(np.array(boxes), size)
            random_boxes(np.random.default_rng(0), size, edges[0], edges)


def test_no_item_is_dropped(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data" / INSTANCES_FILE
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["bbox"] = [1.2, 1.7, 45.4, 45]
    path.write_text(json.dumps(content))
    ours, theirs = both(Occlusion, tmp_path)
    with pytest.raises(DataError, match="too crowded"):
        ours.items(Session(ours))
    found = theirs.items(Session(theirs))
    assert len(found) == ITEMS
    for one in found:
        assert one.objects[0].tolist() == [1, 2, 46, 47] and one.elsewhere.tolist() == [[0, 0, 45, 45]] * 10


def test_answers_about_published_variants_are_pytorchs(place: Path) -> None:
    steps = both(Occlusion, place, radius=4.0)[1]
    item = oracle.items("horizontal")[1]
    boxes = np.array([[3.4, 2.5, 9.3, 10.6], [17, 20, 8, 8]])
    placed = PlacedItem(item=item, boxes=boxes, size=(32, 32))
    one = steps.with_boxes(placed, 7)
    shown = [Image.fromarray(np.asarray(item.picture)) for _ in range(12)]
    for picture, box in zip(shown[1:], [boxes[0], *np.array(one.elsewhere)], strict=True):
        left, upper = (round(edge) for edge in box[:2])
        area = (left, upper, left + 9, upper + 11)
        picture.paste(picture.crop(area).filter(ImageFilter.GaussianBlur(4)), (left, upper))
    made = one.pictures(4.0, steps.blur)
    for mine, theirs in zip(made, shown, strict=True):
        np.testing.assert_array_equal(mine, np.asarray(theirs))
    batches = ask(fixtures.model(CASE), [item], [made])
    found = occlude(fixtures.model(CASE), batches, 1)
    prompts = fixtures.model(CASE).prepare([np.asarray(picture) for picture in shown], [item.query] * 12)
    logits = fixtures.record(CASE, prompts)["logits"][np.arange(12), np.asarray(prompts.inputs.last)]
    logs = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()[:, [VOCABULARY.index(w) for w in ("right", "left")]]
    np.testing.assert_allclose(np.stack([found.right[0], found.wrong[0]], axis=1), logs, atol=1e-4)
    # The second to the fifth blur elsewhere are compared.
    assert steps.sensitivity(found) == pytest.approx([logs[3:7, 0].min() - logs[1, 0]], abs=1e-4)
    assert steps.with_boxes(placed, 7).elsewhere.tolist() == one.elsewhere.tolist()
    assert steps.with_boxes(placed, 8).elsewhere.tolist() != one.elsewhere.tolist()


def test_crowds_count_and_answers_are_capitalised(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data" / INSTANCES_FILE
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    path.write_text(json.dumps(content))
    ours, theirs = both(Occlusion, tmp_path)
    with pytest.raises(DataError, match="only a crowd"):
        ours.items(Session(ours))
    assert len(theirs.items(Session(theirs))) == ITEMS
    ours, theirs = both(Occlusion, tmp_path, prompt="published")
    assert (Session(ours).case, Session(theirs).case) == ("both", "capital")
    assert ours.published_text == theirs.published_text == "{query} Answer {First} or {Second}."


def test_items_are_grouped_by_written_answers(place: Path, tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    write_json(tmp_path / "summary.json", {"experiment": "deviation", "layer": 1})
    rows = [(name, layer, role) for name in names for layer in (0, 1) for role in ("subject", "object")]
    items, layers, roles = zip(*rows, strict=True)
    verdicts = [{"a": "correct", "b": "wrong", "c": "nonsense", "d": "correct"}[name] for name in items]
    columns = {"item": items, "layer": layers, "role": roles, "margin": [0.0] * len(rows), "verdict": verdicts}
    write_table(tmp_path / "table.parquet", columns)
    ours, theirs = both(Occlusion, place, deviation=tmp_path)
    table = {"item": np.array(["a", "a", "b", "c", "e"]), "variant": np.array([0, 1, 0, 0, 0])}
    table["correct"] = np.array([False, False, True, True, True])
    assert ours.compared(table)["correct"].tolist() == [False, True, True, True]
    found = theirs.compared(table)
    assert found["item"].tolist() == ["a", "b"] and found["correct"].tolist() == [True, False]
    with pytest.raises(DataError, match="holds no answer about any of these items"):
        theirs.compared({name: values[3:] for name, values in table.items()})
