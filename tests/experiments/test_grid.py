"""Extraction of IDs from grid pictures, against the published means taken picture by picture from PyTorch."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
from families import VOCABULARY
from test_cli import refused, run

from jaxid.data.grid import CELL_SIZE, GridItem, placements, read_grid_folder, write_grid_folder
from jaxid.errors import InputError, PromptError
from jaxid.experiments.spatial_ids import ExtractIDs
from jaxid.ids import extract
from jaxid.ids.spatial import SpatialIDs
from jaxid.interp.trace import residuals_at

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")  # of the tiny vocabulary

PAIRS = (("star", "fish"), ("cat", "fish"), ("fish", "star"))
SIZES = (224, 74)
A_CELLS = ((0, 0), (2, 1), (3, 3))


@functools.cache
def items() -> tuple[GridItem, ...]:
    """Noise pictures of three pairs: three cells of A, all others for B, two sizes; in no order."""
    rng = np.random.default_rng(3)
    made = [
        GridItem(
            picture=(rng.integers(0, 256, (32, 32, 3)) * rng.uniform(0.2, 1, 3)).astype(np.uint8),
            object_a=a,
            object_b=b,
            cell_a=cell_a,
            cell_b=cell_b,
            size=size,
        )
        for a, b in PAIRS
        for size in SIZES
        for cell_a, cell_b in placements()
        if cell_a in A_CELLS
    ]
    return tuple(made[number] for number in rng.permutation(len(made)))


def torch_activations(items: Sequence[GridItem]) -> np.ndarray:
    """PyTorch's residual stream at the asked word of every picture, embeddings first: [N, L + 1, D]."""
    questions = [f"Is the {item.object_b} to the left or right of the {item.object_a}?" for item in items]
    prompts = fixtures.model(oracle.CASE).prepare([item.picture for item in items], questions)
    record = fixtures.record(oracle.CASE, prompts)
    stacked = np.concatenate([record["embed"][None], record["resid_post"]])
    token_ids = np.asarray(prompts.inputs.token_ids)
    at = [list(row).index(VOCABULARY.index(item.object_b)) for row, item in zip(token_ids, items, strict=True)]
    return stacked[:, np.arange(len(items)), at].swapaxes(0, 1)


def published_ids(name: str) -> np.ndarray:
    """IDs of one object [L + 1, S, X, Y, D]: less the mean of A's folder, over A's places, then over pairs."""
    by_pair = []
    for pair in PAIRS:
        if pair[1] != name:
            continue
        chosen = [item for item in items() if (item.object_a, item.object_b) == pair]
        activations = torch_activations(chosen).astype(float)
        sums = np.zeros((len(SIZES), 4, 4, *activations.shape[1:]))
        counts = np.zeros((len(SIZES), 4, 4, 1, 1))
        for cell_a in A_CELLS:
            folder = [row for row, item in enumerate(chosen) if item.cell_a == cell_a]
            middle = activations[folder].mean(axis=0)
            for row in folder:
                place = (SIZES.index(chosen[row].size), *chosen[row].cell_b)
                sums[place] += activations[row] - middle
                counts[place] += 1
        by_pair.append(sums / counts)
    return np.mean(by_pair, axis=0).transpose(3, 0, 1, 2, 4)


def test_extract_equals_the_published_means(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def spy(model: Any, prompts: Any, at: Any) -> Any:
        lengths.append(len(prompts))
        return residuals_at(model, prompts, at)

    monkeypatch.setattr(extract, "residuals_at", spy)
    model = fixtures.model(oracle.CASE)
    # 270 pictures in batches of 64: the last one holds 14 and is padded.
    ids = extract.extract_spatial(model, iter(items()), pairs=PAIRS, sizes=SIZES, batch_size=64)
    assert lengths == [64] * 5
    assert (ids.objects, ids.sizes) == (("fish", "star"), SIZES)
    assert (ids.model, ids.fingerprint) == (model.name, model.fingerprint)
    for row, name in enumerate(ids.objects):
        expected = published_ids(name)
        assert ids.embeddings is not None
        np.testing.assert_allclose(ids.embeddings[row], 0, atol=1e-5)  # a word is embedded alike wherever its object is
        np.testing.assert_allclose(expected[0], 0, atol=1e-5)
        assert fixtures.distance(ids.values[:, row], expected[1:]) < 1e-4
        pairs = sum(b == name for _, b in PAIRS)
        for x, y in np.ndindex(4, 4):
            assert (ids.counts[row, :, x, y] == pairs * (2 if (x, y) in A_CELLS else 3)).all()


def test_other_questions_are_asked_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(model: Any, prompts: Any, at: Any) -> Any:
        asked.append(prompts.questions)
        return residuals_at(model, prompts, at)

    monkeypatch.setattr(extract, "residuals_at", spy)
    few = items()[:3]
    extract.extract_spatial(
        fixtures.model(oracle.CASE), few, pairs=PAIRS, sizes=SIZES, question="Is {a} above {b}?", batch_size=4
    )
    expected = [f"Is {item.object_a} above {item.object_b}?" for item in few]
    assert asked == [(*expected, expected[0])]


def test_words_are_read_in_the_question_without_picture() -> None:
    """Figures 5 and 10 b: not the words by themselves, and less their mean."""
    model, question = fixtures.model(oracle.CASE), "Is the star to the left or right of the fish?"
    found = extract.centred_words(model, question, ["left", "right"])
    prompts = model.prepare(None, [question])
    states = fixtures.record(oracle.CASE, prompts)["resid_post"][:, 0]
    token_ids = np.asarray(prompts.inputs.token_ids)[0].tolist()
    read = states[:, [token_ids.index(VOCABULARY.index(word)) for word in ("left", "right")]]
    np.testing.assert_allclose(found, read - read.mean(axis=1, keepdims=True), atol=1e-4)
    alone = model.prepare(None, ["left", "right"])
    bare = fixtures.record(oracle.CASE, alone)["resid_post"]
    bare = np.stack([bare[:, row, at] for row, at in enumerate(alone.word(["left", "right"]))], axis=1)
    assert np.abs(found - (bare - bare.mean(axis=1, keepdims=True))).max() > 0.01
    with pytest.raises(PromptError, match="'above'"):
        extract.centred_words(model, question, ["left", "above"])


def test_what_was_not_announced_is_refused() -> None:
    model = fixtures.model(oracle.CASE)
    with pytest.raises(InputError, match="was not announced"):
        extract.extract_spatial(model, items(), pairs=PAIRS[:2], sizes=SIZES, batch_size=64)
    with pytest.raises(InputError, match="size 74 was not announced"):
        extract.extract_spatial(model, [item for item in items() if item.size == 74], pairs=PAIRS, batch_size=64)


def test_question_must_hold_the_word_once() -> None:
    for question in ("Is there a {a}?", "Is the {b} to the left of {a} or {b}?"):
        with pytest.raises(PromptError, match="word"):
            extract.extract_spatial(
                fixtures.model(oracle.CASE), items()[:2], pairs=PAIRS, sizes=SIZES, question=question, batch_size=2
            )


@pytest.mark.parametrize("pair", [("star fish", "fish"), ("fish", "star fish")])
def test_names_inside_names(pair: tuple[str, str]) -> None:
    """The asked word is read at its own token, not inside the other name."""
    model = fixtures.model(oracle.CASE)
    chosen = [item for item in items() if item.cell_a == (0, 0) and item.size == 224][:2]
    made = [dataclasses.replace(item, object_a=pair[0], object_b=pair[1]) for item in chosen]
    ids = extract.extract_spatial(model, made, pairs=[pair], sizes=(224,), batch_size=2)
    prompts = model.prepare([item.picture for item in made], extract.SPATIAL_QUESTION.format(a=pair[0], b=pair[1]))
    token_ids = np.asarray(prompts.inputs.token_ids)
    # The asked object stands first in the question: "Is the {b} to the left ..."
    at = np.array([list(row).index(VOCABULARY.index("to")) - 1 for row in token_ids])
    assert ids.objects == (pair[1],)
    expected = np.asarray(residuals_at(model, prompts, at))[1:, :, 0]
    found = [np.asarray(ids.values)[:, 0, 0, x, y] for x, y in (item.cell_b for item in made)]
    # IDs are activations less their mean over the pictures of A's cell.
    assert made[0].cell_b != made[1].cell_b
    np.testing.assert_allclose(found[0] - found[1], expected[:, 0] - expected[:, 1], rtol=1e-4, atol=1e-5)


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_extracts_what_the_function_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_grid_folder(tmp_path / "grid", [("star", "fish")], picture_size=32, object_sizes=(CELL_SIZE,))
    out = tmp_path / "ids.safetensors"
    arguments = ["ids", "extract", "--data", tmp_path / "grid", "--out", out, "--model", fixtures.folder(oracle.CASE)]
    assert run(*arguments, "--batch-size", "64") == 0
    assert capsys.readouterr().out.startswith(f"{out}: 240 pictures, 1 pairs; ")
    items = read_grid_folder(tmp_path / "grid")
    expected = extract.extract_spatial(fixtures.model(oracle.CASE), items, pairs=[("star", "fish")], batch_size=64)
    found = SpatialIDs.load(out)
    assert found.fingerprint == expected.fingerprint
    np.testing.assert_allclose(found.universal, expected.universal, atol=1e-5)
    assert "batch_size: 64" in out.with_suffix(".yaml").read_text()


def test_command_checks_the_file_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for out, message in (("ids.npz", ".safetensors"), ("folder.safetensors", "a folder is in the way")):
        assert message in refused(capsys, "ids", "extract", "--data", tmp_path, "--out", tmp_path / out)


def test_the_question_without_articles() -> None:
    given: Any = {"data": Path("grids"), "out": Path("ids.safetensors")}
    assert ExtractIDs(**given).question == "Is the {b} to the left or right of the {a}?"
    assert ExtractIDs(**given, articles=False).question == "Is {b} to the left or right of {a}?"
