"""The runs: what they write equals the experiments' functions, they resume, and bad items are named or left out."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
from families import CASES
from test_cli import run as command

from jaxid.data.coco_spatial import CAPTIONS_FILE, find_coco_spatial, read_coco_spatial, write_coco_spatial
from jaxid.data.scenes import sample_free
from jaxid.errors import DataError, InputError, OutputError, PromptError
from jaxid.experiments import belief_swap as experiment
from jaxid.experiments.relations import prepare
from jaxid.families.base import Model
from jaxid.io import read_table
from jaxid.runs import activation_swap, belief_swap, steer
from jaxid.runs.common import RunConfig, parse_layers

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    # The tiny model knows few of the drawn objects by name.
    pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning"),
]

CASE = CASES[0]
ITEMS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in COCO's layout, and IDs of the tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    write_coco_spatial(folder / "data", sample_free(np.random.default_rng(1), ITEMS, num_objects=(2, 2)), 48)
    ids().save(folder / "ids.safetensors")
    return folder


@functools.cache
def ids() -> Any:
    return dataclasses.replace(oracle.ids(), fingerprint=fixtures.model(CASE).fingerprint)


def options(place: Path, out: str, **changed: Any) -> dict[str, Any]:
    return {
        "model": str(fixtures.folder(CASE)),
        "data": place / "data",
        "ids": place / "ids.safetensors",
        "out": place / out,
        "batch_size": 4,
        "template": "{query}",
        "progress": False,
    } | changed


def columns(out: Path) -> dict[str, np.ndarray]:
    table = read_table(out / "table.parquet")
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


@functools.cache
def swapped(place: Path) -> dict[str, Any]:
    return belief_swap.run(
        belief_swap.BeliefSwapConfig(**options(place, "swap", factor=2.0, layers="0-1", max_new_tokens=0))
    )


def test_belief_swap_writes_what_the_experiment_computes(place: Path) -> None:
    summary, table = swapped(place), columns(place / "swap")
    items = read_coco_spatial(*find_coco_spatial(place / "data"))
    assert summary["items"] == ITEMS and summary["skipped"]["count"] == 0
    assert summary["not_finite"] == {"count": 0, "items": []}
    assert len(table["item"]) == ITEMS * 2 * 2
    model = fixtures.model(CASE)
    for axis, words in (("horizontal", ("left", "right")), ("vertical", ("above", "below"))):
        some = [item for item in items if item.relation in words]
        batch = prepare(model, some, case="both")
        order = list(dict.fromkeys(table["item"].tolist()))
        numbers = np.array([order.index(item.key) for item in some])
        expected = experiment.run(model, batch, ids(), layers=[0, 1], factors=(2.0,), numbers=numbers)
        for row, item in enumerate(some):
            for number, condition in enumerate(experiment.CONDITIONS):
                for layer in (0, 1):
                    (at,) = np.flatnonzero(
                        (table["item"] == item.key) & (table["condition"] == condition) & (table["layer"] == layer)
                    )
                    truth = int(expected.truth[row])
                    steered = expected.steered[number, layer, 0, row]
                    found = [table[name][at] for name in ("steered_correct", "steered_wrong")]
                    np.testing.assert_allclose(found, steered[[truth, 1 - truth]], atol=1e-4)
                    found = [table[name][at] for name in ("control_correct", "control_wrong")]
                    np.testing.assert_allclose(found, expected.control[row][[truth, 1 - truth]], atol=1e-4)
                    assert table["swapped"][at] == expected.swapped[number, layer, 0, row]
                    assert table["text"][at] == expected.steered_texts[number, layer, 0, row]
                    assert (table["axis"][at], table["relation"][at]) == (axis, item.relation)


def test_belief_swap_files(place: Path) -> None:
    swapped(place)
    out = place / "swap"
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    pictures = {"belief_swap.png", "belief_swap_by_layer.png"}
    assert names == {"parts", "settings.json", "summary.json", "table.parquet"} | pictures
    stored = json.loads((out / "summary.json").read_text())
    assert stored["best"]["belief"] == pytest.approx(swapped(place)["best"]["belief"])
    assert stored["settings"]["fingerprint"] == fixtures.model(CASE).fingerprint


def test_a_finished_run_is_not_computed_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped(place)
    shutil.copytree(place / "swap", place / "again")
    before = columns(place / "again")
    (place / "again" / "parts" / "00001.parquet").unlink()
    asked = []

    def spy(model: Model, batch: Any, *arguments: Any, **more: Any) -> Any:
        asked.append(len(batch.prompts))
        return experiment_run(model, batch, *arguments, **more)

    experiment_run = experiment.run
    monkeypatch.setattr(belief_swap.belief_swap, "run", spy)
    config = belief_swap.BeliefSwapConfig(
        **options(place, "again", factor=2.0, layers="0-1", max_new_tokens=0, resume=True)
    )
    summary = belief_swap.run(config)
    assert sum(asked) in (4, 8) and summary["resumed_items"] == ITEMS - 4  # the lost chunk, of one axis or both
    after = columns(place / "again")
    assert set(after) == set(before)
    for name, values in before.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(after[name], values, atol=1e-5)
        else:
            np.testing.assert_array_equal(after[name], values)
    for changed, named in (({"factor": 3.0}, "factor"), ({"seed": 5}, "seed"), ({"layers": "0-2"}, "layers")):
        with pytest.raises(OutputError, match=named):
            belief_swap.run(dataclasses.replace(config, **changed))
    with pytest.raises(OutputError, match="resume"):
        belief_swap.run(dataclasses.replace(config, resume=False))


def test_reference_norms_count_every_occurrence(place: Path) -> None:
    """The published norm is over the word's tokens in prompt and answer together; the vectors are longer by that."""
    model = fixtures.model(CASE)
    items = oracle.items("horizontal")
    batch = prepare(model, items, template="{query} {query}")  # every word stands twice
    plain = experiment.run(model, batch, ids(), layers=[1], factors=(1.0,), max_new_tokens=2)
    written = experiment.generate(model, batch.prompts, max_new_tokens=2)
    norms = np.asarray(experiment.occurrence_norms(model, batch, written))[1]
    token_ids = np.asarray(batch.prompts.inputs.token_ids)
    residuals = oracle.torch_residuals(batch)[1]
    for row, places in enumerate(batch.words):
        for column, at in enumerate(places):
            same = np.flatnonzero(token_ids[row, : batch.prompts.last()[row] + 1] == token_ids[row, at])
            assert len(same) == 2
            if token_ids[row, at] not in written.tokens[row]:
                expected = np.linalg.norm(residuals[row, same])
                assert norms[row, column] == pytest.approx(expected, rel=1e-4)
    reference = experiment.run(model, batch, ids(), layers=[1], factors=(1.0,), max_new_tokens=2, compat="reference")
    assert np.abs(reference.steered - plain.steered).max() > 1e-3
    with pytest.raises(InputError, match="max_new_tokens"):
        experiment.run(model, batch, ids(), layers=[1], compat="reference")


def test_comparison_of_runs(place: Path) -> None:
    swapped(place)
    shutil.copytree(place / "swap", place / "other")
    found = belief_swap.compare([place / "swap", place / "other"], place / "comparison")
    assert len(found) == 2
    names = {path.name for path in (place / "comparison").iterdir()}
    assert names == {"belief_swap.png", "accuracy_against_steerability.png", "comparison.json"}
    with pytest.raises(DataError, match="no summary"):
        belief_swap.compare([place / "data"], place / "comparison")


def test_default_layers_are_the_published_ones() -> None:
    assert list(belief_swap.default_layers("llava-7b", 32)) == list(range(7, 20))
    assert list(belief_swap.default_layers("mine", 8)) == list(range(8))
    assert list(belief_swap.default_layers("mine", 32)) == list(range(8, 21))


def test_mirror_swap(place: Path) -> None:
    summary = activation_swap.run(RunConfig(**options(place, "mirror")), "mirror")
    table = columns(place / "mirror")
    count = summary["items"]
    assert len(table["score"]) == 3 * oracle.LAYERS * count * 2
    quotient = (table["control"] - table["patched"]) / (table["control"] - table["intervened"])
    np.testing.assert_allclose(table["score"], quotient, rtol=1e-3, atol=1e-3)
    last = table["layer"] == oracle.LAYERS - 1
    np.testing.assert_allclose(table["score"][last & (table["tokens"] == "text")], 1, atol=1e-2)
    np.testing.assert_allclose(table["score"][last & (table["tokens"] == "image")], 0, atol=1e-2)
    assert (place / "mirror" / "mirror_swap.png").stat().st_size > 1000
    recoloured = activation_swap.run(RunConfig(**options(place, "attribute")), "attribute")
    assert recoloured["mean_change_of_answers"] != pytest.approx(summary["mean_change_of_answers"])


BAD_ROWS = {
    "malformed": [7, "A photo of a star"],
    "missing picture": [999, "A photo of a star above a fish", "A photo of a star below a fish"],
    "same name": [1, "A photo of a star above a star", "A photo of a star below a star"],
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_items_are_named_or_left_out(place: Path, kind: str, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data" / CAPTIONS_FILE
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows[:3], BAD_ROWS[kind], *rows[3:]]))
    config = steer.SteerConfig(
        **options(tmp_path, "out", ids=place / "ids.safetensors", layers="1", relation="above-below")
    )
    with pytest.raises((DataError, InputError), match=r"row 3|00003"):
        steer.run(config)
    summary = steer.run(dataclasses.replace(config, skip_bad=True, resume=True))
    (entry,) = summary["skipped"]["items"]
    assert summary["skipped"]["count"] == 1 and re.search("row 3|00003", entry["key"]), entry
    assert len(set(columns(tmp_path / "out")["item"])) == summary["items"]


def test_options_that_cannot_be(place: Path) -> None:
    for changed, named in (
        ({"compat": "wrong"}, "compat"),
        ({"case": "upper"}, "case"),
        ({"limit": 0}, "limit"),
        ({"batch_size": 0}, "batch_size"),
        ({"template": "no place"}, "query"),
        ({"split_words": "first"}, "split_words"),
    ):
        with pytest.raises(InputError, match=named):
            RunConfig(**options(place, "x", **changed))
    with pytest.raises(InputError, match="--ids"):
        steer.run(steer.SteerConfig(**options(place, "x", ids=None)))
    with pytest.raises(InputError, match="--data"):
        activation_swap.run(RunConfig(**options(place, "x", data=None)), "mirror")
    with pytest.raises(InputError, match="relation"):
        steer.SteerConfig(**options(place, "x", relation="over"))


@pytest.mark.parametrize(
    "text",
    [
        *[
            "3",
            "-1",
            "0-3",
            "a",
            "1,,2",
            "2-1",
            "",
            " ",
            ",",
            "\u00b2",
            "\u0661",
            "1-",
            "-",
            "1-2-3",
            "1.0",
            "+1",
            "0x1",
        ],
        *["0-99999999", "0-999999999999", "9" * 5000, "nan"],
    ],
)
def test_layers_out_of_range(text: str) -> None:
    with pytest.raises(InputError, match="layer"):
        parse_layers(text, fixtures.model(CASE), [0])


def test_layers_are_blocks_and_ranges() -> None:
    assert parse_layers("2,0-1,1", fixtures.model(CASE), [0]) == [0, 1, 2]
    assert parse_layers(None, fixtures.model(CASE), [2, 0]) == [0, 2]
    assert parse_layers(" 1 - 2 , 0-0", fixtures.model(CASE), []) == [0, 1, 2]


def test_an_answer_without_a_token_is_refused(place: Path) -> None:
    with pytest.raises(PromptError, match="Left"):
        steer.run(steer.SteerConfig(**options(place, "case", case="capital")))


def test_ids_of_another_model_are_refused(place: Path, tmp_path: Path) -> None:
    dataclasses.replace(ids(), fingerprint="of another").save(tmp_path / "ids.safetensors")
    with pytest.raises(InputError, match="of another"):
        belief_swap.run(belief_swap.BeliefSwapConfig(**options(place, "foreign", ids=tmp_path / "ids.safetensors")))


@pytest.mark.slow
def test_beliefs_of_the_shipped_model_turn_and_its_words_follow(tmp_path: Path) -> None:
    write_coco_spatial(tmp_path / "data", sample_free(np.random.default_rng(7), 32, num_objects=(2, 2)), 72)
    assert command("data", "grid", "--pair", "star,fish", "--picture-size", "96", "--out", tmp_path / "grid") == 0
    made = tmp_path / "ids.safetensors"
    assert command("ids", "extract", "--data", tmp_path / "grid", "--out", made) == 0
    arguments = ["--data", tmp_path / "data", "--ids", made, "--out", tmp_path / "out", "--factor", "1"]
    assert command("run", "belief-swap", *arguments, "--layers", "3-4", "--max-new-tokens", "8") == 0
    summary, table = json.loads((tmp_path / "out" / "summary.json").read_text()), columns(tmp_path / "out")
    assert summary["accuracy"] > 0.9 and summary["unanswered_items"] == 0
    assert summary["best"]["belief"] > 0.8 > 0.3 > summary["best"]["noise"]
    # What is written is what the first token prefers.
    preferred = np.where(table["steered_correct"] > table["steered_wrong"], "correct", "wrong")
    assert (table["verdict"] == preferred).mean() > 0.95
    words = {"left", "right", "above", "below"}
    assert set(table["text"]) <= words and (table["control_text"] == table["relation"]).mean() > 0.9
