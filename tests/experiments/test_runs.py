"""The runs: what they write equals the experiments' functions, they resume, and bad items are named or skipped."""

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
from run_data import CASE, ITEMS, columns, experiment, ids
from run_data import place as place
from test_cli import refused
from test_cli import run as command

from jaxid.data.coco_spatial import CAPTIONS_FILE, find_coco_spatial, read_coco_spatial, write_coco_spatial
from jaxid.data.scenes import sample_free
from jaxid.errors import DataError, InputError, JaxidWarning, OutputError, PromptError
from jaxid.experiments import activation_swap, belief_swap
from jaxid.experiments.activation_swap import AttributeSwap, MirrorSwap
from jaxid.experiments.belief_swap import BeliefSwap, BeliefSwapSummary, swap_beliefs
from jaxid.experiments.compare import Compare
from jaxid.experiments.reference import occurrence_norms, with_bugs
from jaxid.experiments.relations import prepare
from jaxid.experiments.session import parse_layers
from jaxid.families.base import Model
from jaxid.interp.generate import generate
from jaxid.interp.trace import trace

pytestmark = [
    # The tiny model knows few of the drawn objects by name.
    pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning"),
]


@functools.cache
def swapped(place: Path) -> BeliefSwapSummary:
    return experiment(BeliefSwap, place, "swap", strength=2.0, layers="0-1", max_new_tokens=0).run()


def test_belief_swap_writes_what_the_experiment_computes(place: Path) -> None:
    summary, table = swapped(place), columns(place / "swap")
    items = read_coco_spatial(*find_coco_spatial(place / "data"))
    assert summary.items == ITEMS and summary.skipped["count"] == 0
    assert summary.not_finite == {"count": 0, "items": []}
    assert len(table["item"]) == ITEMS * 2 * 2
    model = fixtures.model(CASE)
    order = list(dict.fromkeys(table["item"].tolist()))
    for axis, words in (("horizontal", ("left", "right")), ("vertical", ("above", "below"))):
        of_axis = [item for item in items if item.relation in words]
        some = (of_axis[:2] + of_axis[-2:])[:4]  # as many as the run's batches have: the same programs
        batch = prepare(model, some, case="both")
        indices = np.array([order.index(item.key) for item in some])
        expected = swap_beliefs(model, batch, ids(), layers=[0, 1], strengths=(2.0,), indices=indices)
        for row, item in enumerate(some):
            for index, condition in enumerate(belief_swap.CONDITIONS):
                for layer in (0, 1):
                    (at,) = np.flatnonzero(
                        (table["item"] == item.key) & (table["condition"] == condition) & (table["layer"] == layer)
                    )
                    truth = int(expected.truth[row])
                    steered = expected.steered[index, layer, 0, row]
                    found = [table[name][at] for name in ("steered_correct", "steered_wrong")]
                    np.testing.assert_allclose(found, steered[[truth, 1 - truth]], atol=1e-4)
                    found = [table[name][at] for name in ("control_correct", "control_wrong")]
                    np.testing.assert_allclose(found, expected.control[row][[truth, 1 - truth]], atol=1e-4)
                    assert table["swapped"][at] == expected.swapped[index, layer, 0, row]
                    assert table["text"][at] == expected.steered_texts[index, layer, 0, row]
                    assert (table["axis"][at], table["relation"][at]) == (axis, item.relation)


def test_belief_swap_files(place: Path) -> None:
    swapped(place)
    out = place / "swap"
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    pictures = {"belief_swap.png", "belief_swap_by_layer.png"}
    assert names == {"parts", "config.yaml", "settings.json", "summary.json", "table.parquet"} | pictures
    stored = json.loads((out / "summary.json").read_text())
    assert stored["best"]["belief"] == pytest.approx(swapped(place).best.belief)
    assert stored["settings"]["fingerprint"] == fixtures.model(CASE).fingerprint


def test_a_finished_run_is_not_computed_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped(place)
    shutil.copytree(place / "swap", place / "again")
    before = columns(place / "again")
    (place / "again" / "parts" / "00001.parquet").unlink()
    asked = []

    def spy(model: Model, batch: Any, *arguments: Any, **more: Any) -> Any:
        asked.append(len(batch.prompts))
        return swap_beliefs(model, batch, *arguments, **more)

    monkeypatch.setattr(belief_swap, "swap_beliefs", spy)
    again = experiment(BeliefSwap, place, "again", strength=2.0, layers="0-1", max_new_tokens=0)
    summary = again.run()
    assert sum(asked) in (4, 8) and summary.resumed_items == ITEMS - 4  # the lost chunk, of one axis or both
    after = columns(place / "again")
    assert set(after) == set(before)
    for name, values in before.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(after[name], values, atol=1e-5)
        else:
            np.testing.assert_array_equal(after[name], values)
    for changed, named in (({"strength": 3.0}, "strength"), ({"seed": 5}, "seed"), ({"layers": "0-2"}, "layers")):
        with pytest.raises(OutputError, match=rf"{named} was .*--restart"):
            dataclasses.replace(again, **changed).run()
    asked.clear()
    assert dataclasses.replace(again, restart=True).run().resumed_items == 0 and sum(asked) >= ITEMS


def test_reference_norms_count_every_occurrence(place: Path) -> None:
    """The published norm is over the word's tokens in prompt and answer together; the vectors are longer by that."""
    model = fixtures.model(CASE)
    items = oracle.items("horizontal")
    batch = prepare(model, items, prompt="{query} {query}")  # every word stands twice
    recorded = trace(model, batch.prompts)
    written = generate(model, recorded, max_new_tokens=2)
    norms = np.asarray(occurrence_norms(model, batch, recorded, written))[1]
    token_ids = np.asarray(batch.prompts.inputs.token_ids)
    residuals = oracle.torch_residuals(batch)[1]
    for row, places in enumerate(batch.words):
        for column, at in enumerate(places):
            same = np.flatnonzero(token_ids[row, : batch.prompts.last()[row] + 1] == token_ids[row, at])
            assert len(same) == 2
            if token_ids[row, at] not in written.tokens[row]:
                expected = np.linalg.norm(residuals[row, same])
                assert norms[row, column] == pytest.approx(expected, rel=1e-4)
    plain, published = (
        swap_beliefs(model, batch, ids(), layers=[1], strengths=(1.0,), max_new_tokens=2, norms=norms)
        for norms in (belief_swap.word_norms, occurrence_norms)
    )
    assert np.abs(published.steered - plain.steered).max() > 1e-3


def test_the_bugs_of_the_published_belief_swap(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms reach the edits, and the best layers are chosen on the items that are reported."""
    measured = []

    def spy(*arguments: Any) -> Any:
        measured.append(occurrence_norms(*arguments))
        return measured[-1]

    published = experiment(BeliefSwap, place, "bugs", reference_bugs=True, layers="1", max_new_tokens=2, limit=4)
    assert with_bugs(published).norms is occurrence_norms
    texts = ["It stands upright.", "left", "bright, leftover"]  # a word counts inside others
    assert [with_bugs(published).said(text, ["left", "right"]) for text in texts] == [1, 0, -1]
    assert [published.said(text, ["left", "right"]) for text in texts] == [-1, 0, -1]
    # What the tiny model writes is no answer.
    monkeypatch.setattr(type(with_bugs(published)), "said", staticmethod(lambda *_: 0))
    monkeypatch.setattr(type(with_bugs(published)), "norms", staticmethod(spy))
    assert published.run().best.chosen_on == "same items" and measured
    with pytest.raises(InputError, match="max_new_tokens"):
        dataclasses.replace(published, max_new_tokens=0).run()


def test_comparison_of_runs(place: Path) -> None:
    swapped(place)
    shutil.copytree(place / "swap", place / "other")
    compare = Compare((place / "swap", place / "other"), out=place / "comparison")
    found = compare.run()
    assert len(found) == 2
    for line, (name, entry) in zip(compare.report(found), found.items(), strict=True):
        assert line.startswith(name) and f"swapped {entry.best.belief:6.1%}" in line
    names = {path.name for path in (place / "comparison").iterdir()}
    assert names == {"belief_swap.png", "accuracy_against_steerability.png", "comparison.json"}
    with pytest.raises(DataError, match="no summary"):
        Compare((place / "data",), out=place / "comparison").run()


@pytest.mark.parametrize(
    ("name", "count", "expected"), [("llava-7b", 32, range(7, 20)), ("mine", 8, range(8)), ("mine", 32, range(8, 21))]
)
def test_default_layers_are_the_published_ones(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int, expected: range
) -> None:
    monkeypatch.setattr(Model, "num_layers", property(lambda _: count))
    swap = experiment(BeliefSwap, place, "x", model=name)
    assert list(swap.default_layers(fixtures.model(CASE))) == list(expected)


def test_mirror_swap(place: Path) -> None:
    mirror = experiment(MirrorSwap, place, "mirror")
    summary, table = mirror.run(), columns(place / "mirror")
    assert len(table["score"]) == 3 * oracle.LAYERS * summary.items * 2
    quotient = (table["control"] - table["patched"]) / (table["control"] - table["intervened"])
    np.testing.assert_allclose(table["score"], quotient, rtol=1e-3, atol=1e-3)
    last = table["layer"] == oracle.LAYERS - 1
    np.testing.assert_allclose(table["score"][last & (table["tokens"] == "text")], 1, atol=1e-2)
    np.testing.assert_allclose(table["score"][last & (table["tokens"] == "image")], 0, atol=1e-2)
    for tokens in ("image", "text", "words"):
        for layer in range(oracle.LAYERS):
            chosen = (table["tokens"] == tokens) & (table["layer"] == layer)
            medians = [np.median(table["score"][chosen & (table["word"] == word)]) for word in summary.words]
            np.testing.assert_allclose(summary.score_median[tokens][layer], medians, rtol=1e-5)
    assert (place / "mirror" / "mirror_swap.png").stat().st_size > 1000
    first, *scores, last_line = mirror.report(summary)
    assert first.startswith(f"median score of {summary.items} items by layer") and len(scores) == 6
    assert scores[2].split() == [
        "text",
        "left",
        *(f"{value:.2f}" + "," for value in summary.score_median["text"][:-1, 0]),
        "1.00",
    ]
    assert last_line == f"{summary.items} items"
    recoloured = experiment(AttributeSwap, place, "attribute").run()
    assert recoloured.mean_change_of_answers != pytest.approx(summary.mean_change_of_answers)


def test_published_swaps_score_unchanged_answers_0_and_draw_means(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that the changed picture leaves as it is has no score; the published code counts it as 0."""
    whole = activation_swap.swap_activations

    def unchanged(*arguments: Any, **more: Any) -> Any:
        found = whole(*arguments, **more)
        return dataclasses.replace(found, intervened=np.concatenate([found.control[:1], found.intervened[1:]]))

    monkeypatch.setattr(activation_swap, "swap_activations", unchanged)
    published = experiment(MirrorSwap, place, "published", reference_bugs=True, limit=4)
    summary, table = published.run(), columns(place / "published")
    first, middle = table["item"] == table["item"][0], table["layer"] == 1
    assert (table["score"][first] == 0).all() and not (table["score"][middle & ~first] == 0).any()
    assert summary.statistic == "mean" and "mean score of" in next(iter(published.report(summary)))
    plain = dataclasses.replace(published, out=place / "plain", reference_bugs=False)
    with pytest.warns(JaxidWarning, match="skipped"):
        assert plain.run().not_finite["items"] == [table["item"][0]]


BAD_ROWS = {
    "malformed": [7, "A photo of a star"],
    "missing picture": [999, "A photo of a star above a fish", "A photo of a star below a fish"],
    "same name": [1, "A photo of a star above a star", "A photo of a star below a star"],
}


def test_bad_items_are_named_or_skipped(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends a run by itself; a run that skips them lists all."""
    monkeypatch.setattr(BeliefSwap, "figures", lambda *_: ())
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data" / CAPTIONS_FILE
    rows = json.loads(path.read_text())
    swap = experiment(BeliefSwap, tmp_path, "out", ids=place / "ids.safetensors", layers="0-1", max_new_tokens=0)
    for name, row in BAD_ROWS.items():
        path.write_text(json.dumps([*rows[:3], row, *rows[3:]]))
        with pytest.raises((DataError, InputError), match=r"row 3|00003"):
            dataclasses.replace(swap, out=tmp_path / name).run()
    path.write_text(json.dumps([*rows[:3], *BAD_ROWS.values(), *rows[3:]]))
    summary = dataclasses.replace(swap, skip_bad=True).run()
    found = [entry["key"] for entry in summary.skipped["items"]]
    assert summary.skipped["count"] == 3
    for row in (3, 4, 5):
        assert sum(bool(re.search(f"row {row}|0000{row}", key)) for key in found) == 1, found
    assert len(set(columns(tmp_path / "out")["item"])) == summary.items
    assert "3 bad items skipped" in "".join(swap.report(summary))


def test_options_that_cannot_be(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changed, named in (
        ({"limit": 0}, "limit"),
        ({"batch_size": 0}, "batch_size"),
        ({"prompt": "no place"}, "query"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ):
        with pytest.raises(InputError, match=named):
            experiment(BeliefSwap, place, "x", **changed)
    for option in ("--case=upper", "--split-words=first", "--dtype=float8"):
        arguments = ("--data", place / "data", "--ids", place / "ids.safetensors", "--out", place / "x", option)
        assert option.partition("=")[2] in refused(capsys, "run", "belief-swap", *arguments)


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


def test_layers_are_indices_and_ranges() -> None:
    assert parse_layers("2,0-1,1", fixtures.model(CASE), [0]) == [0, 1, 2]
    assert parse_layers(None, fixtures.model(CASE), [2, 0]) == [0, 2]
    assert parse_layers(" 1 - 2 , 0-0", fixtures.model(CASE), []) == [0, 1, 2]


def test_an_answer_without_a_token_is_refused(place: Path) -> None:
    with pytest.raises(PromptError, match="Left"):
        experiment(BeliefSwap, place, "case", case="capital").run()


def test_ids_of_another_model_are_refused(place: Path, tmp_path: Path) -> None:
    dataclasses.replace(ids(), fingerprint="of another").save(tmp_path / "ids.safetensors")
    with pytest.raises(InputError, match="of another"):
        experiment(BeliefSwap, place, "foreign", ids=tmp_path / "ids.safetensors").run()


@pytest.mark.slow
def test_beliefs_of_the_shipped_model_are_swapped_and_its_words_follow(tmp_path: Path) -> None:
    write_coco_spatial(tmp_path / "data", sample_free(np.random.default_rng(7), 32, num_objects=(2, 2)), 72)
    assert command("data", "grid", "--pair", "star,fish", "--picture-size", "96", "--out", tmp_path / "grid") == 0
    made = tmp_path / "ids.safetensors"
    assert command("ids", "extract", "--data", tmp_path / "grid", "--out", made) == 0
    arguments = ["--data", tmp_path / "data", "--ids", made, "--out", tmp_path / "out", "--strength", "1"]
    assert command("run", "belief-swap", *arguments, "--layers", "3-4", "--max-new-tokens", "8") == 0
    summary, table = json.loads((tmp_path / "out" / "summary.json").read_text()), columns(tmp_path / "out")
    assert summary["accuracy"] > 0.9 and summary["unanswered_items"] == 0
    assert summary["best"]["belief"] > 0.8 > 0.3 > summary["best"]["noise"]
    # What is written is what the first token prefers.
    preferred = np.where(table["steered_correct"] > table["steered_wrong"], "correct", "wrong")
    assert (table["verdict"] == preferred).mean() > 0.95
    words = {"left", "right", "above", "below"}
    assert set(table["text"]) <= words and (table["control_text"] == table["relation"]).mean() > 0.9
