"""The published prompts: their exact texts, the tokens that Hugging Face's processors make of them, their answers."""

import dataclasses
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
import torch
from families import CASES, EACH, EVERY, Case
from processors import bytes_tokenizer, metaspace_tokenizer, processor_of, sentencepiece_tokenizer

from jaxid import zoo
from jaxid.checkpoints.loading import load
from jaxid.errors import InputError, PromptError
from jaxid.experiments import published, relations
from jaxid.experiments.activation_swap import AttributeSwap, MirrorSwap
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.depth import QUESTIONS, Depth
from jaxid.experiments.deviation import Deviation
from jaxid.experiments.occlusion import Occlusion
from jaxid.experiments.reference import with_bugs
from jaxid.experiments.relations import RelationBatch
from jaxid.experiments.steer_picture import SteerPicture
from jaxid.experiments.steering import KINDS, Steer
from jaxid.experiments.temporal import TemporalSteer, TemporalSwap, earlier_or_later
from jaxid.interp.forward import forward

LEFT_RIGHT = "Is the cup to the left or right of the dog?"
ABOVE_BELOW = "Is the cup above or below the dog?"
RAW = "<image>\nQUESTION: {query}Answer {first} or {second}. ANSWER: "
"""As the published scripts write it, one space at the end."""

TEXTS = [
    (BeliefSwap, LEFT_RIGHT, ("left", "right"), f'{LEFT_RIGHT} Answer "left" or "right" only.'),
    (BeliefSwap, ABOVE_BELOW, ("above", "below"), f'{ABOVE_BELOW} Answer "above" or "below" only.'),
    (MirrorSwap, LEFT_RIGHT, ("left", "right"), f"<image>\nQUESTION: {LEFT_RIGHT}Answer left or right. ANSWER: "),
    (AttributeSwap, LEFT_RIGHT, ("left", "right"), f"<image>\nQUESTION: {LEFT_RIGHT}Answer left or right. ANSWER: "),
    (Steer, LEFT_RIGHT, ("left", "right"), f"<image>\nQUESTION: {LEFT_RIGHT}Answer Left or Right. ANSWER: "),
    (
        Steer,
        KINDS["near-far"].text.format("cup", "dog"),
        KINDS["near-far"].answers,
        "<image>\nQUESTION: Is the cup near or far from the dog?Answer Near or Far. ANSWER: ",
    ),
    (
        Steer,
        KINDS["between"].text.format("cup", "dog", "cat"),
        KINDS["between"].answers,
        "<image>\nQUESTION: Is the cup in between dog and cat?Answer Yes or No. ANSWER: ",
    ),
    (SteerPicture, LEFT_RIGHT, ("left", "right"), f"<image>\nQUESTION: {LEFT_RIGHT}Answer left or right. ANSWER: "),
    (Depth, ABOVE_BELOW, ("above", "below"), f"<image>\nQUESTION: {ABOVE_BELOW} Answer Above or Below. ANSWER: "),
    (
        Depth,
        QUESTIONS["depth"].text.format("cup", "dog"),
        QUESTIONS["depth"].answers,
        "<image>\nQUESTION: Is the cup in front or behind the dog? Answer Front or Behind. ANSWER: ",
    ),
    (Deviation, LEFT_RIGHT, ("left", "right"), f"{LEFT_RIGHT} Answer left or right only."),
    (Occlusion, LEFT_RIGHT, ("left", "right"), f"{LEFT_RIGHT} Answer Left or Right."),
    (
        TemporalSteer,
        "Is it before or after the cup?",
        ("before", "after"),
        "Is it before or after the cup? Answer in one word.",
    ),
]


@pytest.mark.parametrize(
    ("kind", "query", "answers", "text"), TEXTS, ids=[f"{one[0].__name__}-{one[2][0]}" for one in TEXTS]
)
def test_texts(kind: Any, query: str, answers: tuple[str, str], text: str) -> None:
    prompt = published.resolved("published", "any", kind.published_text)
    assert published.is_raw(prompt) == text.startswith("<image>")
    assert published.fill(prompt, query, answers) == text.removeprefix("<image>")
    assert published.resolved(None, "llava-7b", kind.published_text) == prompt
    assert published.resolved(None, "tiny-llava", kind.published_text) == "{query}"
    assert published.resolved("plain", "llava-7b", kind.published_text) == "{query}"


def test_own_prompts() -> None:
    given: Any = {"out": Path("out"), "data": Path("data")}
    assert published.resolved("Now: {query}", "llava-7b", "x") == "Now: {query}"
    for bad, named in (
        ("no place", "published or plain"),
        ("{query} <image>", "at its beginning"),
        ("<image><image>{query}", "at"),
    ):
        with pytest.raises(InputError, match=named):
            MirrorSwap(**given, prompt=bad)
    assert MirrorSwap(**given, prompt="<image>{query}").prompt == "<image>{query}"


def test_the_query_of_the_temporal_swap_loses_its_spaces() -> None:
    query = "Did the person open the door before or after the person sat down?"
    assert earlier_or_later(query) == "Did the person open the doorearlier or later than person sat down?"
    assert TemporalSwap.published_text == "{query} Answer in one word."


# --- without the chat template ---------------------------------------------------------------------------------------


def raw_batch(
    model: Any, query: str = LEFT_RIGHT, *, names: tuple[str, str] = ("star", "fish"), case: Any = "both"
) -> RelationBatch:
    query = query.replace("cup", names[0]).replace("dog", names[1])
    return relations.prepare_questions(
        model,
        [fixtures.pictures()[0]],
        [published.fill(RAW, query, ("left", "right"))],
        [names],
        axis="horizontal",
        answers=("left", "right"),
        truth=[0],
        case=case,
        raw=True,
    )


@pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")
@pytest.mark.parametrize(
    "case", [*CASES, *(case for case in EVERY if case.name == "mllama")], ids=lambda case: case.name
)
def test_tokens_are_hugging_faces(case: Case) -> None:
    from transformers import AutoProcessor

    theirs, model = AutoProcessor.from_pretrained(fixtures.folder(case)), fixtures.model(case)
    text = RAW.format(query="Is the star to the left or right of the fish?", first="left", second="right")
    expected = theirs(
        text=text.replace("<image>", theirs.image_token), images=fixtures.pictures()[0], return_tensors="np"
    )["input_ids"][0]
    prompts = raw_batch(model).prompts
    assert prompts.raw and prompts.last()[0] == len(expected) - 1
    np.testing.assert_array_equal(prompts.inputs.token_ids[0, : len(expected)], expected)
    again = model.prepare(fixtures.pictures()[:1], list(prompts.questions), raw=True)
    np.testing.assert_array_equal(again.inputs.token_ids, prompts.inputs.token_ids)


@pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")
@pytest.mark.parametrize(
    "case", [case for case in EVERY if case.name in EACH and not case.clips], ids=lambda case: case.name
)
def test_pictures_stand_as_in_the_chat_template(case: Case) -> None:
    model = fixtures.model(case)
    raw, chat = raw_batch(model).prompts, model.prepare(fixtures.pictures()[0], "Is the star left?")
    picture = raw.texts[0][: raw.spans[0, 0]]
    assert raw.texts[0].endswith("right. ANSWER: ") and raw.questions[0].startswith("\nQUESTION: ")
    if case.name == "mllama":  # Hugging Face's processor begins the text anew after the picture
        picture = picture.removesuffix(model.processor.tokenizer.bos_token)
    start, end = ("<|vision_start|>", "<|vision_end|>") if case.name.startswith("qwen") else ("", "")
    assert picture in chat.texts[0] and (raw.image_tokens() >= 0).all()
    assert picture.startswith(start) and picture.endswith(end) and ("vision_start" in chat.texts[0]) == bool(start)
    # Values, too: what PyTorch computes for the same tokens.
    output = forward(model, raw)
    answers = [model.processor.tokenizer.convert_tokens_to_ids(word) for word in ("left", "right")]
    logits = torch.tensor(fixtures.record(case, raw)["logits"][0, raw.last()[0]])
    expected = torch.log_softmax(logits, dim=-1)[answers].numpy()
    np.testing.assert_allclose(output.logprobs(np.array(answers, np.int32))[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "space"), [(bytes_tokenizer, "Ġ"), (sentencepiece_tokenizer, "▁"), (metaspace_tokenizer, "▁")]
)
def test_the_space_at_the_end_is_a_token_where_answers_are_read(build: Any, space: str) -> None:
    processor = processor_of(build)
    prompts = processor.prepare(
        [fixtures.pictures()[0]], [published.fill(RAW, "Is the star left?", ("left", "right"))], raw=True
    )
    last = int(prompts.inputs.token_ids[0, prompts.last()[0]])
    assert processor.tokenizer.convert_ids_to_tokens(last) == space
    stripped = processor.prepare([fixtures.pictures()[0]], [prompts.questions[0].rstrip()], raw=True)
    assert stripped.last()[0] == prompts.last()[0] - 1
    # Both what joins the space with the word, and the word that follows the space, are answers.
    forms = relations.answer_forms(processor, ("left", "right"), "lower", prompts.questions[0])
    found = [processor.tokenizer.convert_ids_to_tokens(form.tolist()) for form in forms]
    assert found == [[f"{space}left", f"{space}right"], ["left", "right"]]
    # The published code reads one, as after the chat template.
    (form,) = relations.answer_forms(processor, ("left", "right"), "published", prompts.questions[0])
    assert form.tolist() == processor.answer_ids(("left", "right")).tolist()


def test_tiny_llava_answers_as_in_pytorch() -> None:
    """The whole way: a published prompt through the shipped model, and through Hugging Face's classes."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = zoo.folder("tiny-llava")
    theirs, network = AutoProcessor.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder)
    text = RAW.format(query="Is the star to the left or right of the fish?", first="left", second="right")
    batch = raw_batch(load("tiny-llava"))
    inputs = theirs(text=text, images=fixtures.pictures()[0], return_tensors="pt")
    with torch.no_grad():
        logits = network.eval()(**inputs).logits[0, -1]
    ids = theirs.tokenizer.convert_tokens_to_ids(["left", "right"])
    expected = torch.log_softmax(logits, dim=-1)[ids].numpy()
    np.testing.assert_allclose(batch.read(forward(load("tiny-llava"), batch.prompts))[0], expected, atol=1e-3)


# --- the answers that the published code reads -----------------------------------------------------------------------


def test_published_answers_by_family(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = processor_of(bytes_tokenizer)
    read = []
    monkeypatch.setattr(
        processor, "answer_ids", lambda words, **_: read.append(list(words)) or np.arange(2) + len(read)
    )
    for case, forms in (
        ("capital", [["Left", "Right"]]),
        ("both", [["left", "right"], ["Left", "Right"]]),
        ("lower", [["left", "right"]]),
    ):
        monkeypatch.setattr(processor, "case", case)
        read.clear()
        relations.answer_forms(processor, ("left", "right"), "published")
        assert read == forms
    cases = {case.name: fixtures.model(case).processor.case for case in EVERY if case.name in EACH}
    assert cases["llava-plain"] == "capital" and cases["mllama"] == "both"
    assert {case for name, case in cases.items() if name not in ("llava-plain", "mllama")} == {"lower"}


def test_of_two_published_forms_the_more_probable_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fixtures.model(oracle.CASE), oracle.batch("vertical")
    output, forms = forward(model, batch.prompts), [np.array([6, 9], np.int32), np.array([7, 8], np.int32)]
    monkeypatch.setattr(relations, "answer_forms", lambda *_: forms)
    parts = np.stack([output.logprobs(form) for form in forms])
    read = {case: dataclasses.replace(batch, case=case).read(output) for case in ("published", "both")}
    np.testing.assert_array_equal(read["published"], parts.max(axis=0))
    np.testing.assert_allclose(read["both"], np.logaddexp(*parts), rtol=1e-6)


def test_fixed_tokens_are_read_with_the_published_temporal_prompts() -> None:
    given: Any = {"out": Path("out"), "data": Path("data")}
    swap, steer = TemporalSwap(**given), TemporalSteer(**given, ids=Path("ids.safetensors"))
    model = fixtures.model(oracle.CASE)
    config = dataclasses.replace(model.config.text_config, vocab_size=152_064)
    large = dataclasses.replace(model, config=dataclasses.replace(model.config, text_config=config))
    assert with_bugs(swap).answer_ids_of(large) == (24885, 46893)
    assert with_bugs(steer).answer_ids_of(large) == (10227, 6025)
    assert with_bugs(swap).answer_ids_of(model) is None is swap.answer_ids_of(large)
    batch = dataclasses.replace(oracle.batch("vertical"), answer_ids=(3, 5))
    output = forward(model, batch.prompts)
    np.testing.assert_array_equal(batch.read(output), output.logprobs(np.array([3, 5], np.int32)))


def test_an_answer_that_no_form_spells() -> None:
    with pytest.raises(PromptError, match="elephant"):
        relations.answer_forms(processor_of(bytes_tokenizer), ("elephant", "left"), "both", "ANSWER: ")
