"""The published scoring of dense cosine similarity maps in PyTorch ([DCSM] arXiv 2503.08723).

Straightforward code on Hugging Face's `CLIPModel` that follows the description of the procedure: every pair of a
picture and a caption has its own map, all maps of a call are in memory together, and nothing is reused between
questions. Shapes: N pictures, M captions, I image tokens, T text tokens, E joint width, W functional words.

Where the description is incomplete, this file decides: functional words beyond the last text token are skipped. The
augmentation of training pictures is not included.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel

TEXT_TOKENS = 30
"""T: captions are padded or cut to this many tokens."""

FUNCTIONAL_WORDS = ("above", "below", "left", "right", "small", "big", "not", "no", "without", "but", "absent")

Processor = Callable[..., Any]
"""Hugging Face's `CLIPProcessor`."""

Placement = Literal["replace", "insert"]
"""The published code path that puts the functional vectors into a map."""


# --- maps -----------------------------------------------------------------------------------------------------------


def tokenise(processor: Processor, captions: Sequence[str]) -> tuple[Int[Tensor, "M T"], Int[Tensor, "M T"]]:
    """Token ids of captions, padded or truncated to `TEXT_TOKENS`, and a mask that is 1 at tokens."""
    made = processor(
        text=list(captions), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    return made["input_ids"], made["attention_mask"]


def image_tokens(model: CLIPModel, pixel_values: Float[Tensor, "N C Y X"]) -> Float[Tensor, "N I E"]:
    """Unit vectors in the joint space for every token of the pictures, the class token first."""
    hidden = model.vision_model(pixel_values=pixel_values).last_hidden_state
    hidden = model.vision_model.post_layernorm(hidden)  # the class applies it to the class token alone
    return functional.normalize(model.visual_projection(hidden), dim=-1)


def text_tokens(
    model: CLIPModel, input_ids: Int[Tensor, "M T"], attention_mask: Int[Tensor, "M T"]
) -> Float[Tensor, "M T E"]:
    """Unit vectors in the joint space for every token of the captions, padding included.

    Args:
        model: the encoder.
        input_ids: token ids, from `tokenise`.
        attention_mask: 1 at tokens, 0 at padding, from `tokenise`.

    Raises:
        ValueError: if the captions do not have `TEXT_TOKENS` tokens.
    """
    if input_ids.shape[1] != TEXT_TOKENS:
        raise ValueError(
            f"captions of {input_ids.shape[1]} tokens: pad or truncate them to {TEXT_TOKENS} with `tokenise`"
        )
    hidden = model.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return functional.normalize(model.text_projection(hidden), dim=-1)  # the final norm is already applied


def maps(P: Float[Tensor, "N I E"], Q: Float[Tensor, "M T E"]) -> Float[Tensor, "N M I T"]:
    """The cosine of every image token with every text token, for all pairs of a picture and a caption.

    Args:
        P: unit vectors of the image tokens.
        Q: unit vectors of the text tokens.
    """
    return torch.einsum("nie,mte->nmit", P, Q)


# --- functional words -----------------------------------------------------------------------------------------------


def functional_vectors(count: int, I: int, generator: torch.Generator) -> Float[Tensor, "W I"]:  # noqa: E741
    """Draws the fixed vectors that represent functional words in a map.

    Args:
        count: number of words, W.
        I: number of image tokens.
        generator: source of randomness.
    """
    drawn = torch.randn(count, I, generator=generator)
    return (functional.normalize(drawn, dim=-1) + 1) / 3


def functional_places(caption: str, words: Sequence[str] = FUNCTIONAL_WORDS) -> list[tuple[int, int]]:
    """Functional words of a caption as pairs: (index in `words`, index among the caption's words).

    The caption is split at single spaces, and words have to match exactly. Only the first occurrence counts. Words come
    in the order of the vocabulary.

    Args:
        caption: the text.
        words: the functional vocabulary.
    """
    spoken = caption.split(" ")
    return [(number, spoken.index(word)) for number, word in enumerate(words) if word in spoken]


def place_functional(
    S: Float[Tensor, "N M I T"],
    captions: Sequence[str],
    vectors: Float[Tensor, "W I"],
    placement: Placement,
    words: Sequence[str] = FUNCTIONAL_WORDS,
) -> Float[Tensor, "N M I T"]:
    """Puts the vectors of functional words into the maps.

    This keeps the bugs of the published code. The index of a word in the caption is used as the index of a token,
    although the tokens begin with a start token and a word may have several tokens. "insert" shifts all later columns,
    one word after another in the order of the vocabulary, so that words inserted later shift those inserted before.

    Args:
        S: the maps.
        captions: the M texts.
        vectors: one vector for each of `words`.
        placement: "replace" overwrites the word's column; "insert" inserts a column before it and drops the last one.
        words: the functional vocabulary.
    """
    S = S.clone()
    for row, caption in enumerate(captions):
        for word, column in functional_places(caption, words):
            if column >= S.shape[-1]:
                continue
            if placement == "insert":
                S[:, row, :, column + 1 :] = S[:, row, :, column:-1].clone()
            S[:, row, :, column] = vectors[word]
    return S


# --- scorers --------------------------------------------------------------------------------------------------------


def standardise(S: Tensor) -> Tensor:
    """Shifts and scales a tensor to mean zero and (unbiased) standard deviation one over all its elements."""
    return (S - S.mean()) / S.std()


class ScorerCNN(nn.Module):
    """Scores maps with two convolutions and two linear layers.

    Args:
        I: image tokens.
        T: text tokens.
        dropout: rate during training, of whole channels after the convolutions, of numbers after the hidden layer, and
            of the score itself.
    """

    def __init__(self, I: int, T: int = TEXT_TOKENS, dropout: float = 0.0) -> None:  # noqa: E741
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(4 * I * T, 128)
        self.fc2 = nn.Linear(128, 1)
        self.channels, self.numbers = nn.Dropout2d(dropout), nn.Dropout(dropout)

    def forward(self, S: Float[Tensor, "B 1 I T"]) -> Float[Tensor, "B"]:
        """One score for each map."""
        hidden = self.channels(torch.relu(self.conv1(S)))
        hidden = self.channels(torch.relu(self.conv2(hidden)))
        hidden = self.numbers(torch.relu(self.fc1(hidden.flatten(1))))
        return self.numbers(self.fc2(hidden)).squeeze(-1)


class ScorerMLP(nn.Module):
    """The baseline scorer: linear layers only.

    Args:
        I: image tokens.
        T: text tokens.
    """

    def __init__(self, I: int, T: int = TEXT_TOKENS) -> None:  # noqa: E741
        super().__init__()
        self.fc1 = nn.Linear(I * T, 64)
        self.fc2 = nn.Linear(64, 32)
        self.fc3 = nn.Linear(32, 1)

    def forward(self, S: Float[Tensor, "B 1 I T"]) -> Float[Tensor, "B"]:
        """One score for each map."""
        hidden = torch.relu(self.fc1(S.flatten(1)))
        return self.fc3(torch.relu(self.fc2(hidden))).squeeze(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """A network that scores maps, and the functional vectors it was trained with.

    Attributes:
        network: `ScorerCNN` or `ScorerMLP`; dropout is active in its training mode.
        vectors: Float[W, I], one vector for each of `words`.
        placement: code path that puts the vectors into maps.
        words: the functional vocabulary.
    """

    network: nn.Module
    vectors: Float[Tensor, "W I"]
    placement: Placement = "replace"
    words: tuple[str, ...] = FUNCTIONAL_WORDS


def score_pairs(
    scorer: Scorer, P: Float[Tensor, "N I E"], Q: Float[Tensor, "M T E"], captions: Sequence[str]
) -> Float[Tensor, "N M"]:
    """The score of every pair of a picture and a caption; all pairs of the call are standardised together.

    Args:
        scorer: the scorer.
        P: unit vectors of the image tokens.
        Q: unit vectors of the text tokens.
        captions: the M texts of `Q`.
    """
    S = standardise(place_functional(maps(P, Q), captions, scorer.vectors, scorer.placement, scorer.words))
    pictures, texts, *sizes = S.shape
    return scorer.network(S.reshape(pictures * texts, 1, *sizes)).reshape(pictures, texts)


def set_weights(network: nn.Module, arrays: Mapping[str, Any]) -> None:
    """Gives a network weights under jaxid's names: "conv1" for its "conv1.weight", "conv1_bias" for "conv1.bias"."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            layer, kind = name.rsplit(".", 1)
            array = np.array(arrays[layer if kind == "weight" else f"{layer}_bias"])
            parameter.copy_(torch.from_numpy(array.reshape(tuple(parameter.shape))))


# --- training -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Encoded pictures and captions; caption n belongs to picture n.

    Attributes:
        images: unit vectors of the image tokens, Float[N, I, E].
        texts: unit vectors of the text tokens, Float[N, T, E].
        captions: the N texts.
    """

    images: Float[Tensor, "N I E"]
    texts: Float[Tensor, "N T E"]
    captions: tuple[str, ...]


@torch.no_grad()
def encode(model: CLIPModel, processor: Processor, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Batch:
    """Runs the frozen encoder.

    Args:
        model: the encoder.
        processor: its `CLIPProcessor`.
        pictures: N pictures; in training, all items followed by their opposites.
        captions: the texts; in training, one for each picture.
    """
    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    return Batch(
        images=image_tokens(model, pixels),
        texts=text_tokens(model, *tokenise(processor, captions)),
        captions=tuple(captions),
    )


def two_way_loss(
    scores: Float[Tensor, "N N"], picture_order: Int[Tensor, "N"], caption_order: Int[Tensor, "N"]
) -> Float[Tensor, ""]:
    """Cross-entropy over the captions of each picture plus that over the pictures of each caption, after a shuffle.

    Args:
        scores: one row per picture and one column per caption; correct pairs are on the diagonal.
        picture_order: a permutation of the rows.
        caption_order: a permutation of the columns.
    """
    shuffled = scores[picture_order][:, caption_order]
    right = torch.eye(len(scores), dtype=scores.dtype)[picture_order][:, caption_order]
    return functional.cross_entropy(shuffled, right) + functional.cross_entropy(shuffled.T, right.T)


def train_step(
    scorer: Scorer, optimiser: torch.optim.Optimizer, sets: Sequence[Sequence[Batch]], generator: torch.Generator
) -> float:
    """One step on one batch of every data set, in all its caption versions; updates the scorer's network.

    The gradients of all batches are summed and divided by the number of data sets, not of batches.

    Args:
        scorer: the scorer to train; its functional vectors are not changed.
        optimiser: Adam over the parameters of `scorer.network`.
        sets: for each data set (three, as published), one batch per caption version (two, as published).
        generator: shuffles the score matrices.

    Returns:
        The mean loss of the batches before the step, in nats.
    """
    scorer.network.train()
    optimiser.zero_grad()
    losses = []
    for batch in (version for versions in sets for version in versions):
        count = len(batch.captions)
        orders = [torch.randperm(count, generator=generator) for _ in range(2)]
        loss = two_way_loss(score_pairs(scorer, batch.images, batch.texts, batch.captions), *orders)
        loss.backward()
        losses.append(loss.item())
    for parameter in scorer.network.parameters():
        if parameter.grad is not None:
            parameter.grad /= len(sets)
    optimiser.step()
    return sum(losses) / len(losses)


# --- evaluation -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One picture and the captions to choose from, of which the first is correct.

    Attributes:
        picture: the picture.
        captions: the texts, including the prefix that the data set prescribes.
    """

    picture: Image.Image
    captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of questions whose first caption has the highest score.

    Attributes:
        maps: share by the scorer.
        cosine: share by the cosine of the pooled embeddings.
    """

    maps: float
    cosine: float


@torch.no_grad()
def pooled_cosine(
    model: CLIPModel, processor: Processor, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> Float[Tensor, "N M"]:
    """CLIP's score without its temperature: cosines of the model's pooled embeddings."""
    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    ids, mask = tokenise(processor, captions)
    made = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    return made.image_embeds @ made.text_embeds.T


@torch.no_grad()
def evaluate(model: CLIPModel, processor: Processor, scorer: Scorer, questions: Sequence[Question]) -> Accuracy:
    """Answers questions one at a time and encodes everything again for each; leaves the network in evaluation mode.

    Args:
        model: the encoder.
        processor: its `CLIPProcessor`.
        scorer: the scorer.
        questions: the questions.

    Raises:
        ValueError: if there are no questions.
    """
    if not questions:
        raise ValueError("no questions to evaluate: give at least one")
    scorer.network.eval()
    right = {"maps": 0, "cosine": 0}
    for question in questions:
        seen = encode(model, processor, [question.picture], question.captions)
        scores = score_pairs(scorer, seen.images, seen.texts, seen.captions)
        cosines = pooled_cosine(model, processor, [question.picture], question.captions)
        right["maps"] += int(scores[0].argmax() == 0)
        right["cosine"] += int(cosines[0].argmax() == 0)
    return Accuracy(**{name: count / len(questions) for name, count in right.items()})


# --- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, scorer: Scorer) -> None:
    """Writes a scorer under the published keys, without an encoder, a tokenizer or the state of an optimizer.

    Args:
        path: the file.
        scorer: the scorer, whose placement is not saved.
    """
    held = {
        "epoch": 0,
        "model_state_dict": scorer.network.state_dict(),
        "external_logic_token_embeddings": nn.Embedding.from_pretrained(scorer.vectors, freeze=False),
        "learned_lookup": None if scorer.words == FUNCTIONAL_WORDS else list(scorer.words),
    }
    torch.save(held, path)


def load_checkpoint(path: Path, placement: Placement = "replace") -> Scorer:
    """Reads a published checkpoint as the published evaluation does, with the words that it names.

    The vectors are a pickled module, so the file must be trusted.

    Args:
        path: the file.
        placement: code path that puts the vectors into maps.

    Raises:
        ValueError: if the file's number of vectors differs from the number of words.
    """
    held = torch.load(path, weights_only=False)
    parameters = held["model_state_dict"]
    words = FUNCTIONAL_WORDS if held["learned_lookup"] is None else tuple(held["learned_lookup"])
    every = torch.arange(held["external_logic_token_embeddings"].num_embeddings)
    vectors = held["external_logic_token_embeddings"](every).detach()  # called, as the published code does
    if len(vectors) != len(words):
        raise ValueError(f"{path} contains {len(vectors)} functional vectors for {len(words)} words")
    tokens, inputs = vectors.shape[1], parameters["fc1.weight"].shape[1]
    if "conv1.weight" in parameters:
        network = ScorerCNN(tokens, inputs // (4 * tokens))
    else:
        network = ScorerMLP(tokens, inputs // tokens)
    network.load_state_dict(parameters)
    return Scorer(network=network.eval(), vectors=vectors, placement=placement, words=words)
