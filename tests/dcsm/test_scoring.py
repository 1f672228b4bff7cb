"""Scores from pictures and captions: the published procedure in PyTorch, meshes, files, and what does not fit."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from benchmark_files import importable
from encoders import ENCODER_CASES, encoder, reference
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxid.checkpoints.scorer_files import write_authors_scorer
from jaxid.dcsm.embedding import Pictures, Texts, embed_images, embed_texts
from jaxid.dcsm.evaluate import answer, summary
from jaxid.dcsm.placement import find, place
from jaxid.dcsm.scoring import Scorer, score, score_own
from jaxid.errors import CheckpointError, InputError, OutputError
from jaxid.kernels.similarity import GROUPS

CASE = ENCODER_CASES[0]
CAPTIONS = ["red star above a fish", "a fish but no star", "star", "a big fish to the left of a star", "not small"]
LENGTH = 11


@pytest.fixture(scope="module")
def published() -> Any:
    with importable() as load:
        return load("published_dcsm")


def pictures() -> list[np.ndarray]:
    return [*fixtures.pictures(), fixtures.pictures()[0][::-1].copy()]


def sides() -> tuple[Any, Texts]:
    return embed_images(encoder(CASE), pictures()), embed_texts(encoder(CASE), CAPTIONS, LENGTH)


def a_scorer(placement: str = "token", kind: str = "cnn") -> Scorer:
    return Scorer.init(jax.random.key(1), 17, LENGTH, placement=placement, kind=kind)


@pytest.mark.parametrize("placement", ["replace", "insert"])
def test_scores_are_the_published_ones(
    published: Any, placement: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From pixels and ids to scores, through the authors' file."""
    monkeypatch.setattr(published, "TEXT_TOKENS", LENGTH)
    scorer, own = a_scorer(placement), encoder(CASE)
    write_authors_scorer(tmp_path / "scorer.pt", scorer.network, np.asarray(scorer.vectors))
    theirs = published.load_checkpoint(tmp_path / "scorer.pt", placement)
    texts = own.processor.captions(CAPTIONS, LENGTH)
    ids, mask = torch.tensor(texts.token_ids).long(), torch.tensor(texts.valid).long()
    with torch.no_grad():
        left = published.image_tokens(reference(CASE), torch.from_numpy(own.processor.pixels(pictures())))
        right = published.text_tokens(reference(CASE), ids, mask)
        expected = published.score_pairs(theirs, left, right, CAPTIONS).numpy()
    ours = score(scorer, *sides())
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    again = dataclasses.replace(Scorer.load(tmp_path / "scorer.pt"), placement=placement)
    np.testing.assert_array_equal(score(again, *sides()), ours)


@pytest.mark.parametrize("group", GROUPS)
def test_pictures_over_devices(group: str) -> None:
    """More devices than pictures."""
    mesh = jax.make_mesh((8,), ("data",))
    images, texts = sides()
    whole = score(a_scorer(), images, texts, group=group)
    np.testing.assert_allclose(score(a_scorer(), images, texts, group=group, mesh=mesh), whole, atol=1e-5)


def test_own_captions_are_calls_of_their_own() -> None:
    images, texts = sides()
    order = [0, 1, 2, 3, 4, 0]
    scores = score_own(a_scorer(), images, texts[order], 2)
    for row in range(3):
        alone = score(a_scorer(), images[[row]], texts[order[2 * row : 2 * row + 2]])
        np.testing.assert_allclose(scores[row], alone[0], atol=1e-5)


def test_placement_of_columns() -> None:
    captions = encoder(CASE).processor.captions(["a red star above no fish", "fish"], 10)
    # <start> a red star above no fish <end>
    vocabulary = ("no", "above", "of")
    words = place(captions, vocabulary).words
    assert words[0].tolist() == [-1, -1, -1, -1, 1, 0, -1, -1, -1, -1] and (words[1] == -1).all()
    replaced = place(captions, vocabulary, "replace")
    assert np.flatnonzero(replaced.words[0] >= 0).tolist() == [3, 4] and replaced.sources[0].tolist() == list(range(10))
    inserted = place(captions, vocabulary, "insert")  # "no" at 4, then "above" at 3, which moves it
    assert inserted.words[0].tolist() == [-1, -1, -1, 1, -1, 0, -1, -1, -1, -1]
    assert inserted.sources[0].tolist()[4:5] == [3] and inserted.sources[0].tolist()[6:] == [4, 5, 6, 7]
    with pytest.raises(InputError, match="'left' is not one of token"):
        place(captions, vocabulary, "left")


def test_words_are_found_whole() -> None:
    assert find("Knot, not a NOT", ("not",)) == [(0, 6, 9)]
    assert find("to the left of it, left", ("left", "to the left of")) == [(1, 0, 14), (0, 19, 23)]
    assert find("abovement", ("above",)) == []
    assert find("a to the left of b, c to the left of d", ("left", "to the left of")) == [(1, 2, 16)]


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_files(kind: str, tmp_path: Path) -> None:
    scorer = a_scorer("insert", kind)
    scorer.save(tmp_path / "scorer.safetensors")
    again = Scorer.load(tmp_path / "scorer.safetensors")
    assert (again.placement, again.vocabulary, type(again.network)) == (
        "insert",
        scorer.vocabulary,
        type(scorer.network),
    )
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(scorer))
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    for name, message in (
        ("none.safetensors", "is missing; expected a scorer"),
        ("other.safetensors", "a scorer that jaxid wrote"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Scorer.load(tmp_path / name)


def rewritten(path: Path, change: Any) -> None:
    """Changes arrays and description of a scorer's file."""
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["scorer"])
    change(arrays, described)
    save_file(arrays, path, metadata={"scorer": json.dumps(described)})


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays, described: arrays.pop("network.fc1"),
        lambda arrays, described: arrays.update({"network.conv3": np.ones(2, np.float32)}),
        lambda arrays, described: arrays.pop("vectors"),
        lambda arrays, described: described.update(kind="tree"),
        lambda arrays, described: described.pop("kind"),
    ],
    ids=["no layer", "one layer more", "no vectors", "unknown kind", "no kind"],
)
def test_files_that_are_no_scorers(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "scorer.safetensors"
    scorer = dataclasses.replace(a_scorer(), encoder="tiny")
    scorer.save(path)
    rewritten(path, lambda arrays, described: None)
    assert Scorer.load(path).encoder == "tiny"
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=r"scorer\.safetensors cannot be read as a scorer"):
        Scorer.load(path)
    save_file({"vectors": np.ones(2, np.float32)}, path)
    with pytest.raises(CheckpointError, match=r"scorer\.safetensors cannot be read as a scorer"):
        Scorer.load(path)
    with pytest.raises(OutputError, match=r"must end in \.safetensors"):
        scorer.save(tmp_path / "scorer.npz")
    assert [found.name for found in tmp_path.iterdir()] == ["scorer.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, told: arrays.update({"network.fc1": arrays["network.fc1"] * np.nan}), "fc1 must be finite"),
        (lambda arrays, told: arrays.update(vectors=arrays["vectors"] / np.float32(1e-45)), "vectors must be finite"),
        (lambda arrays, told: arrays.update({"network.fc2": np.ones(7, np.float32)}), "fc2 has the shape"),
        (lambda arrays, told: arrays.update({"network.fc2": np.ones(128, np.int32)}), "fc2 holds int32"),
        (lambda arrays, told: arrays.update({"network.fc1": np.array(1, np.float32)}), "fc1 has the shape"),
        (lambda arrays, told: told.update(vocabulary=[]), "list of functional words is empty"),
        (lambda arrays, told: told.update(vocabulary="above"), "vocabulary must be a list"),
        (lambda arrays, told: told.update(vocabulary=[1, 2]), "vocabulary must be a list"),
        (lambda arrays, told: told.update(vocabulary=["no"] * 11), "'no' is there twice"),
        (lambda arrays, told: told.update(vocabulary=["no"]), "1 functional words"),
        (lambda arrays, told: told.update(placement=[]), "placement and encoder texts"),
        (lambda arrays, told: told.update(encoder=5), "encoder texts"),
        (lambda arrays, told: told.update(kind=[]), "cannot be read"),
    ],
)
def test_damaged_scorers(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "scorer.safetensors"
    a_scorer().save(path)
    with np.errstate(all="ignore"):
        rewritten(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        Scorer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def handmade(pictures: np.ndarray, captions: np.ndarray) -> tuple[Pictures, Texts]:
    texts = embed_texts(encoder(CASE), CAPTIONS[: len(captions)], LENGTH)
    return Pictures(tokens=pictures, pooled=pictures[:, 0]), dataclasses.replace(texts, tokens=captions)


@pytest.mark.parametrize("group", GROUPS)
def test_scores_that_are_not_finite_are_refused(group: str) -> None:
    """No word of the vocabulary stands in the captions, as its column would differ from the others."""
    rng = np.random.default_rng(0)
    images, captions = (rng.standard_normal((2, tokens, 16)).astype(np.float32) for tokens in (17, LENGTH))
    scorer = dataclasses.replace(a_scorer(), vocabulary=tuple(f"word{number}" for number in range(11)))
    assert np.isfinite(score(scorer, *handmade(images, captions), group=group)).all()
    for side, message in ((images, "picture 1 hold NaN"), (captions, "fish but no star' hold NaN")):
        kept = side[1, 3, 2]
        side[1, 3, 2] = np.nan
        with pytest.raises(InputError, match=message):
            score(scorer, *handmade(images, captions), group=group)
        side[1, 3, 2] = kept
    images[:], captions[:] = images[:1, :1], captions[:1, :1]
    with pytest.raises(InputError, match=r"picture 0 with 'red star above a fish', .* alike"):
        score(scorer, *handmade(images, captions), group=group)
    broken = dataclasses.replace(scorer, network=scorer.network._replace(fc2=scorer.network.fc2 * np.nan))
    with pytest.raises(InputError, match="the scorer's fc2 must be finite"):
        score(broken, *handmade(images, captions), group=group)


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_the_authors_layout(kind: str, tmp_path: Path) -> None:
    scorer = Scorer.init(jax.random.key(3), 17, 30, kind=kind)
    write_authors_scorer(tmp_path / "scorer.pt", scorer.network, np.asarray(scorer.vectors))
    again = Scorer.load(tmp_path / "scorer.pt")
    assert again.placement == "replace"
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(scorer))
    saved = torch.load(tmp_path / "scorer.pt", weights_only=False)
    del saved["model_state_dict"]["fc2.bias"]
    torch.save(saved, tmp_path / "broken.pt")
    with pytest.raises(CheckpointError, match=r"missing fc2\.bias"):
        Scorer.load(tmp_path / "broken.pt")


def test_what_does_not_fit() -> None:
    images, texts = sides()
    with pytest.raises(InputError, match=r"reads maps of 17 x 11 tokens; these pictures and captions make 17 x 9"):
        score(a_scorer(), images, embed_texts(encoder(CASE), CAPTIONS[:3], 9))
    with pytest.raises(InputError, match="group 'all' is not one of pair, row, call"):
        score(a_scorer(), images, texts, group="all")
    with pytest.raises(InputError, match="need 2 captions each"):
        score_own(a_scorer(), images, texts, 2)
    with pytest.raises(InputError, match="list of captions is empty"):
        embed_texts(encoder(CASE), [])
    with pytest.raises(InputError, match="at least one picture"):
        embed_images(encoder(CASE), [])


# --- questions ------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_single_questions() -> None:
    """Cosine reads whole captions, the scorer's maps hold nine tokens of them."""
    own, shown = encoder(CASE), [0, 1, 0, 2]
    asked = [CAPTIONS[:2], CAPTIONS[1:4], CAPTIONS[3:], [CAPTIONS[2], CAPTIONS[0]]]
    scorer = Scorer.init(jax.random.key(1), 17, 9)
    with pytest.warns(UserWarning, match="longer than 9 tokens are cut"):
        found = answer(own, pictures(), asked, scorer, shown=shown)
    assert found.dcsm is not None
    images, texts = embed_images(own, pictures()), embed_texts(own, CAPTIONS, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut = embed_texts(own, CAPTIONS, 9)
    for row, (picture, captions) in enumerate(zip(shown, asked, strict=True)):
        rows = [CAPTIONS.index(caption) for caption in captions]
        cosine = texts.pooled[rows] @ images.pooled[picture]
        assert found.cosine[row] == (np.argmax(cosine) == 0)
        scores = score(scorer, images[[picture]], cut[rows])[0]
        assert found.dcsm[row] == (np.argmax(scores) == 0)
    assert answer(own, pictures(), asked, None, shown=shown).dcsm is None


def test_ties_are_no_answers() -> None:
    found = answer(encoder(CASE), pictures()[:1], [["star", "star"]])
    assert not found.cosine[0]
    with pytest.raises(InputError, match="at least two"):
        answer(encoder(CASE), pictures()[:1], [["star"]])


def test_summary_counts() -> None:
    rows = {"benchmark": ["a", "a", "b"], "cosine": [True, False, True], "dcsm": jnp.array([True, True, False])}
    found = summary(rows)
    assert found["cosine"]["a"]["accuracy"] == 0.5 and found["dcsm"]["a"]["questions"] == 2
    assert found["dcsm"]["b"]["low"] == 0 < found["dcsm"]["b"]["high"]
