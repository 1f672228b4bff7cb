"""Prompts: the same ids and pixels as Hugging Face's processor; one or several pictures; what cannot be."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
from families import CASES, Case
from PIL import Image
from processors import read, with_template

from jaxid.errors import CheckpointError, InputError, PromptError
from jaxid.families.llava import LlavaProcessor
from jaxid.prompts.pictures import Clip, open_picture
from jaxid.prompts.processor import Processor, Prompts

FULL, PLAIN = CASES[1], CASES[0]
ASKED = "Is the star to the left or right of the fish?"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return fixtures.model(PLAIN).processor


# --- the same as Hugging Face ---------------------------------------------------------------------------------------


def modes() -> list[Image.Image]:
    """Colour, grey, with transparency, with a palette: each of another size."""
    colour = Image.fromarray(fixtures.pictures()[0])
    alpha = colour.resize((33, 57)).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    return [colour, colour.resize((32, 32)).convert("L"), alpha, colour.resize((90, 20)).convert("P")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ids_and_pixels_are_hugging_faces(case: Case) -> None:
    from transformers import AutoProcessor

    theirs = AutoProcessor.from_pretrained(fixtures.folder(case))
    assert type(theirs).__name__ == "LlavaProcessor"
    pictures, questions = modes(), [ASKED, "Where is the fish?", "yes", "Is the cat above the star, or below the star?"]
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in questions
    ]
    texts = [theirs.apply_chat_template(talk, add_generation_prompt=True) for talk in conversations]
    expected = theirs(text=texts, images=pictures, return_tensors="np", padding=True, padding_side="right")
    prompts = fixtures.model(case).prepare(pictures, questions)
    length = expected["input_ids"].shape[1]
    assert prompts.inputs.token_ids.shape[1] % 8 == 0 and 0 <= prompts.inputs.token_ids.shape[1] - length < 8
    np.testing.assert_array_equal(prompts.inputs.token_ids[:, :length], expected["input_ids"])
    np.testing.assert_array_equal(prompts.inputs.valid[:, :length], expected["attention_mask"].astype(bool))
    assert not prompts.inputs.valid[:, length:].any()
    np.testing.assert_allclose(np.asarray(prompts.inputs.pixels), expected["pixel_values"], atol=1e-6)
    np.testing.assert_array_equal(prompts.last(), expected["attention_mask"].sum(axis=1) - 1)
    slots = np.asarray(prompts.inputs.image_rows)
    tokens = fixtures.model(case).config.image_tokens
    assert tokens == (10 if case is FULL else 16)
    np.testing.assert_array_equal(slots[slots >= 0], np.arange(4 * tokens))
    np.testing.assert_array_equal(prompts.image_tokens(), np.nonzero(expected["input_ids"] == 4)[1].reshape(4, tokens))


def test_paths_images_and_arrays_are_the_same_picture(processor: Processor, tmp_path: Path) -> None:
    array = fixtures.pictures()[0]
    Image.fromarray(array).save(tmp_path / "one.png")
    forms = [array, Image.fromarray(array), tmp_path / "one.png", str(tmp_path / "one.png")]
    pixels = processor.pixels(forms)
    assert pixels.dtype == np.float32 and pixels.std() > 0.1
    for other in pixels[1:]:
        np.testing.assert_array_equal(pixels[0], other)
    batch = np.stack([array, array[::-1]])
    np.testing.assert_array_equal(
        processor.prepare(batch, "star").inputs.pixels, processor.prepare(list(batch), "star").inputs.pixels
    )


def squares(*numbers: int) -> list[np.ndarray]:
    """Pictures told apart by their grey."""
    return [np.full((40, 40, 3), 20 * number, np.uint8) for number in numbers]


def greys(prompts: Prompts) -> list[int]:
    """The numbers of the pictures in `pixels`, in order."""
    middle = np.asarray(prompts.inputs.pixels)[:, 0, 16, 16]
    alone = fixtures.model(PLAIN).processor.pixels(squares(*range(13)))[:, 0, 16, 16]
    return [int(np.abs(alone - grey).argmin()) for grey in middle]


def test_several_pictures_are_hugging_faces() -> None:
    from transformers import AutoProcessor

    theirs = AutoProcessor.from_pretrained(fixtures.folder(PLAIN))
    groups, questions = [squares(1, 2), squares(3, 4, 5)], [ASKED, "Where is the fish?"]
    content = [[{"type": "image"}] * len(some) for some in groups]
    talks = [
        [{"role": "user", "content": [*some, {"type": "text", "text": text}]}]
        for some, text in zip(content, questions, strict=True)
    ]
    texts = [theirs.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    expected = theirs(text=texts, images=groups, return_tensors="np", padding=True, padding_side="right")
    prompts = fixtures.model(PLAIN).prepare(groups, questions)
    length = expected["input_ids"].shape[1]
    np.testing.assert_array_equal(prompts.inputs.token_ids[:, :length], expected["input_ids"])
    np.testing.assert_allclose(np.asarray(prompts.inputs.pixels), expected["pixel_values"], atol=1e-6)
    assert greys(prompts) == [1, 2, 3, 4, 5]


def test_every_prompt_has_its_own_pictures_in_order(processor: Processor) -> None:
    prompts = processor.prepare([squares(1, 2), squares(3, 4)], ["star", "Where is the fish?"])
    assert greys(prompts) == [1, 2, 3, 4]
    slots = np.asarray(prompts.inputs.image_rows)
    for row, first in enumerate((0, 32)):
        np.testing.assert_array_equal(slots[row][slots[row] >= 0], np.arange(first, first + 32))
    where = prompts.image_tokens()
    assert where.shape == (2, 32)
    np.testing.assert_array_equal(np.diff(where), 1)  # this tokenizer knows no line breaks
    assert [read(processor, prompts, row, prompts.text_start()[row]) for row in range(2)] == [["star"], ["Where"]]
    for row in range(2):
        alone = processor.prepare([squares(1, 2)], prompts.questions[row])
        assert prompts.texts[row] == alone.texts[0] and prompts.texts[row].count("<image>") == 32
        assert alone.word(alone.questions[0].split()[0])[0] == prompts.word(["star", "Where"])[row]


def test_several_questions_share_several_pictures(processor: Processor) -> None:
    prompts = processor.prepare([squares(1, 2)], ["star", "fish", "cat"])
    assert len(prompts) == 3 and greys(prompts) == [1, 2]
    slots = np.asarray(prompts.inputs.image_rows)
    for row in range(3):
        np.testing.assert_array_equal(slots[row][slots[row] >= 0], np.arange(32))


def test_prompts_may_hold_different_numbers_of_pictures(processor: Processor) -> None:
    one, two = squares(1), squares(2, 3)
    prompts = processor.prepare([one[0], tuple(two), np.stack(squares(4, 5, 6))], "star")
    assert greys(prompts) == [1, 2, 3, 4, 5, 6]
    assert (np.asarray(prompts.inputs.image_rows) >= 0).sum(axis=1).tolist() == [16, 32, 48]
    with pytest.raises(PromptError, match=r"\[16, 32, 48\] picture tokens; take them in groups"):
        prompts.image_tokens()
    assert [read(processor, prompts, row, prompts.word("star")[row]) for row in range(3)] == [["star"]] * 3


def test_works_without_pytorch() -> None:
    """Loading, preparing and a forward pass, where neither torch nor torchvision is installed."""
    code = f"""{fixtures.WITHOUT_TORCH}
import numpy as np
from jaxid.checkpoints.loading import load
from jaxid.interp.forward import forward
model = load({str(fixtures.folder(PLAIN))!r})
picture = np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)
output = forward(model, model.prepare(picture, {ASKED!r}))
assert not {{"torch", "torchvision"}} & set(sys.modules)
print("logits", *np.asarray(output.logits)[0, :3])
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    values = [float(value) for value in run.stdout.split("logits")[1].split()]
    from jaxid.interp.forward import forward

    model = fixtures.model(PLAIN)
    picture = np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)
    np.testing.assert_allclose(forward(model, model.prepare(picture, ASKED)).logits[0, :3], values, rtol=1e-4)


# --- what cannot be prepared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["", "   ", "\n"])
def test_empty_question(processor: Processor, question: str) -> None:
    with pytest.raises(PromptError, match="empty"):
        processor.prepare(fixtures.pictures()[0], question)


def test_image_token_in_the_question(processor: Processor) -> None:
    with pytest.raises(PromptError, match="'<image>'"):
        processor.prepare(fixtures.pictures()[0], "Is <image> the star?")


def test_white_space_around_a_question_is_dropped(processor: Processor) -> None:
    prompts = processor.prepare(fixtures.pictures()[0], "  Where is the fish? \n")
    assert prompts.questions == ("Where is the fish?",)
    assert prompts.word("fish") == processor.prepare(fixtures.pictures()[0], "Where is the fish?").word("fish")


@pytest.mark.parametrize(
    ("pictures", "questions", "named"),
    [
        (3, 2, "3 pictures were given for 2 questions"),
        (2, 3, "2 pictures were given for 3 questions"),
        (0, 1, "no questions or no pictures"),
        (1, 0, "no questions or no pictures"),
    ],
)
def test_numbers_that_do_not_fit(processor: Processor, pictures: int, questions: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        processor.prepare(fixtures.pictures()[:1] * pictures, ["star"] * questions)


def test_one_picture_or_one_question_for_all(processor: Processor) -> None:
    first, second = fixtures.pictures()
    assert len(processor.prepare([first, second], "star")) == 2
    shared = processor.prepare(first, ["star", "fish", "cat"])
    assert len(shared) == 3 and shared.inputs.pixels is not None and shared.inputs.pixels.shape[0] == 1
    np.testing.assert_array_equal(np.asarray(shared.inputs.image_rows).max(axis=1), [15, 15, 15])


def test_pictures_that_cannot_be_opened(processor: Processor, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(fixtures.pictures()[0]).save(tmp_path / "half.png")
    data = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("missing.png", "text.png", "half.png", "empty.png", "."):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            processor.prepare([tmp_path / name], ASKED)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.int32),
        np.zeros((0, 8, 3), np.uint8),
        None,
        3,
    ],
    ids=lambda array: f"{array.dtype}{array.shape}" if isinstance(array, np.ndarray) else str(array),
)
def test_wrong_arrays(array: Any) -> None:
    given = np.asarray(array)
    with pytest.raises(InputError, match=re.escape(f"not {given.dtype} of shape {given.shape}")):
        open_picture(array)


TEXT = "{{ messages[0]['content'][-1]['text'] }}"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (f"USER: {TEXT} ASSISTANT:", "places 0 pictures as '<image>' instead of 1"),
        (f"<image><image>{TEXT}", "places 2 pictures as '<image>' instead of 1"),
        (f"{TEXT}<image>", "places 0 pictures as '<image>' instead of 1: .*before the question"),
        (f"<image>{TEXT}<image>", "prompt 0 holds 17 picture tokens instead of 16"),
        ("<image>{{ messages[0]['content'][-1]['text'] | upper }}", "the chat template changes the question 'star'"),
        ("<image>", "the chat template changes the question 'star'"),
    ],
)
def test_templates_that_do_not_fit(processor: Processor, template: str, named: str) -> None:
    with pytest.raises(PromptError, match=named):
        with_template(processor, template).prepare(fixtures.pictures()[0], "star")


@pytest.mark.parametrize(
    ("template", "pictures", "named"),
    [
        (f"<image>{TEXT}", 2, "places 1 pictures as '<image>' instead of 2"),
        (f"<image>{TEXT}", 0, "places 1 pictures as '<image>' instead of 0"),
        (f"<image>a<image>b<image>{TEXT}", 2, "places 3 pictures as '<image>' instead of 2"),
    ],
)
def test_templates_of_a_fixed_number_of_pictures(
    processor: Processor, template: str, pictures: int, named: str
) -> None:
    fixed = with_template(processor, template)
    group = [squares(*range(1, pictures + 1))] if pictures else None
    with pytest.raises(PromptError, match=named):
        fixed.prepare(group, "star")
    fitting = template.count("<image>")
    assert len(fixed.prepare([squares(*range(1, fitting + 1))], "star")) == 1


def test_rendering(processor: Processor) -> None:
    text, start = processor.render(" Where is it? ", pictures=["[one]", "[two]"])
    assert text == "USER: [one]\n[two]\nWhere is it? ASSISTANT:" and text[start:].startswith("Where is it?")
    text, start = processor.render("Where is it?", pictures=["[one]"], chat=False)
    assert (text, start) == ("USER: [one]\nWhere is it?", len("USER: [one]\n"))
    assert processor.render("USER", pictures=()) == ("USER: USER ASSISTANT:", 6)


@pytest.mark.parametrize(
    "images", [[[]], [squares(1), []], [(), squares(2)], [np.zeros((0, 8, 8, 3), np.uint8), squares(3)]]
)
def test_an_empty_list_of_pictures(processor: Processor, images: Any) -> None:
    with pytest.raises(InputError, match="empty list of pictures; give None for text alone"):
        processor.prepare(images, "star")


@pytest.mark.parametrize("wrap", [lambda clip: clip, lambda clip: [clip], lambda clip: [[clip, clip]]])
def test_clips_are_for_other_families(processor: Processor, wrap: Any) -> None:
    with pytest.raises(InputError, match="reads pictures, not clips"):
        processor.prepare(wrap(Clip(squares(1, 2))), "star")


@pytest.mark.parametrize("frames", [[], ()], ids=["list", "tuple"])
def test_a_clip_of_nothing(frames: Any) -> None:
    with pytest.raises(InputError, match="at least one frame"):
        Clip(frames)


def test_parts_that_a_processor_is_made_of(processor: Processor) -> None:
    assert isinstance(processor, LlavaProcessor) and processor.stop_ids == (2,)
    assert processor.placeholder == "<image>" and processor.image_token_id == 4
    assert LlavaProcessor(processor.tokenizer, processor.image_processor, processor.config).stop_ids == ()


def test_a_tokenizer_without_the_image_token() -> None:
    config = dataclasses.replace(fixtures.model(PLAIN).config, image_token_index=777)
    with pytest.raises(CheckpointError, match="777"):
        LlavaProcessor.from_folder(fixtures.folder(PLAIN), config)


@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_word_is_refused(blank: str) -> None:
    with pytest.raises(PromptError, match="does not hold the word"):
        fixtures.prompts(CASES[0]).word(blank)
