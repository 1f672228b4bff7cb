"""The recipe of tiny-llava: every label is checked against the scene by independent rules."""

import dataclasses
import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest

from jaxid.data.scenes import COLORS, OBJECTS, Scenes, concatenate, render
from jaxid.families.base import Model
from jaxid.families.llava import LlavaProcessor
from jaxid.prompts.processor import Processor
from jaxid.zoo import evaluation, llava_texts
from jaxid.zoo import tiny_llava as recipe
from jaxid.zoo.export import write_processor, write_tokenizer
from jaxid.zoo.sampling import normalize

WORDS = llava_texts.VOCABULARY
TARGETS = llava_texts.targets(1.0)
EXTREMES = {"left": "A", "right": "D", "above": "1", "below": "4"}
"""The most probable column or row of what is there."""

NOBODY = Model(parameters={}, definition=None, config=None, processor=None, name="nobody", fingerprint="")
"""A stand-in for tests that supply the answers themselves."""


def column_and_row(center: np.ndarray) -> tuple[int, int]:
    """The cell of a centre, column first."""
    x, y = (min(int(float(value) * 4), 3) for value in center)
    return x, y


def objects_of(scenes: Scenes, row: int) -> dict[str, tuple[np.ndarray, str]]:
    """Centre and colour of every object of one scene, by name."""
    return {
        OBJECTS[index]: (scenes.centers[row, slot], list(COLORS)[scenes.colors[row, slot]])
        for slot, index in enumerate(scenes.objects[row])
        if index >= 0
    }


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[Scenes]:
    """All scenes that are drawn during a test."""
    found: list[Scenes] = []

    def spy(scenes: Scenes, size: int) -> np.ndarray:
        found.append(scenes)
        return render(scenes, size)

    monkeypatch.setattr(recipe.drawn, "render", spy)
    return found


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """The processor of an exported folder."""
    folder = tmp_path_factory.mktemp("exported")
    write_tokenizer(folder, WORDS, recipe.CHAT_TEMPLATE)
    write_processor(folder, recipe.config(), mean=recipe.PIXEL_MEAN, std=recipe.PIXEL_STD)
    return LlavaProcessor.from_folder(folder, recipe.config())


# --- words ---------------------------------------------------------------------------------------------------------


def test_vocabulary_holds_all_that_is_said_and_fits_the_network() -> None:
    assert len(set(WORDS)) == len(WORDS) <= recipe.config().text_config.vocab_size
    assert recipe.config().text_config.vocab_size % 16 == 0
    cells = {column + row for column in "ABCD" for row in "1234"}
    assert {*OBJECTS, *COLORS, *cells, *"ABCD", *"1234", "left", "right", "above", "below", "yes", "no"} <= set(WORDS)
    further = "near far from front behind between true false".split()
    assert set(further) <= set(WORDS)
    assert WORDS[recipe.config().image_token_index] == "<image>"


def test_every_word_is_one_token_of_the_exported_tokenizer(processor: Processor) -> None:
    start = WORDS.index("<s>")
    for index, word in enumerate(WORDS):
        assert processor.tokenizer(word)["input_ids"] == [start, index], word
        assert llava_texts.encode(word) == [index]
    answers = [*OBJECTS, *COLORS, "left", "right", "above", "below", "yes", "no", "A1", "D4", "A", "4"]
    assert processor.answer_ids(answers).tolist() == [WORDS.index(word) for word in answers]


@pytest.mark.parametrize(
    ("question", "spaced"),
    [
        ("Is the star to the left or right of the fish?", "Is the star to the left or right of the fish ?"),
        ("Is the moon above or below the cup?", "Is the moon above or below the cup ?"),
        ("Where is the hourglass?", "Where is the hourglass ?"),
        ("Is there a key?", "Is there a key ?"),
        ("What color is the bolt?", "What color is the bolt ?"),
        ("Is the cup near or far from the fish?", "Is the cup near or far from the fish ?"),
        ("Is the cup in front or behind the fish?", "Is the cup in front or behind the fish ?"),
        ("Is the cup in between fish and key?", "Is the cup in between fish and key ?"),
        ("The cup is to the left of the key.", "The cup is to the left of the key ."),
        (
            'Is the ring to the left or right of the tree? Answer "left" or "right" only.',
            'Is the ring to the left or right of the tree ? Answer " left " or " right " only .',
        ),
    ],
)
def test_real_prompts_have_the_ids_and_places_of_the_training_prompts(
    processor: Processor, question: str, spaced: str
) -> None:
    picture = np.zeros((recipe.IMAGE_SIZE, recipe.IMAGE_SIZE, 3), np.uint8)
    prompts = processor.prepare(picture, question)
    plan = recipe.layout()
    length = int(prompts.last()[0]) + 1
    expected = [*plan.token_ids[: plan.text_start], *llava_texts.encode(f"{spaced} ASSISTANT :")]
    assert np.asarray(prompts.inputs.token_ids)[0, :length].tolist() == expected
    assert np.asarray(prompts.inputs.image_rows)[0, : plan.text_start].tolist() == [
        -1,
        -1,
        -1,
        *range(plan.image_tokens),
    ]
    # The first question slot has the same positions as the question of a separate prompt.
    kinds, longest = recipe.SLOTS["language"], recipe.LENGTHS["question"]
    first = plan.text_start + sum(recipe.LENGTHS[kind] for kind in kinds[: kinds.index("question")])
    own = np.asarray(prompts.inputs.positions)[0, plan.text_start : plan.text_start + longest]
    assert plan.positions[first : first + longest].tolist()[: len(own)] == own.tolist()


def test_captions_are_prompts_without_chat(processor: Processor) -> None:
    picture = np.zeros((recipe.IMAGE_SIZE, recipe.IMAGE_SIZE, 3), np.uint8)
    prompts = processor.prepare(picture, "column of the star", chat=False)
    length = int(prompts.last()[0]) + 1
    expected = [*recipe.layout().token_ids[: recipe.layout().text_start], *llava_texts.encode("column of the star")]
    assert np.asarray(prompts.inputs.token_ids)[0, :length].tolist() == expected


def test_normalize_is_the_shipped_image_processor(processor: Processor) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, recipe.IMAGE_SIZE, recipe.IMAGE_SIZE, 3), np.uint8)
    pictures[0] = np.arange(256, dtype=np.uint8)[np.arange(pictures[0].size) % 256].reshape(pictures[0].shape)
    np.testing.assert_allclose(normalize(pictures), processor.pixels(list(pictures)), atol=1e-6)


# --- packed prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "lengths", "alone"),
    [("binding", [5, 5, 4] * 4 + [12] * 2, {12, 13}), ("language", [5] * 2 + [16] * 5 + [25, 28], {8})],
)
def test_layout_by_hand(stage: str, lengths: list[int], alone: set[int]) -> None:
    plan = recipe.layout(stage)
    prefix = [WORDS.index(word) for word in ["<s>", "USER", ":"]] + [WORDS.index("<image>")] * 36
    assert plan.text_start == len(prefix) == 39
    assert plan.token_ids[:39].tolist() == prefix
    assert (plan.image_start, plan.image_tokens) == (3, 36)
    slot_of = [-1] * 39 + [number for number, length in enumerate(lengths) for _ in range(length)]
    assert len(plan.token_ids) == len(slot_of)
    assert (plan.token_ids[39:] == 0).all()
    mask = np.asarray(plan.reads().mask()[0])
    for token, slot in enumerate(slot_of):
        earlier = sum(other == slot for other in slot_of[:token])
        assert plan.positions[token] == (token if slot == -1 else earlier if slot in alone else 39 + earlier)
        # A token attends to the prefix, unless its slot is a prompt of its own, to earlier tokens of its own slot, and
        # to itself.
        read = (slot,) if slot in alone else (-1, slot)
        seen = {other for other in range(token + 1) if slot_of[other] in read}
        assert set(np.flatnonzero(mask[token]).tolist()) == seen


def test_every_text_fits_its_slot() -> None:
    relations = ["Is the a to the left or right of the a ?", "Is the a above or below the a ?"]
    others = ["Where is the a ?", "Is there a a ?", "What color is the a ?", "Is the a near or far from the a ?"]
    others += ["Is the a in front or behind the a ?", "Is the a in between a and a ?"]
    others += ["The a is to the left of the a ."]
    for text in [*relations, *others]:
        assert len(llava_texts.encode(f"{text} ASSISTANT :")) <= recipe.LENGTHS["question"]
    longest = f'{relations[0]} Answer " left " or " right " only . ASSISTANT :'
    assert len(llava_texts.encode(longest)) <= recipe.LENGTHS["long question"]
    assert len(llava_texts.encode("column of what is left")) == recipe.LENGTHS["column"] == recipe.LENGTHS["row"]
    caption = f"{recipe.BEFORE} left : the a . column of the a"
    assert len(llava_texts.encode(caption)) == recipe.LENGTHS["caption alone"]
    alone = f"{recipe.BEFORE} left : the a . right : the a . {relations[0]} ASSISTANT :"
    assert len(llava_texts.encode(alone)) < recipe.LENGTHS["alone"]


# --- what training never shows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "pairs"), [(recipe.held_out_pairs, 8), (recipe.held_out_places, 12)])
def test_held_out_tables(table: Callable[[], np.ndarray], pairs: int) -> None:
    held_out = table()
    assert held_out.shape == (16, 16) and held_out.sum() == 2 * pairs
    np.testing.assert_array_equal(held_out, held_out.T)
    assert not held_out.diagonal().any()
    np.testing.assert_array_equal(held_out, table())


def holds_held_out(scenes: Scenes, row: int) -> bool:
    for (one, (here, _)), (other, (there, _)) in itertools.combinations(objects_of(scenes, row).items(), 2):
        (x1, y1), (x2, y2) = column_and_row(here), column_and_row(there)
        if recipe.held_out_pairs()[OBJECTS.index(one), OBJECTS.index(other)]:
            return True
        if recipe.held_out_places()[4 * y1 + x1, 4 * y2 + x2]:
            return True
    return False


def test_training_batches_never_show_a_held_out_pair(rendered: list[Scenes]) -> None:
    for step in range(4):
        recipe.training_batch(0, step, 32)
        recipe.sight_batch(0, step, 32)
    scenes = concatenate([*rendered, recipe.training_world(np.random.default_rng(0), 800).scenes])
    assert len(scenes) == 2 * 4 * 32 + 800
    assert not any(holds_held_out(scenes, row) for row in range(len(scenes)))
    numbers = np.bincount((scenes.objects >= 0).sum(axis=1))
    assert (numbers[1:5] > 0).all() and numbers[0] == 0
    # All that is allowed is shown, so that a held-out pair is new only as a pair.
    assert set(scenes.objects.ravel()) == {-1, *range(16)}
    assert {
        column_and_row(center) for center, there in zip(scenes.centers[:, 0], scenes.objects[:, 0], strict=True)
    } == {(x, y) for x in range(4) for y in range(4)}


def test_held_out_scenes_all_hold_one() -> None:
    scenes = evaluation.held_out_scenes(np.random.default_rng(0), 60)
    assert len(scenes) == 60
    assert all(holds_held_out(scenes, row) for row in range(60))
    assert recipe.is_held_out(scenes).all()
    assert (scenes.objects >= 0).all() and scenes.objects.shape == (60, 2)


def test_a_mirrored_scene_has_mirrored_cells() -> None:
    scenes = recipe.training_world(np.random.default_rng(1), 40).scenes
    centers = np.stack([1 - scenes.centers[..., 0], scenes.centers[..., 1]], axis=-1)
    cells, reversed_cells = recipe.cells(scenes), recipe.cells(dataclasses.replace(scenes, centers=centers))
    present = scenes.objects >= 0
    assert (cells[present] // 4 == reversed_cells[present] // 4).all()
    assert (cells[present] % 4 == 3 - reversed_cells[present] % 4).all()


# --- batches -------------------------------------------------------------------------------------------------------


def test_batches_are_pure_functions_of_seed_and_step() -> None:
    for make in (recipe.training_batch, recipe.sight_batch):
        one, other_step, other_seed, again = make(3, 5, 8), make(3, 6, 8), make(4, 5, 8), make(3, 5, 8)
        for name in ("pictures", "token_ids", "labels", "patches"):
            np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
        assert (one.pictures != other_step.pictures).any() and (one.pictures != other_seed.pictures).any()
    assert (recipe.training_batch(3, 5, 8).pictures != recipe.sight_batch(3, 5, 8).pictures).any()
    assert recipe.sight_batch(3, 5, 8).token_ids.shape == (8, 0)


def gap_of(scene: dict[str, tuple[np.ndarray, str]], found: re.Match[str] | tuple[str, str, str], axis: int) -> float:
    """How much further along an axis the first named object is than the second."""
    gap = float(scene[found[1]][0][axis] - scene[found[2]][0][axis])
    assert abs(gap) >= llava_texts.MIN_GAP - 1e-6
    return gap


def true_answer(text: str, scene: dict[str, tuple[np.ndarray, str]]) -> str:
    """The right answer to a training text, read from the scene; fails where there is no clear one."""
    if found := re.fullmatch(r"(column|row) of the (\w+)", text):
        x, y = column_and_row(scene[found[2]][0])
        return "ABCD"[x] if found[1] == "column" else "1234"[y]
    if found := re.fullmatch(r"(column|row) of what is (\w+)", text):
        assert (found[1] == "column") == (found[2] in ("left", "right"))
        return EXTREMES[found[2]]
    if found := re.fullmatch(r"(left|right|above|below) : the", text):
        axis, sign = int(found[1] in ("above", "below")), 1 if found[1] in ("left", "above") else -1
        (first, there), (_, other), *_ = sorted(
            ((name, sign * float(center[axis])) for name, (center, _) in scene.items()), key=lambda pair: pair[1]
        )
        assert other - there >= llava_texts.MIN_GAP - 1e-6
        return first
    for axis, (words, phrase) in enumerate(
        ((("left", "right"), "to the left or right of"), (("above", "below"), "above or below"))
    ):
        said = rf'( Answer " {words[0]} " or " {words[1]} " only \.)?'
        if found := re.fullmatch(rf"Is the (\w+) {phrase} the (\w+) \?{said}", text):
            return words[int(gap_of(scene, found, axis) > 0)]
        if found := re.fullmatch(rf"The (\w+) is (?:to the )?({'|'.join(words)})(?: of)? the (\w+) \.", text):
            truth = words[int(gap_of(scene, ("", found[1], found[3]), axis) > 0)]
            return "true" if found[2] == truth else "false"
    if found := re.fullmatch(r"Is the (\w+) near or far from the (\w+) \?", text):
        apart = float(np.hypot(*(scene[found[1]][0] - scene[found[2]][0])))
        assert apart < 0.34 or apart > 0.49
        return "near" if apart < 0.34 else "far"
    if found := re.fullmatch(r"Is the (\w+) in front or behind the (\w+) \?", text):
        # Nearer objects are drawn over farther ones.
        order = list(scene)
        return "front" if order.index(found[1]) > order.index(found[2]) else "behind"
    if found := re.fullmatch(r"Is the (\w+) in between (\w+) and (\w+) \?", text):
        c, a, b = (scene[name][0].astype(float) for name in found.groups())
        share = np.dot(c - a, b - a) / np.dot(b - a, b - a)
        aside = float(np.hypot(*(a + share * (b - a) - c)))
        assert aside < 0.121 or aside > 0.299 or not -0.09 < share < 1.09
        return "yes" if 0.24 < share < 0.76 and aside < 0.121 else "no"
    if found := re.fullmatch(r"Where is the (\w+) \?", text):
        x, y = column_and_row(scene[found[1]][0])
        return "ABCD"[x] + "1234"[y]
    if found := re.fullmatch(r"Is there a (\w+) \?", text):
        assert found[1] in OBJECTS
        return "yes" if found[1] in scene else "no"
    found = re.fullmatch(r"What color is the (\w+) \?|color of the (\w+)", text)
    assert found, text
    return scene[found[1] or found[2]][1]


def last_of_text(tokens: np.ndarray, labels: np.ndarray) -> int:
    """Index of the last token of a text, which its answer follows: the colon of the closing, or all of a caption."""
    asked = int(np.flatnonzero(labels >= 0)[-1])
    return asked - 1 if labels[asked] == WORDS.index("</s>") else asked


def said(label: int) -> str:
    """The word that a label asks for; of a distribution, its most probable words."""
    (words,) = np.nonzero(TARGETS[label] > 0.999 * TARGETS[label].max())
    return "".join(WORDS[index] for index in words)


def test_every_label_is_true_of_its_scene(rendered: list[Scenes]) -> None:
    end = WORDS.index("</s>")
    seen: dict[str, set[str]] = {}
    shares: dict[str, list[float]] = {}
    for step, stage in enumerate(("language", "language", "binding", "language")):
        batch, plan = recipe.training_batch(7, step, 120, stage=stage), recipe.layout(stage)
        scenes = rendered[step]
        np.testing.assert_array_equal(batch.pictures, render(scenes, recipe.IMAGE_SIZE))
        assert (batch.token_ids[:, : plan.text_start] == plan.token_ids[: plan.text_start]).all()
        assert (batch.labels[:, : plan.text_start] == -1).all()
        for row, kind, own in _slots(len(batch.pictures), stage):
            tokens, labels = batch.token_ids[row, own], batch.labels[row, own]
            asked = last_of_text(tokens, labels)
            words = [index for index in range(asked) if WORDS[tokens[index]] in EXTREMES]
            placed = [index for index in words if labels[index] >= 0]
            assert placed in ([], words) and (placed == words or not kind.endswith("alone"))
            assert all(said(labels[index]) == EXTREMES[WORDS[tokens[index]]] for index in placed)
            if words:
                shares.setdefault(kind, []).append(len(placed) / len(words))
            labels[placed] = -1
            answer = said(labels[asked])
            text = " ".join(WORDS[index] for index in tokens[: asked + 1])
            question = text.endswith(" ASSISTANT :")
            assert question == kind.endswith("question") or kind == "alone"
            text = text.removesuffix(" ASSISTANT :")
            if kind.endswith("alone"):
                assert answer == true_answer_alone(text), text
            else:
                assert answer == true_answer(text, objects_of(scenes, row)), text
            form = " ".join(word for word in text.split() if word not in OBJECTS)
            seen.setdefault(form, set()).add(answer)
            if question and asked + 1 < len(tokens):
                assert WORDS[tokens[asked + 1]] == answer and labels[asked + 1] == end
                assert (np.delete(labels, [asked, asked + 1]) == -1).all()
                assert (tokens[asked + 2 :] == 0).all()
            else:
                assert (np.delete(labels, asked) == -1).all() and (tokens[asked + 1 :] == 0).all()
    assert 0.15 < np.mean(shares["long question"]) < 0.35
    assert seen["Is there a ?"] == {"yes", "no"} == seen["Is the in between and ?"]
    assert seen["column of the"] == set("ABCD") and seen["row of the"] == set("1234")
    assert seen["Is the to the left or right of the ?"] == {"left", "right"}
    assert seen["Is the above or below the ?"] == {"above", "below"}
    assert seen["Is the near or far from the ?"] == {"near", "far"}
    assert seen["Is the in front or behind the ?"] == {"front", "behind"}
    assert seen["The is above the ."] == {"true", "false"}
    assert len(seen["Where is the ?"]) == 16 and seen["What color is the ?"] == set(COLORS)


def true_answer_alone(text: str) -> str:
    """The right continuation of a text without a picture, from what it says."""
    start, said_first = recipe.BEFORE + " ", r"(\w+) : the (\w+) \. "
    assert text.startswith(start)
    text = text.removeprefix(start)
    if found := re.fullmatch(said_first + r"(column|row) of the (\w+)", text):
        assert found[2] == found[4]
        return true_answer(f"{found[3]} of what is {found[1]}", {})
    if not (found := re.fullmatch(said_first * 2 + r"(.+ \?)", text)):
        return true_answer(text, {})
    named = {"left": (0.2, 0.5), "right": (0.8, 0.5), "above": (0.5, 0.2), "below": (0.5, 0.8)}
    cells = {
        column + row: ((x + 0.5) / 4, (y + 0.5) / 4) for x, column in enumerate("ABCD") for y, row in enumerate("1234")
    }
    scene = {found[index + 1]: (np.array((named | cells)[found[index]]), "") for index in (1, 3)}
    return true_answer(found[5], scene)


def test_targets_are_linear_in_the_place() -> None:
    np.testing.assert_allclose(TARGETS.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(TARGETS[: len(WORDS), : len(WORDS)], np.eye(len(WORDS)))
    for axis, words in enumerate(("A B C D", "1 2 3 4")):
        ids = llava_texts.encode(words)
        places = (np.arange(16) + 0.5) / 16
        logs = np.log(TARGETS[[llava_texts.axis_label(axis, place) for place in places]][:, ids])
        # Log-odds of neighbouring columns fall by the same amount from place to place.
        steps = np.diff(logs[:, :-1] - logs[:, 1:], axis=0)
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-3)
        assert steps.mean() < 0
    # A cell's distribution is that of its column times that of its row, with less blur.
    center = np.array([0.3, 0.8])
    cell = TARGETS[llava_texts.cell_label(center)]
    sharp = llava_texts.targets(llava_texts.CELL_BLUR)
    column, row = (sharp[llava_texts.axis_label(axis, center[axis])] for axis in (0, 1))
    for x, y in itertools.product("ABCD", "1234"):
        both = column[WORDS.index(x)] * row[WORDS.index(y)]
        np.testing.assert_allclose(cell[WORDS.index(x + y)], both, rtol=1e-5)


def _slots(rows: int, stage: str) -> list[tuple[int, str, slice]]:
    """Row, kind and tokens of every slot of a batch."""
    kinds = recipe.SLOTS[stage]
    ends = recipe.layout(stage).text_start + np.cumsum([0, *(recipe.LENGTHS[kind] for kind in kinds)])
    own = [slice(int(first), int(end)) for first, end in itertools.pairwise(ends)]
    return [(row, kind, tokens) for row in range(rows) for kind, tokens in zip(kinds, own, strict=True)]


def test_patch_labels_name_the_nearest_object_under_each_patch() -> None:
    scenes = recipe.training_world(np.random.default_rng(2), 60).scenes
    found = recipe.patch_labels(scenes)
    assert found.shape == (60, 36, 6)
    for row, patch in np.ndindex(60, 36):
        x, y = (patch % 6 + 0.5) / 6, (patch // 6 + 0.5) / 6
        under = [
            (slot, name, center, list(COLORS).index(color))
            for slot, (name, (center, color)) in enumerate(objects_of(scenes, row).items())
            if max(abs(x - center[0]), abs(y - center[1])) < scenes.sizes[row, slot] / 2
        ]
        if not under:
            assert found[row, patch].tolist() == [0, -1, -1, -1, -1, -1]
            continue
        slot, name, center, color = under[-1]
        bins = [min(int(float(value) * 16), 15) for value in center]
        assert found[row, patch, :4].tolist() == [OBJECTS.index(name) + 1, *bins, color]
        touching = [
            other
            for other, (there, _) in enumerate(objects_of(scenes, row).values())
            if other != slot and np.abs(there - center).max() < (scenes.sizes[row, slot] + scenes.sizes[row, other]) / 2
        ]
        assert found[row, patch, 4] == (1 if max(touching, default=-1) > slot else 0 if touching else -1)
    assert 0.05 < (found[..., 0] > 0).mean() < 0.5
    shown = found[found[..., 0] > 0]
    assert set(shown[:, 4]) == {-1, 0, 1} and set(shown[:, 5]) == set(range(recipe.SIZES))


# --- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_relation_items_are_true_of_their_scenes(rendered: list[Scenes], axis: str) -> None:
    items, pictures = evaluation.relation_items(np.random.default_rng(4), 80, axis)
    (scenes,) = rendered
    assert len(items) == len(scenes) == 80
    np.testing.assert_array_equal(pictures, render(scenes, recipe.IMAGE_SIZE))
    for row, item in enumerate(items):
        assert holds_held_out(scenes, row)
        np.testing.assert_array_equal(np.asarray(item.picture), pictures[row])
        spaced = re.sub(r"\?", " ?", item.query)
        assert true_answer(spaced, objects_of(scenes, row)) == item.relation
    shares = [sum(item.relation == word for item in items) for word in evaluation.ANSWERS[axis]]
    assert min(shares) > 20 and sum(shares) == 80
    first = sum(item.subject == OBJECTS[scenes.objects[row, 0]] for row, item in enumerate(items))
    assert 20 < first < 60


def test_evaluation_asks_what_is_true(rendered: list[Scenes], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[np.ndarray, list[str], list[str]]] = []

    def note(model: Model, pictures: np.ndarray, questions: list[str], truths: list[str]) -> evaluation.Accuracy:
        asked.append((pictures, questions, truths))
        return evaluation.Accuracy(value=1.0, low=0.0, high=1.0, count=len(truths))

    monkeypatch.setattr(evaluation, "accuracy", note)
    monkeypatch.setattr(evaluation, "knows_words", lambda *_: True)
    results = evaluation.evaluate(NOBODY, count=48, seed=2)
    depths = ["depth", "depth_size", "depth_height", "depth_overlap"]
    assert list(results) == [
        *("left_right", "above_below", "where", "exists", "color", "near_far", "statement", "between"),
        *depths,
    ]
    scene_of = {
        render(scenes[[row]], recipe.IMAGE_SIZE).tobytes(): objects_of(scenes, row)
        for scenes in rendered
        for row in range(len(scenes))
    }
    for name, (pictures, questions, truths) in zip(results, asked, strict=True):
        assert len(pictures) == len(questions) == len(truths) > 36
        for picture, question, truth in zip(pictures, questions, truths, strict=True):
            assert true_answer(re.sub(r" ?([?.])", r" \1", question), scene_of[picture.tobytes()]) == truth
        assert min(truths.count(truth) for truth in set(truths)) * len(set(truths)) > 16 or name in ("where", "color")
    assert sorted(set(asked[3][2])) == ["no", "yes"] and asked[3][2].count("yes") == 24


def test_accuracy_counts_whole_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "answers", lambda *_: ["left", "right", "lef", "A1"])
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    found = evaluation.accuracy(NOBODY, pictures, ["?"] * 4, ["left", "left", "left", "A1"])
    assert (found.value, found.count) == (0.5, 4)
    assert 0.1 < found.low < 0.5 < found.high < 0.9
