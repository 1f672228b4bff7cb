"""The published procedure in PyTorch, as benchmarks use it: maps, functional words, scorers, training, evaluation."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_files import importable
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

IMAGE_TOKENS = 5
"""Of the tiny encoder: a class token and 2 x 2 patches."""


@pytest.fixture(scope="module")
def published() -> Any:
    with importable() as load:
        return load("published_dcsm")


@pytest.fixture(scope="module")
def encoder() -> Any:
    """A CLIP of two blocks a tower with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    for parameter in model.parameters():  # fresh norms and biases are ones and zeros, which hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    """Spells words letter by letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    sizes: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return CLIPProcessor(
        image_processor=CLIPImageProcessorPil(**sizes),
        tokenizer=CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]),
    )


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)) for _ in range(count)]


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class MeanOfMap(nn.Module):
    def forward(self, S: torch.Tensor) -> torch.Tensor:
        return S.mean((1, 2, 3))


class Corner(nn.Module):
    def forward(self, S: torch.Tensor) -> torch.Tensor:
        return S[:, 0, 0, 0]


# --- tokens and maps ------------------------------------------------------------------------------------------------


def test_tokens_are_unit_vectors_of_the_published_shapes(published: Any, encoder: Any, processor: Any) -> None:
    seen = published.encode(encoder, processor, pictures(3), ["red ball", "no cat"])
    assert seen.images.shape == (3, IMAGE_TOKENS, 12) and seen.texts.shape == (2, 30, 12)
    for tokens in (seen.images, seen.texts):
        torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(tokens.shape[:-1]))
        assert not tokens.requires_grad


def test_class_and_end_tokens_are_the_pooled_embeddings(published: Any, encoder: Any, processor: Any) -> None:
    shown, captions = pictures(2), ["red ball", "a small cat", "x"]
    seen = published.encode(encoder, processor, shown, captions)
    cosines = published.pooled_cosine(encoder, processor, shown, captions)
    ends = torch.tensor([len(caption.replace(" ", "")) + 1 for caption in captions])  # a token a letter, and the start
    expected = seen.images[:, 0] @ seen.texts[torch.arange(3), ends].T
    torch.testing.assert_close(cosines, expected, rtol=1e-4, atol=1e-5)
    assert cosines.std() > 1e-3


def test_every_patch_goes_through_the_last_norm(published: Any, encoder: Any) -> None:
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tower = encoder.vision_model
        raw = tower(pixel_values=pixels).last_hidden_state[0, 3].numpy().astype(np.float64)
        norm, weight = tower.post_layernorm, encoder.visual_projection.weight.numpy()
        scaled = (raw - raw.mean()) / np.sqrt(raw.var() + norm.eps) * norm.weight.numpy() + norm.bias.numpy()
        ours = published.image_tokens(encoder, pixels)[0, 3].numpy()
    projected = weight @ scaled
    np.testing.assert_allclose(ours, projected / np.linalg.norm(projected), rtol=1e-4, atol=1e-5)


def test_captions_are_padded_and_cut_to_thirty_tokens(published: Any, processor: Any) -> None:
    ids, mask = published.tokenise(processor, ["ab", "a" * 50])
    assert ids.shape == mask.shape == (2, 30)
    assert ids[0].tolist() == [52, 0, 27] + [53] * 27 and mask[0].tolist() == [1] * 4 + [0] * 26
    assert ids[1].tolist() == [52] + [0] * 28 + [53] and mask[1].all()


def test_the_mask_hides_padding_from_padding(published: Any, encoder: Any, processor: Any) -> None:
    ids, mask = published.tokenise(processor, ["red ball"])
    with torch.no_grad():
        hidden, seen = (published.text_tokens(encoder, ids, shown)[0] for shown in (mask, torch.ones_like(mask)))
    length = int(mask.sum())
    torch.testing.assert_close(hidden[:length], seen[:length], rtol=1e-4, atol=1e-5)
    assert ((hidden - seen)[length:].abs().amax(-1) > 1e-3).all()


def test_captions_of_another_length_are_refused(published: Any, encoder: Any) -> None:
    with pytest.raises(ValueError, match=r"7 tokens.*30"):
        published.text_tokens(encoder, torch.zeros(1, 7, dtype=torch.int64), torch.ones(1, 7, dtype=torch.int64))


def test_a_map_of_two_by_two(published: Any) -> None:
    P = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    Q = torch.tensor([[[0.6, 0.8], [1.0, 0.0]], [[0.0, -1.0], [0.8, 0.6]]])
    expected = [[[[0.6, 1.0], [0.8, 0.0]], [[0.0, 0.8], [-1.0, 0.6]]]]
    torch.testing.assert_close(published.maps(P, Q), torch.tensor(expected))


# --- functional words -----------------------------------------------------------------------------------------------


def test_functional_vectors_are_shifted_unit_vectors(published: Any) -> None:
    vectors = published.functional_vectors(11, 50, torch.Generator().manual_seed(4))
    assert vectors.shape == (11, 50)
    directions = vectors * 3 - 1
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(11))
    assert (directions @ directions.T - torch.eye(11)).abs().max() < 0.6  # each drawn for itself
    torch.testing.assert_close(vectors, published.functional_vectors(11, 50, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(
    ("caption", "places"),
    [
        ("cat above dog", [(0, 1)]),
        ("cat but no dog but no bird", [(7, 2), (9, 1)]),  # first occurrences, in the order of the vocabulary
        ("above. Above", []),  # exact matches only
        ("cat  above", [(0, 2)]),  # two spaces hold an empty word
        ("cat", []),
    ],
)
def test_words_are_what_stands_between_spaces(published: Any, caption: str, places: list[tuple[int, int]]) -> None:
    assert published.functional_places(caption) == places


@pytest.mark.parametrize(
    ("placement", "kept"), [("replace", [0, "no", 2, "left", 4]), ("insert", [0, "no", 1, 2, "left"])]
)
def test_columns_of_functional_words(published: Any, placement: str, kept: list[Any]) -> None:
    words, vectors = ("left", "no"), torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    S = torch.arange(20.0).reshape(1, 2, 2, 5)
    before = S.clone()
    made = published.place_functional(S, ["cat", "cat no dog left bird"], vectors, placement, words)
    columns = [vectors[words.index(place)] if isinstance(place, str) else S[0, 1, :, place] for place in kept]
    torch.testing.assert_close(made[0, 1], torch.stack(columns, dim=-1))
    torch.testing.assert_close(made[0, 0], S[0, 0])  # a caption without functional words
    torch.testing.assert_close(S, before)


@pytest.mark.parametrize("placement", ["replace", "insert"])
def test_every_picture_gets_the_same_vector(published: Any, placement: str) -> None:
    vectors = torch.tensor([[7.0, 8.0, 9.0]])
    made = published.place_functional(torch.zeros(4, 1, 3, 2), ["no cat"], vectors, placement, ("no",))
    torch.testing.assert_close(made[:, 0, :, 0], vectors.expand(4, 3))


@pytest.mark.parametrize("placement", ["replace", "insert"])
def test_words_behind_the_last_column_are_left_out(published: Any, placement: str) -> None:
    S = torch.rand(1, 1, 2, 3)
    made = published.place_functional(S, ["a cat and no"], torch.ones(1, 2), placement, ("no",))
    torch.testing.assert_close(made, S)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_standardisation_is_over_everything_and_unbiased(published: Any) -> None:
    S = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # mean 3, squares 4 + 1 + 0 + 9 = 14, over 4 - 1
    expected = torch.tensor([[-2.0, -1.0], [0.0, 3.0]]) / math.sqrt(14 / 3)
    torch.testing.assert_close(published.standardise(S), expected)


def correlated(value: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A 3 x 3 convolution with a border of zeros, written out."""
    rows, columns = value.shape[1:]
    padded = np.pad(value, ((0, 0), (1, 1), (1, 1)))
    made = np.empty((len(weight), rows, columns))
    for row in range(rows):
        for column in range(columns):
            window = padded[:, row : row + 3, column : column + 3]
            made[:, row, column] = (weight * window).sum((1, 2, 3)) + bias
    return made


def test_the_cnn_written_out(published: Any) -> None:
    torch.manual_seed(5)
    network = published.ScorerCNN(2, 3).eval()
    S = torch.randn(2, 1, 2, 3)
    held = {name: value.numpy().astype(np.float64) for name, value in network.state_dict().items()}
    assert [*held] == [f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc1", "fc2") for kind in ("weight", "bias")]
    expected = []
    for value in S.numpy().astype(np.float64):
        for layer in ("conv1", "conv2"):
            value = np.maximum(correlated(value, held[f"{layer}.weight"], held[f"{layer}.bias"]), 0)
        flat = np.array([value[c, i, t] for c in range(4) for i in range(2) for t in range(3)])
        hidden = np.maximum(held["fc1.weight"] @ flat + held["fc1.bias"], 0)
        expected.append((held["fc2.weight"] @ hidden + held["fc2.bias"]).item())
    assert held["fc1.weight"].shape == (128, 24)
    np.testing.assert_allclose(network(S).detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_the_mlp_written_out(published: Any) -> None:
    torch.manual_seed(6)
    network = published.ScorerMLP(2, 3)
    S = torch.randn(2, 1, 2, 3)
    held = {name: value.numpy() for name, value in network.state_dict().items()}
    assert [held[f"fc{layer}.weight"].shape for layer in (1, 2, 3)] == [(64, 6), (32, 64), (1, 32)]
    value = S.numpy().reshape(2, 6)
    for layer in (1, 2, 3):
        value = value @ held[f"fc{layer}.weight"].T + held[f"fc{layer}.bias"]
        value = np.maximum(value, 0) if layer < 3 else value
    np.testing.assert_allclose(network(S).detach().numpy(), value[:, 0], rtol=1e-4, atol=1e-6)


def test_dropout_acts_in_training_alone(published: Any) -> None:
    network, S = published.ScorerCNN(4, 6, dropout=0.5), torch.randn(3, 1, 4, 6)
    torch.manual_seed(0)
    assert not torch.equal(network.train()(S), network(S))
    assert torch.equal(network.eval()(S), network(S))


def test_scores_belong_to_their_pairs(published: Any) -> None:
    P, Q, captions = units(3, 4, 6), units(2, 30, 6, seed=1), ["cat above dog", "dog"]
    vectors = published.functional_vectors(11, 4, torch.Generator().manual_seed(2))
    scorer = published.Scorer(network=Corner(), vectors=vectors)
    raw = np.einsum("nie,mte->nmit", P.double().numpy(), Q.double().numpy())
    raw[:, 0, :, 1] = vectors[0].numpy()
    expected = (raw - raw.mean()) / raw.std(ddof=1)
    made = published.score_pairs(scorer, P, Q, captions)
    np.testing.assert_allclose(made.numpy(), expected[:, :, 0, 0], rtol=1e-4, atol=1e-5)


def test_a_score_depends_on_its_group(published: Any) -> None:
    P, Q = units(3, 4, 6), units(2, 30, 6, seed=1)
    scorer = published.Scorer(network=MeanOfMap(), vectors=torch.ones(11, 4))
    together = published.score_pairs(scorer, P, Q, ["a", "b"])
    alone = published.score_pairs(scorer, P[:1], Q, ["a", "b"])
    assert (together[:1] - alone).abs().max() > 1e-3
    assert together.mean().abs() < 1e-6 and alone.mean().abs() < 1e-6


# --- training -------------------------------------------------------------------------------------------------------


def test_two_way_loss_of_two_by_two(published: Any) -> None:
    scores = torch.log(torch.tensor([[3.0, 1.0], [2.0, 2.0]]))
    rows = -(math.log(3 / 4) + math.log(2 / 4)) / 2
    columns = -(math.log(3 / 5) + math.log(2 / 3)) / 2
    order = torch.arange(2)
    assert published.two_way_loss(scores, order, order).item() == pytest.approx(rows + columns, rel=1e-5)


def test_a_shuffle_changes_no_loss(published: Any) -> None:
    chance = torch.Generator().manual_seed(8)
    scores = torch.randn(16, 16, generator=chance)
    plain = published.two_way_loss(scores, torch.arange(16), torch.arange(16))
    for _ in range(3):
        orders = [torch.randperm(16, generator=chance) for _ in range(2)]
        torch.testing.assert_close(published.two_way_loss(scores, *orders), plain)
    assert (published.two_way_loss(scores[torch.randperm(16, generator=chance)], *orders) - plain).abs() > 0.1


def training_sets(published: Any) -> list[list[Any]]:
    """Three data sets of two versions; captions' tokens resemble those of their pictures."""

    def batch(seed: int) -> Any:
        images = units(4, IMAGE_TOKENS, 8, seed=seed)
        texts = nn.functional.normalize(images.mean(1, keepdim=True) + 0.3 * units(4, 30, 8, seed=seed + 50), dim=-1)
        captions = ("cat above dog", "dog above cat", "no cat", "small dog")
        return published.Batch(images=images, texts=texts, captions=captions)

    return [[batch(2 * number), batch(2 * number + 1)] for number in range(3)]


def fresh(published: Any, dropout: float = 0.0) -> Any:
    torch.manual_seed(9)
    vectors = published.functional_vectors(11, IMAGE_TOKENS, torch.Generator().manual_seed(10))
    return published.Scorer(network=published.ScorerCNN(IMAGE_TOKENS, dropout=dropout), vectors=vectors)


def test_steps_lower_the_loss(published: Any) -> None:
    scorer, sets, chance = fresh(published), training_sets(published), torch.Generator().manual_seed(11)
    vectors = scorer.vectors.clone()
    optimiser = torch.optim.Adam(scorer.network.parameters(), lr=1e-3)
    losses = [published.train_step(scorer, optimiser, sets, chance) for _ in range(12)]
    assert losses[0] == pytest.approx(2 * math.log(4), abs=0.3)
    assert losses[-1] < losses[0] - 0.3
    assert torch.equal(scorer.vectors, vectors)


def test_gradients_are_summed_and_divided_by_the_number_of_sets(published: Any) -> None:
    scorer, sets = fresh(published), training_sets(published)
    rate, order = 0.1, torch.arange(4)
    before = [parameter.detach().clone() for parameter in scorer.network.parameters()]
    losses = [
        published.two_way_loss(published.score_pairs(scorer, b.images, b.texts, b.captions), order, order)
        for versions in sets
        for b in versions
    ]
    gradients = torch.autograd.grad(torch.stack(losses).sum() / 3, list(scorer.network.parameters()))
    optimiser = torch.optim.SGD(scorer.network.parameters(), lr=rate)  # shows the gradient as it is
    mean = published.train_step(scorer, optimiser, sets, torch.Generator().manual_seed(12))
    assert mean == pytest.approx(sum(loss.item() for loss in losses) / 6, rel=1e-5)
    for parameter, start, gradient in zip(scorer.network.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), start - rate * gradient, rtol=1e-4, atol=1e-6)


def test_steps_drop_numbers_out(published: Any) -> None:
    scorer, sets = fresh(published, dropout=0.5), training_sets(published)
    scorer.network.eval()
    optimiser = torch.optim.SGD(scorer.network.parameters(), lr=0.0)
    losses = [published.train_step(scorer, optimiser, sets, torch.Generator().manual_seed(13)) for _ in range(2)]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_old_gradients_are_forgotten(published: Any) -> None:
    scorer, sets = fresh(published), training_sets(published)
    optimiser = torch.optim.SGD(scorer.network.parameters(), lr=0.0)
    gradients = []
    for seed in (13, 14):
        published.train_step(scorer, optimiser, sets, torch.Generator().manual_seed(seed))
        gradients.append(scorer.network.fc1.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


# --- evaluation and files -------------------------------------------------------------------------------------------


def test_each_question_is_judged_by_itself(published: Any, encoder: Any, processor: Any) -> None:
    shown = pictures(4)
    captions = [("red cat above dog", "big dog"), ("no cat", "cat", "dog"), ("ball", "small ball"), ("x", "y but z")]
    questions = [published.Question(picture=p, captions=c) for p, c in zip(shown, captions, strict=True)]
    scorer = fresh(published, dropout=0.5)
    found = published.evaluate(encoder, processor, scorer, questions)
    assert not scorer.network.training
    by_maps = by_cosine = 0
    for question in questions:
        ids, mask = published.tokenise(processor, question.captions)
        pixels = processor(images=question.picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            P = published.image_tokens(encoder, pixels)
            Q = published.text_tokens(encoder, ids, mask)
            scores = published.score_pairs(scorer, P, Q, question.captions)[0].tolist()
            logits = encoder(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits_per_image[0].tolist()
        by_maps += scores[0] == max(scores)
        by_cosine += logits[0] == max(logits)
    assert found == published.Accuracy(maps=by_maps / 4, cosine=by_cosine / 4)


def test_the_first_caption_has_to_win(published: Any, encoder: Any, processor: Any) -> None:
    picture, captions = pictures(1)[0], ("red cat", "big dog")
    forth = published.Question(picture=picture, captions=captions)
    back = published.Question(picture=picture, captions=captions[::-1])
    scorer = fresh(published)
    single = [published.evaluate(encoder, processor, scorer, [question]) for question in (forth, back)]
    assert {single[0].maps, single[1].maps} == {single[0].cosine, single[1].cosine} == {0.0, 1.0}
    both = published.evaluate(encoder, processor, scorer, [forth, back])
    assert (both.maps, both.cosine) == (0.5, 0.5)


def test_no_question_is_an_error(published: Any, encoder: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match="no question"):
        published.evaluate(encoder, processor, fresh(published), [])


@pytest.mark.parametrize("kind", ["ScorerCNN", "ScorerMLP"])
def test_a_checkpoint_comes_back(published: Any, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(15)
    network = getattr(published, kind)(IMAGE_TOKENS)
    scorer = dataclasses.replace(fresh(published), network=network.eval())
    path = tmp_path / "scorer.pt"
    published.save_checkpoint(path, scorer)
    found = published.load_checkpoint(path)
    P, Q, captions = units(2, IMAGE_TOKENS, 8), units(2, 30, 8, seed=1), ("cat above dog", "no cat")
    assert torch.equal(published.score_pairs(found, P, Q, captions), published.score_pairs(scorer, P, Q, captions))
    held = torch.load(path, weights_only=False)
    assert held["external_logic_token_embeddings"].weight.shape == (11, IMAGE_TOKENS)
    layers = held["model_state_dict"]
    assert "fc1.weight" in layers and ("conv1.weight" in layers) == (kind == "ScorerCNN")


def test_vectors_of_other_words_are_refused(published: Any, tmp_path: Path) -> None:
    scorer = dataclasses.replace(fresh(published), words=("no", "left"))
    published.save_checkpoint(tmp_path / "scorer.pt", scorer)
    with pytest.raises(ValueError, match="11 functional vectors for 2 words"):
        published.load_checkpoint(tmp_path / "scorer.pt")
