"""Prompts: the same ids and pixels as Hugging Face's processor, and where every word sits."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
from families import CASES, Case
from PIL import Image

from jaxid.errors import CheckpointError, InputError, PromptError
from jaxid.inputs import Processor, Prompts
from jaxid.processing.pictures import open_picture

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
    np.testing.assert_allclose(prompts.inputs.pixels, expected["pixel_values"], atol=1e-6)
    np.testing.assert_array_equal(prompts.last(), expected["attention_mask"].sum(axis=1) - 1)
    slots = np.asarray(prompts.inputs.image_slots)
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


def test_works_without_pytorch() -> None:
    """Loading, preparing and a forward pass, where neither torch nor torchvision is installed."""
    code = f"""
import importlib.machinery
import sys
class WithoutTorch(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *place):
        return None if name.split(".")[0] in ("torch", "torchvision") else super().find_spec(name, *place)
sys.meta_path[:] = [WithoutTorch if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
import numpy as np
from jaxid.checkpoints.loading import load
from jaxid.engine import forward
model = load({str(fixtures.folder(PLAIN))!r})
picture = np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)
output = forward(model, model.prepare(picture, {ASKED!r}))
assert not {{"torch", "torchvision"}} & set(sys.modules)
print("logits", *np.asarray(output.logits)[0, :3])
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    values = [float(value) for value in run.stdout.split("logits")[1].split()]
    from jaxid.engine import forward

    model = fixtures.model(PLAIN)
    picture = np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)
    np.testing.assert_allclose(forward(model, model.prepare(picture, ASKED)).logits[0, :3], values, rtol=1e-4)


# --- where words sit ------------------------------------------------------------------------------------------------


def read(processor: Processor, prompts: Prompts, row: int, positions: Any) -> list[str]:
    ids = np.asarray(prompts.inputs.token_ids)[row, np.atleast_1d(positions)]
    return processor.tokenizer.convert_ids_to_tokens([int(index) for index in ids])


def test_word_positions(processor: Processor) -> None:
    prompts = processor.prepare(fixtures.pictures(), [ASKED, "Where is the fish?"])
    fish = prompts.word("fish")
    assert fish.shape == (2,) and fish[0] != fish[1]
    assert [read(processor, prompts, row, fish[row]) for row in range(2)] == [["fish"], ["fish"]]
    star, where = prompts.word(["star", "Where"])
    assert read(processor, prompts, 0, star) == ["star"] and read(processor, prompts, 1, where) == ["Where"]
    assert prompts.word_tokens("fish").tolist() == fish[:, None].tolist()


def test_repeated_words(processor: Processor) -> None:
    prompts = processor.prepare(None, ASKED)
    with pytest.raises(PromptError, match=r"'the' 3 times; .*occurrence=0\.\.2"):
        prompts.word("the")
    places = [int(prompts.word("the", occurrence=which)[0]) for which in range(3)]
    assert places == sorted(set(places))
    for place, following in zip(places, ("star", "left", "fish"), strict=True):
        assert read(processor, prompts, 0, [place, place + 1]) == ["the", following]
    for which in (3, -1):
        with pytest.raises(PromptError, match=f"no occurrence {which} of 'the'"):
            prompts.word("the", occurrence=which)


@pytest.mark.parametrize(
    "word", ["cat", "Star", "sta", "tar", "", "USER", "ASSISTANT", "<image>", "fish? ASSISTANT", "f.sh"]
)
def test_words_that_are_not_in_the_question(processor: Processor, word: str) -> None:
    with pytest.raises(PromptError, match=f"prompt 0 .*{re.escape(ASKED)}.*{re.escape(repr(word))}"):
        processor.prepare(fixtures.pictures()[0], ASKED).word(word)


def test_as_many_words_as_prompts(processor: Processor) -> None:
    with pytest.raises(InputError, match="3 words were given for 1 prompts"):
        processor.prepare(None, ASKED).word(["star", "fish", "left"])


@pytest.mark.parametrize("question", ["USER", "ASSISTANT", "A", "S", ":", "USER: star ASSISTANT:"])
def test_a_question_that_also_stands_in_the_template(processor: Processor, question: str) -> None:
    prompts = processor.prepare(fixtures.pictures()[0], question)
    (text,), (start, end) = prompts.texts, prompts.spans[0]
    assert text[start:end] == question
    assert text[:start].endswith("<image>\n") and text[end:] == " ASSISTANT:"
    assert processor.prepare(None, question, chat=False).texts[0].endswith(f"USER: {question}")


def test_text_tokens_and_the_last(processor: Processor) -> None:
    prompts = processor.prepare(fixtures.pictures(), [ASKED, "Where is the fish?"])
    text = prompts.text_tokens()
    assert read(processor, prompts, 0, text[0]) == [*ASKED[:-1].split(), "?", "ASSISTANT", ":"]
    assert read(processor, prompts, 1, text[1][:7]) == ["Where", "is", "the", "fish", "?", "ASSISTANT", ":"]
    assert set(text[1][6:]) == {prompts.last()[1]}
    bare = processor.prepare(fixtures.pictures(), [ASKED, "Where is the fish?"], chat=False)
    assert [read(processor, bare, row, bare.last()[row]) for row in range(2)] == [["?"], ["?"]]
    assert processor.prepare(None, "star").text_tokens()[0, 0] == 0
    with pytest.raises(PromptError, match="picture tokens"):
        processor.prepare(None, "star").image_tokens()


def test_padding(processor: Processor) -> None:
    short = processor.prepare(fixtures.pictures()[0], "star", pad_to_multiple=1)
    long = processor.prepare(fixtures.pictures()[0], "star", pad_to_multiple=64)
    tokens = short.inputs.token_ids.shape[1]
    assert long.inputs.token_ids.shape == (1, 64) and np.asarray(short.inputs.valid).all()
    assert (long.inputs.token_ids[:, tokens:] == 3).all() and (long.inputs.image_slots[:, tokens:] == -1).all()
    np.testing.assert_array_equal(long.inputs.token_ids[:, :tokens], short.inputs.token_ids)
    np.testing.assert_array_equal(short.last(), long.last())


# --- tokenizers of sub-words ----------------------------------------------------------------------------------------

SENTENCES = [
    "Is the star to the left or right of the fish? left right",
    "The starfish is near the anchor, below the hourglass. The star is left, the fish is right.",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]


def bytes_tokenizer() -> Any:
    """As in Llama 3 and Qwen: bytes, a space belongs to the word behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, min_frequency=2, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def sentencepiece_tokenizer() -> Any:
    """As in Llama 2, LLaVA-1.5's: spaces are a letter, unknown letters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, min_frequency=2, special_tokens=SPECIAL + single_bytes, show_progress=False
        ),
    )
    # The published files hold no pre-tokenizer: the normalizer writes the spaces' letter.
    fields = json.loads(tokenizer.to_str())
    fields["pre_tokenizer"] = None
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="module", params=[bytes_tokenizer, sentencepiece_tokenizer])
def subword(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("subword") / "model"
    shutil.copytree(fixtures.folder(PLAIN), folder)
    request.param().save(str(folder / "tokenizer.json"))
    return Processor.from_folder(folder, fixtures.model(PLAIN).config)


def test_sub_tokens_of_a_word(subword: Processor) -> None:
    question = "Is the starfish, a fish, near the star or the hourglasses in the café's naïve fish?"
    prompts = subword.prepare(fixtures.pictures()[0], question)
    text = prompts.texts[0]
    for word, occurrence, after in (
        ("star", None, " or"),
        ("starfish", None, ", a"),
        ("fish", 0, ", near"),
        ("fish", 1, "?"),
        ("hourglasses", None, " in"),
        ("café", None, "'s"),
        ("naïve", None, " fish"),
        ("Is", None, " the starfish"),
    ):
        tokens = prompts.word_tokens(word, occurrence=occurrence)[0]
        np.testing.assert_array_equal(tokens, np.arange(tokens[0], tokens[-1] + 1))
        pieces = [subword.tokenizer.decode([int(prompts.inputs.token_ids[0, token])]) for token in tokens]
        whole = subword.tokenizer.decode([int(prompts.inputs.token_ids[0, token]) for token in tokens])
        assert whole.strip() == word, (pieces, word)
        assert prompts.word(word, occurrence=occurrence)[0] == tokens[-1]
        end = prompts.offsets[0, tokens[-1], 1]
        assert text[:end].endswith(word) and text[end:].startswith(after)
    assert len(prompts.word_tokens("hourglasses")[0]) > 1 and len(prompts.word_tokens("naïve")[0]) > 2
    np.testing.assert_array_equal(np.diff(prompts.image_tokens()), 1)
    assert prompts.image_tokens().shape == (1, 16)


def test_shorter_words_are_filled_up_with_their_last_token(subword: Processor) -> None:
    prompts = subword.prepare(None, ["Is the star near?", "Is the hourglasses near?"])
    rows = prompts.word_tokens(["star", "hourglasses"])
    alone = subword.prepare(None, "Is the star near?").word_tokens("star")[0]
    assert rows.shape[1] > len(alone)
    assert rows[0].tolist() == [*alone, *[alone[-1]] * (rows.shape[1] - len(alone))]
    np.testing.assert_array_equal(prompts.word(["star", "hourglasses"]), rows[:, -1])


def test_answers_of_several_tokens_are_refused(subword: Processor) -> None:
    left, right = subword.answer_ids(["left", "right"]).tolist()
    assert subword.decode([left]) == "left" and subword.decode([right]) == "right"
    with pytest.raises(PromptError, match="'hourglasses' is not a single token"):
        subword.answer_ids(["left", "hourglasses"])


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers(processor: Processor) -> None:
    ids = processor.answer_ids(["left", "right", "yes"])
    assert processor.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["left", "right", "yes"]
    assert processor.decode([1, *ids.tolist(), 2]) == "left right yes"
    for words, named in (
        (["left", "elephant"], "'elephant' is not in the model's vocabulary"),
        (["left", "to the left"], "'to the left' is not a single token"),
        (["left", ""], "'' is not a single token"),
        (["left", "left"], "left, left do not have tokens of their own"),
    ):
        with pytest.raises(PromptError, match=re.escape(named)):
            processor.answer_ids(words)


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
    np.testing.assert_array_equal(np.asarray(shared.inputs.image_slots).max(axis=1), [15, 15, 15])


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
        np.zeros((8, 8), np.uint8),
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


def changed_template(template: str) -> Processor:
    whole = fixtures.model(PLAIN).processor
    tokenizer = type(whole.tokenizer).from_pretrained(fixtures.folder(PLAIN))
    tokenizer.chat_template = template
    return Processor(tokenizer, whole.image_processor, image_token_id=4, image_tokens=16)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("USER: {{ messages[0]['content'][-1]['text'] }} ASSISTANT:", "prompt 0 holds 0 picture tokens instead of 16"),
        ("<image><image>{{ messages[0]['content'][-1]['text'] }}", "prompt 0 holds 32 picture tokens instead of 16"),
        ("<image>{{ messages[0]['content'][-1]['text'] | upper }}", "the chat template changes the question 'star'"),
        ("<image>", "the chat template changes the question 'star'"),
    ],
)
def test_templates_that_do_not_fit(template: str, named: str) -> None:
    with pytest.raises(PromptError, match=named):
        changed_template(template).prepare(fixtures.pictures()[0], "star")


def test_a_tokenizer_without_the_image_token() -> None:
    config = dataclasses.replace(fixtures.model(PLAIN).config, image_token_index=777)
    with pytest.raises(CheckpointError, match="777"):
        Processor.from_folder(fixtures.folder(PLAIN), config)


@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_word_is_refused(blank: str) -> None:
    with pytest.raises(PromptError, match="does not hold the word"):
        fixtures.prompts(CASES[0]).word(blank)
