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
from jaxid.zoo import evaluation
from jaxid.zoo import tiny_llava as recipe
from jaxid.zoo.export import write_processor, write_tokenizer
from jaxid.zoo.sampling import normalize

WORDS = recipe.VOCABULARY

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
    assert WORDS[recipe.config().image_token_index] == "<image>"


def test_every_word_is_one_token_of_the_exported_tokenizer(processor: Processor) -> None:
    start = WORDS.index("<s>")
    for index, word in enumerate(WORDS):
        assert processor.tokenizer(word)["input_ids"] == [start, index], word
        assert recipe.encode(word) == [index]
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
    expected = [*plan.token_ids[: plan.text_start], *recipe.encode(f"{spaced} ASSISTANT :")]
    assert np.asarray(prompts.inputs.token_ids)[0, :length].tolist() == expected
    assert np.asarray(prompts.inputs.image_rows)[0, : plan.text_start].tolist() == [
        -1,
        -1,
        -1,
        *range(plan.image_tokens),
    ]
    # The first question slot has the same positions as the question of a separate prompt.
    first = plan.text_start + recipe.CAPTIONS * recipe.CAPTION_LENGTH
    own = np.asarray(prompts.inputs.positions)[0, plan.text_start : plan.text_start + recipe.QUESTION_LENGTH]
    assert plan.positions[first : first + recipe.QUESTION_LENGTH].tolist()[: len(own)] == own.tolist()


def test_captions_are_prompts_without_chat(processor: Processor) -> None:
    picture = np.zeros((recipe.IMAGE_SIZE, recipe.IMAGE_SIZE, 3), np.uint8)
    prompts = processor.prepare(picture, "column of the star", chat=False)
    length = int(prompts.last()[0]) + 1
    expected = [*recipe.layout().token_ids[: recipe.layout().text_start], *recipe.encode("column of the star")]
    assert np.asarray(prompts.inputs.token_ids)[0, :length].tolist() == expected


def test_normalize_is_the_shipped_image_processor(processor: Processor) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, recipe.IMAGE_SIZE, recipe.IMAGE_SIZE, 3), np.uint8)
    pictures[0] = np.arange(256, dtype=np.uint8)[np.arange(pictures[0].size) % 256].reshape(pictures[0].shape)
    np.testing.assert_allclose(normalize(pictures), processor.pixels(list(pictures)), atol=1e-6)


# --- packed prompts ------------------------------------------------------------------------------------------------


def test_layout_by_hand() -> None:
    plan = recipe.layout()
    prefix = [WORDS.index(word) for word in ["<s>", "USER", ":"]] + [WORDS.index("<image>")] * 36
    assert plan.text_start == len(prefix) == 39
    assert plan.token_ids[:39].tolist() == prefix
    assert (plan.image_start, plan.image_tokens) == (3, 36)
    slot_of = [-1] * 39 + [number for number, length in enumerate([4] * 6 + [16] * 2 + [25]) for _ in range(length)]
    assert len(plan.token_ids) == len(slot_of) == 39 + 24 + 32 + 25
    assert (plan.token_ids[39:] == 0).all()
    for token, slot in enumerate(slot_of):
        earlier = sum(other == slot for other in slot_of[:token])
        assert plan.positions[token] == (token if slot == -1 else 39 + earlier)
        # A token attends to the prefix, to earlier tokens of its own slot, and to itself.
        seen = {other for other in range(token + 1) if slot_of[other] in (-1, slot)}
        assert set(np.flatnonzero(plan.reads().mask()[0, token]).tolist()) == seen


def test_every_text_fits_its_slot() -> None:
    relations = ["Is the a to the left or right of the a ?", "Is the a above or below the a ?"]
    others = ["Where is the a ?", "Is there a a ?", "What color is the a ?"]
    for text in [*relations, *others]:
        assert len(recipe.encode(f"{text} ASSISTANT :")) <= recipe.QUESTION_LENGTH
    longest = f'{relations[0]} Answer " left " or " right " only . ASSISTANT :'
    assert len(recipe.encode(longest)) <= recipe.LONG_LENGTH
    assert len(recipe.encode("column of the a")) == recipe.CAPTION_LENGTH


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
    scenes = concatenate([*rendered, recipe.training_scenes(np.random.default_rng(0), 800)])
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
    scenes = recipe.training_scenes(np.random.default_rng(1), 40)
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


def true_answer(text: str, scene: dict[str, tuple[np.ndarray, str]]) -> str:
    """The right answer to a training text, read from the scene; fails where there is no clear one."""
    if found := re.fullmatch(r"(column|row) of the (\w+)", text):
        x, y = column_and_row(scene[found[2]][0])
        return "ABCD"[x] if found[1] == "column" else "1234"[y]
    if found := re.fullmatch(
        r"Is the (\w+) to the left or right of the (\w+) \?( Answer \" left \" or \" right \" only \.)?", text
    ):
        gap = float(scene[found[1]][0][0] - scene[found[2]][0][0])
        assert abs(gap) >= recipe.MIN_GAP - 1e-6
        return "left" if gap < 0 else "right"
    if found := re.fullmatch(
        r"Is the (\w+) above or below the (\w+) \?( Answer \" above \" or \" below \" only \.)?", text
    ):
        gap = float(scene[found[1]][0][1] - scene[found[2]][0][1])
        assert abs(gap) >= recipe.MIN_GAP - 1e-6
        return "above" if gap < 0 else "below"
    if found := re.fullmatch(r"Where is the (\w+) \?", text):
        x, y = column_and_row(scene[found[1]][0])
        return "ABCD"[x] + "1234"[y]
    if found := re.fullmatch(r"Is there a (\w+) \?", text):
        assert found[1] in OBJECTS
        return "yes" if found[1] in scene else "no"
    found = re.fullmatch(r"What color is the (\w+) \?", text)
    assert found, text
    return scene[found[1]][1]


def test_every_label_is_true_of_its_scene(rendered: list[Scenes]) -> None:
    end, plan = WORDS.index("</s>"), recipe.layout()
    seen: dict[str, set[str]] = {}
    for step in range(2):
        batch = recipe.training_batch(7, step, 64)
        scenes = rendered[step]
        np.testing.assert_array_equal(batch.pictures, render(scenes, recipe.IMAGE_SIZE))
        assert (batch.token_ids[:, : plan.text_start] == plan.token_ids[: plan.text_start]).all()
        assert (batch.labels[:, : plan.text_start] == -1).all()
        for row, place, length in _slots(len(batch.pictures)):
            tokens, labels = batch.token_ids[row, place : place + length], batch.labels[row, place : place + length]
            asked = int(np.argmax(labels >= 0))
            answer = WORDS[labels[asked]]
            text = " ".join(WORDS[index] for index in tokens[: asked + 1])
            caption = length == recipe.CAPTION_LENGTH
            assert caption == (not text.endswith(" ASSISTANT :"))
            text = text.removesuffix(" ASSISTANT :")
            assert answer == true_answer(text, objects_of(scenes, row)), text
            kind = " ".join(word for word in text.split() if word not in OBJECTS)
            seen.setdefault(kind, set()).add(answer)
            if caption or asked + 1 == length:
                assert asked == length - 1
                assert (labels[:-1] == -1).all()
            else:
                assert tokens[asked + 1] == labels[asked] and labels[asked + 1] == end
                assert (np.delete(labels, [asked, asked + 1]) == -1).all()
                assert (tokens[asked + 2 :] == 0).all()
    assert len(seen) == 9, sorted(seen)
    assert seen["Is there a ?"] == {"yes", "no"}
    assert seen["column of the"] == set("ABCD") and seen["row of the"] == set("1234")
    assert all({"left", "right"} == answers for kind, answers in seen.items() if "left" in kind)
    assert all({"above", "below"} == answers for kind, answers in seen.items() if "above" in kind)
    assert len(seen["Where is the ?"]) == 16 and seen["What color is the ?"] == set(COLORS)


def _slots(rows: int) -> list[tuple[int, int, int]]:
    """Row, first token and length of every slot of a batch."""
    starts = recipe.layout().text_start + np.cumsum([0, *recipe.SLOTS[:-1]])
    return [
        (row, int(start), length) for row in range(rows) for start, length in zip(starts, recipe.SLOTS, strict=True)
    ]


def test_patch_labels_name_the_object_under_each_patch() -> None:
    scenes = recipe.training_scenes(np.random.default_rng(2), 60)
    found = recipe.patch_labels(scenes)
    assert found.shape == (60, 36, 4)
    for row, patch in np.ndindex(60, 36):
        x, y = (patch % 6 + 0.5) / 6, (patch // 6 + 0.5) / 6
        under = [
            (name, center, list(COLORS).index(color))
            for slot, (name, (center, color)) in enumerate(objects_of(scenes, row).items())
            if max(abs(x - center[0]), abs(y - center[1])) < scenes.sizes[row, slot] / 2
        ]
        assert len(under) <= 1
        if under:
            ((name, center, color),) = under
            assert found[row, patch].tolist() == [OBJECTS.index(name) + 1, *column_and_row(center), color]
        else:
            assert found[row, patch].tolist() == [0, -1, -1, -1]
    assert 0.05 < (found[..., 0] > 0).mean() < 0.5


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
    results = evaluation.evaluate(NOBODY, count=48, seed=2)
    assert list(results) == ["left_right", "above_below", "where", "exists", "color"]
    scene_of = {
        render(scenes[[row]], recipe.IMAGE_SIZE).tobytes(): objects_of(scenes, row)
        for scenes in rendered
        for row in range(len(scenes))
    }
    for name, (pictures, questions, truths) in zip(results, asked, strict=True):
        assert len(pictures) == len(questions) == len(truths) > 40
        for picture, question, truth in zip(pictures, questions, truths, strict=True):
            assert true_answer(question.replace("?", " ?"), scene_of[picture.tobytes()]) == truth
        assert min(truths.count(truth) for truth in set(truths)) * len(set(truths)) > 20 or name in ("where", "color")
    assert sorted(set(asked[3][2])) == ["no", "yes"] and asked[3][2].count("yes") == 24


def test_accuracy_counts_whole_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "answers", lambda *_: ["left", "right", "lef", "A1"])
    pictures = np.zeros((4, 2, 2, 3), np.uint8)
    found = evaluation.accuracy(NOBODY, pictures, ["?"] * 4, ["left", "left", "left", "A1"])
    assert (found.value, found.count) == (0.5, 4)
    assert 0.1 < found.low < 0.5 < found.high < 0.9
