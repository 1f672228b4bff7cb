"""The shipped model: its size, agreement with Hugging Face's class, and accuracy on held-out scenes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import distance

import jaxid
from jaxid import zoo
from jaxid.families.base import Model
from jaxid.interp.forward import forward
from jaxid.zoo import evaluation

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def shipped() -> Model:
    return jaxid.load("tiny-llava")


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import LlavaForConditionalGeneration

    folder = zoo.folder("tiny-llava")
    return LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def asked() -> tuple[np.ndarray, list[str]]:
    """Pictures never shown in training, with questions of every kind and length."""
    items, pictures = evaluation.relation_items(np.random.default_rng(12), 6, "horizontal")
    names = [(item.subject, item.object) for item in items]
    questions = [
        items[0].query,
        items[1].query + ' Answer "left" or "right" only.',
        f"Is the {names[2][1]} above or below the {names[2][0]}?",
        f"Where is the {names[3][0]}?",
        f"Is there a {names[4][1]}?",
        f"What color is the {names[5][0]}?",
    ]
    return pictures, questions


def torch_inputs(model: Model, picture: np.ndarray, question: str) -> dict[str, torch.Tensor]:
    """One prompt without padding, for Hugging Face's model."""
    inputs = model.prepare(picture, question, pad_to_multiple=1).inputs
    ids = torch.tensor(np.asarray(inputs.token_ids)).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.tensor(np.asarray(inputs.pixels)),
    }


def test_folder_is_small() -> None:
    folder = zoo.folder("tiny-llava")
    sizes = {path.name: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 12e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(sizes)


def test_logits_equal_hugging_face(shipped: Model, reference: Any, asked: tuple[np.ndarray, list[str]]) -> None:
    pictures, questions = asked
    ours = np.asarray(forward(shipped, shipped.prepare(list(pictures), questions)).logits)
    for row, question in enumerate(questions):
        with torch.no_grad():
            theirs = reference(**torch_inputs(shipped, pictures[row], question)).logits[0, -1].numpy()
        assert distance(ours[row], theirs) < 1e-4


def test_hugging_face_generates_the_same_word_and_stops(
    shipped: Model, reference: Any, asked: tuple[np.ndarray, list[str]]
) -> None:
    pictures, questions = asked
    given = evaluation.answers(shipped, pictures, questions)
    for row, question in enumerate(questions):
        inputs = torch_inputs(shipped, pictures[row], question)
        produced = reference.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        words = shipped.processor.decode(produced.tolist()).split()
        assert words[0] == given[row]
        # Training asks for the end after every answer that leaves room for it.
        assert words == [given[row]] and len(produced) == 2


def test_evaluation_tells_unknown_words(shipped: Model) -> None:
    assert evaluation.knows_words(shipped, ["Is the star above or below the fish ?", "column of the cup"])
    assert not evaluation.knows_words(shipped, ["Is the star above or below the fish ?", "Where is the sun ?"])


@pytest.mark.slow
def test_accuracy_on_scenes_never_seen(shipped: Model) -> None:
    results = evaluation.evaluate(shipped, count=128, seed=21)
    least = {"left_right": 0.99, "above_below": 0.99, "where": 0.9, "exists": 0.95}
    for kind, share in least.items():
        assert results[kind].count > 100
        assert results[kind].value >= share, (kind, results[kind])
