"""The deviation against a re-derivation from PyTorch's hidden states, its tests by hand, and the run."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
from families import CASES, over
from families.base import Case
from run_data import columns, experiment
from scipy import stats
from test_cli import refused
from test_cli import run as command

from jaxid.data.coco_boxes import find_instances, read_instances
from jaxid.data.coco_spatial import INSTANCES_FILE, find_coco_spatial, read_coco_spatial, write_coco_spatial
from jaxid.data.scenes import sample_free
from jaxid.errors import DataError, InputError, OutputError
from jaxid.experiments import deviation
from jaxid.experiments.deviation import ROLES, Deviation, Deviations, DeviationSummary, easy, gap, measure_deviations
from jaxid.experiments.reference import with_bugs
from jaxid.experiments.relations import prepare
from jaxid.interp.forward import forward
from jaxid.nn.sites import Capture
from jaxid.stats import rank_test

pytestmark = [
    # The random models' vocabulary lacks most of what the drawn pictures hold.
    pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning"),
]

CASE = CASES[0]
BOXES = np.random.default_rng(3).uniform(0.05, 0.45, (4, 2, 4))
BOXES[1] = [[0.79, 0.29, 0.02, 0.02], [0.7, 0.72, 0.2, 0.2]]  # beyond 3/4 of the width, and of both sides
ITEMS = 10


# The steps of the run, as we have them and as the published code does.
STEPS = {
    bugs: with_bugs(one) if bugs else one
    for one in [Deviation(out=Path("out"), data=Path("data"), ids=Path("ids.safetensors"))]
    for bugs in (False, True)
}


@functools.cache
def found(axis: str, bugs: bool = False) -> Deviations:
    model, batch = fixtures.model(CASE), oracle.batch(axis)
    return measure_deviations(model, batch, oracle.ids(), BOXES, true_ids=STEPS[bugs].true_ids)


def true_id(layer: int, box: np.ndarray, bug: bool, universal: np.ndarray) -> np.ndarray:
    """The bilinear mix of the four cells around a box's centre, by floors and ceilings."""
    places = 4 * (box[:2] + box[2:] / 2) - (0 if bug else 0.5)
    x, y = places if bug else np.clip(places, 0, 3)
    (x0, y0), (x1, y1) = (int(x), int(y)), (min(int(x) + 1, 3), min(int(y) + 1, 3))
    right, down = x - x0, y - y0
    cells = universal[layer]
    if bug:  # the four weights have the cells as keys; of two weights of the same cell, the later one counts
        keys = [(x0, y0), (x1, y0), (x0, y1), (x1, y1)]
        weights = [(1 - right) * (1 - down), right * (1 - down), (1 - right) * down, right * down]
        return np.sum([weight * cells[key] for key, weight in dict(zip(keys, weights, strict=True)).items()], axis=0)
    upper = (1 - right) * cells[x0, y0] + right * cells[x1, y0]
    lower = (1 - right) * cells[x0, y1] + right * cells[x1, y1]
    return (1 - down) * upper + down * lower


def plane(layer: int, universal: np.ndarray) -> np.ndarray:
    """The two directions [D, 2] of a layer's IDs: mean steps to the right and down, made orthonormal."""
    cells = universal[layer]
    steps = [
        np.mean([across[b] - across[a] for a in range(4) for b in range(a + 1, 4)], axis=(0, 1))
        for across in (cells, cells.swapaxes(0, 1))
    ]
    u = steps[0] / np.linalg.norm(steps[0])
    v = steps[1] - steps[1] @ u * u
    return np.stack([u, v / np.linalg.norm(v)], axis=1)


@pytest.mark.parametrize(("axis", "bugs"), [("horizontal", False), ("vertical", False), ("horizontal", True)])
def test_margins_equal_those_from_pytorchs_hidden_states(axis: str, bugs: bool) -> None:
    batch = oracle.batch(axis)
    text = fixtures.model(CASE).prepare(None, list(batch.prompts.questions))
    shown, alone = oracle.torch_residuals(batch), fixtures.record(CASE, text)["resid_post"]
    tokens = [np.asarray(prompts.inputs.token_ids).tolist() for prompts in (batch.prompts, text)]
    along = 0 if axis == "horizontal" else 1
    for row, pair in enumerate(oracle.PAIRS):
        here, there = ([own[row].index(oracle.VOCABULARY.index(word)) for word in pair] for own in tokens)
        assert here != there
        for layer in range(oracle.LAYERS):
            basis = plane(layer, oracle.universal())
            e = (shown[layer, row, here] - alone[layer, row, there]) @ basis
            g = np.stack([true_id(layer, box, bugs, oracle.universal()) for box in BOXES[row]]) @ basis
            np.testing.assert_allclose(found(axis, bugs).words[layer, row], e, atol=1e-4)
            np.testing.assert_allclose(found(axis, bugs).places[layer, row], g, atol=1e-4)
            sign = {"left": -1, "above": -1, "right": 1, "below": 1}[batch.answers[oracle.TRUTHS[row]]]
            margin = sign * (e[0, along] - e[1, along]) - sign * (g[0, along] - g[1, along])
            assert found(axis, bugs).margins[layer, row] == pytest.approx(margin, abs=1e-3)
    control = oracle.torch_logprobs(batch)
    np.testing.assert_allclose(found(axis, bugs).control, control, atol=1e-4)
    np.testing.assert_array_equal(found(axis, bugs).correct, control.argmax(axis=1) == oracle.TRUTHS)
    assert np.abs(found(axis).places - found(axis, True).places).max() > 0.01


def test_a_cells_centre_has_its_id_and_the_bug_is_half_a_cell() -> None:
    model, batch = fixtures.model(CASE), oracle.batch("horizontal")
    boxes = np.tile([1.25 / 4, 2.25 / 4, 0.5 / 4, 0.5 / 4], (4, 2, 1))  # the centre of cell (1, 2)
    places = {
        bugs: measure_deviations(model, batch, oracle.ids(), boxes, layers=[1], true_ids=steps.true_ids).places[0, 0, 0]
        for bugs, steps in STEPS.items()
    }
    cells = oracle.universal()[1]
    basis = plane(1, oracle.universal())
    np.testing.assert_allclose(places[False], cells[1, 2] @ basis, atol=1e-4)
    np.testing.assert_allclose(places[True], cells[1:3, 2:4].mean(axis=(0, 1)) @ basis, atol=1e-4)


def test_gaps_by_hand() -> None:
    coordinates = np.array([[[1.0, 8], [4, 2]], [[1, 8], [4, 2]]])
    np.testing.assert_array_equal(gap(coordinates, "horizontal", np.array([0, 1])), [3, -3])  # left: 4 - 1
    np.testing.assert_array_equal(gap(coordinates, "vertical", np.array([0, 1])), [-6, 6])  # below: 8 - 2
    one = dataclasses.replace(found("horizontal"), words=found("horizontal").places)
    np.testing.assert_array_equal(one.margins, 0)


def test_items_and_layers_do_not_depend_on_their_company() -> None:
    model, items = fixtures.model(CASE), oracle.items("horizontal")
    whole = found("horizontal")
    for row, item in enumerate(items):
        alone = measure_deviations(model, prepare(model, [item]), oracle.ids(), BOXES[row : row + 1], layers=[2, 0])
        np.testing.assert_allclose(alone.margins[:, 0], whole.margins[[2, 0], row], atol=1e-3)
        np.testing.assert_array_equal(alone.layers, [2, 0])


@over(("mllama",), ("mllama", "qwen2.5-vl-windows"))
def test_other_families(case: Case) -> None:
    model, items = fixtures.model(case), oracle.items("vertical")[:2]
    batch, ids = prepare(model, items), oracle.ids(model.num_layers, model.width)
    result = measure_deviations(model, batch, ids, BOXES[:2])
    text = model.prepare(None, list(batch.prompts.questions))
    shown, alone = (
        np.asarray(forward(model, prompts, capture=Capture(("resid_post",))).captured["resid_post"])
        for prompts in (batch.prompts, text)
    )
    universal = ids.values[:, :, 0].astype(float).mean(axis=1)
    for row, pair in enumerate(oracle.PAIRS[:2]):
        tokens = [np.asarray(prompts.inputs.token_ids)[row].tolist() for prompts in (batch.prompts, text)]
        numbers = [model.processor.tokenizer.convert_tokens_to_ids(word) for word in pair]
        here, there = ([own.index(number) for number in numbers] for own in tokens)
        for layer in range(model.num_layers):
            e = (shown[layer, row, here] - alone[layer, row, there]) @ plane(layer, universal)
            np.testing.assert_allclose(result.words[layer, row], e, atol=1e-3)


def test_input_that_does_not_fit() -> None:
    model, batch = fixtures.model(CASE), oracle.batch("horizontal")
    with pytest.raises(InputError, match="4 items"):
        measure_deviations(model, batch, oracle.ids(), BOXES[:3])
    with pytest.raises(InputError, match="layer"):
        measure_deviations(model, batch, oracle.ids(), BOXES, layers=[3])
    with pytest.raises(InputError, match="width"):
        measure_deviations(model, batch, oracle.ids(3, 16), BOXES)


def test_rank_test_of_a_hand_made_table() -> None:
    right, wrong = np.array([3.0, 1, 4, 1, 5, 9, 2, 6]), np.array([2.0, 1, 0, -3, 4])
    tested: Any = rank_test(right, wrong)
    u = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    assert tested["u"] == u and tested["auc"] == u / 40
    for name, side in (("p_two_sided", "two-sided"), ("p_greater", "greater"), ("p_less", "less")):
        assert tested[name] == stats.mannwhitneyu(right, wrong, alternative=side).pvalue
    assert tested["p_greater"] < 0.1 < 0.9 < tested["p_less"]
    assert rank_test(wrong, right)["auc"] == pytest.approx(1 - tested["auc"])
    assert set(rank_test(right, wrong[:0]).values()) == {None}
    assert rank_test(np.ones(3), np.ones(2))["auc"] == 0.5


def test_halves() -> None:
    np.testing.assert_array_equal(easy(np.array([0.5, -1, 7, 0])), [True, False, True, False])
    np.testing.assert_array_equal(easy(np.array([0.5, -1, 7, 0, 2])), [True, False, True, False, True])
    np.testing.assert_array_equal(easy(np.zeros(4)), [False, False, True, True])


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deviation")
    write_coco_spatial(folder / "data", sample_free(np.random.default_rng(1), ITEMS, num_objects=(2, 2)), 48)
    dataclasses.replace(oracle.ids(), fingerprint=fixtures.model(CASE).fingerprint).save(folder / "ids.safetensors")
    return folder


@functools.cache
def whole(place: Path) -> DeviationSummary:
    return experiment(Deviation, place, "out").run()


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose figures are drawn in another test."""
    monkeypatch.setattr(Deviation, "figures", lambda *_: ())


def test_table_holds_what_the_experiment_computes(place: Path) -> None:
    summary, table = whole(place), columns(place / "out")
    assert summary.items == ITEMS and len(table["x"]) == ITEMS * oracle.LAYERS * 2
    model, instances = fixtures.model(CASE), read_instances(find_instances(place / "data"))
    ids = oracle.ids()
    for item in read_coco_spatial(*find_coco_spatial(place / "data"))[:3]:
        placed = instances.locate(item)
        boxes = np.stack([placed.shares] * 4)  # as many as the run's batches have: the same programs
        one = measure_deviations(model, prepare(model, [item] * 4, case="both"), ids, boxes)
        for layer in range(oracle.LAYERS):
            for role, name in enumerate(ROLES):
                (at,) = np.flatnonzero(
                    (table["item"] == item.key) & (table["layer"] == layer) & (table["role"] == name)
                )
                assert (table["x"][at], table["y"][at]) == pytest.approx(one.words[layer, 0, role], abs=1e-3)
                truth = table["true_x"][at], table["true_y"][at]
                assert truth == pytest.approx(one.places[layer, 0, role], abs=1e-4)
                assert table["margin"][at] == pytest.approx(one.margins[layer, 0], abs=1e-3)
                assert (
                    table["name"][at] == table[name][at] == getattr(item, name)
                    and table["correct"][at] == one.correct[0]
                )
                box = [table[f"box_{part}"][at] for part in ("x", "y", "width", "height")]
                assert box == pytest.approx(placed.boxes[role])


def test_summary_is_of_the_table(place: Path) -> None:
    summary, table = whole(place), columns(place / "out")
    assert summary.layer == 1  # as deep as layer 11 of 32
    chosen = (table["layer"] == 1) & (table["role"] == "subject")
    margin, correct, item = (table[name][chosen] for name in ("margin", "correct", "item"))
    assert summary.accuracy == pytest.approx(correct.mean()) and 0 < correct.sum() < ITEMS
    expected = stats.mannwhitneyu(margin[correct], margin[~correct])
    assert summary.mann_whitney["u"] == expected.statistic
    assert summary.mann_whitney["p_two_sided"] == pytest.approx(expected.pvalue, rel=1e-5)
    ranked = item[np.argsort(margin)]
    files = {name: json.loads((place / "out" / f"{name}.json").read_text()) for name in ("easy", "hard")}
    assert sorted(files["hard"]) == sorted(ranked[:5]) and sorted(files["easy"]) == sorted(ranked[5:])
    for name in ("easy", "hard"):
        half: Any = summary.halves[name]
        assert half["accuracy"] == pytest.approx(correct[np.isin(item, files[name])].mean())
        assert half["interval"][0] < half["accuracy"] < half["interval"][1] or half["accuracy"] in (0, 1)
    assert [one.layer for one in summary.by_layer] == [0, 1, 2]
    assert set(summary.by_axis) == {"horizontal", "vertical"}
    assert summary.boxes_against_relation == []  # drawn scenes are as their captions say
    names = {path.name for path in (place / "out").iterdir() if not path.name.startswith(".")}
    written = {"parts", "config.yaml", "settings.json", "summary.json", "table.parquet", "easy.json", "hard.json"}
    assert names == written | {"deviation.png", "deviation_by_layer.png"}


@pytest.mark.usefixtures("no_figures")
def test_a_stopped_run_is_resumed_to_the_same_table(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(place)
    original, calls = measure_deviations, []

    def stopping(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(deviation, "measure_deviations", stopping)
        with pytest.raises(KeyboardInterrupt):
            experiment(Deviation, place, tmp_path / "out").run()
    summary = experiment(Deviation, place, tmp_path / "out", layer=2).run()  # that layer is in the table already
    assert 0 < summary.resumed_items < ITEMS and summary.layer == 2
    before, after = columns(place / "out"), columns(tmp_path / "out")
    assert list(before) == list(after)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
    with pytest.raises(OutputError, match="reference bugs"):
        experiment(Deviation, place, tmp_path / "out", reference_bugs=True).run()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("kind", ["outside", "missing", "malformed"])
def test_bad_boxes_are_named_or_skipped(place: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data" / INSTANCES_FILE
    content = json.loads(path.read_text())
    annotation = next(entry for entry in content["annotations"] if entry["image_id"] == 4)
    if kind == "missing":
        content["annotations"].remove(annotation)
    else:
        annotation["bbox"] = [40, 40, 20, 20] if kind == "outside" else [1, 2]
    path.write_text(json.dumps(content))
    bad = experiment(Deviation, tmp_path, "out", ids=place / "ids.safetensors", layers="1")
    with pytest.raises(DataError, match=r"item '00003-.*--skip-bad"):
        bad.run()
    summary = dataclasses.replace(bad, skip_bad=True).run()
    (entry,) = summary.skipped["items"]
    assert entry["key"].startswith("00003-") and str(path) in entry["reason"]
    assert summary.items == ITEMS - 1 == len(set(columns(tmp_path / "out")["item"]))


@pytest.mark.usefixtures("no_figures")
def test_one_line_of_a_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = ["run", "deviation", "--model", fixtures.folder(CASE), "--ids", place / "ids.safetensors"]
    arguments += ["--prompt", "{query}", "--out", tmp_path / "out", "--limit", "3", "--batch-size", "4"]
    capsys.readouterr()
    assert "no coco_qa_two_obj.json" in refused(capsys, *arguments, "--data", tmp_path)
    assert "layer 9 is out of range" in refused(capsys, *arguments, "--data", place / "data", "--layer", "9")
    (tmp_path / "data").mkdir()
    shutil.copytree(place / "data", tmp_path / "data", dirs_exist_ok=True)
    (tmp_path / "data" / INSTANCES_FILE).write_text("{")
    assert "cannot be read as a JSON file" in refused(capsys, *arguments, "--data", tmp_path / "data")
    (tmp_path / "data" / INSTANCES_FILE).unlink()
    assert f"no {INSTANCES_FILE}" in refused(capsys, *arguments, "--data", tmp_path / "data")
    assert command(*arguments, "--data", place / "data", "--layer", "0", "--layers", "2") == 0
    line, written = capsys.readouterr().out.splitlines()
    assert written == str(tmp_path / "out" / "summary.json")
    assert line.startswith("3 items, ") and "layer 0" in line
    assert set(columns(tmp_path / "out")["layer"]) == {0, 2}


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("llava-7b", 32, 11),  # hidden state 12 is the output of block 11
        ("llava-hf/llava-1.5-7b-hf", 32, 11),
        ("llama-11b", 40, 13),
        ("mine", 28, round(11 * 28 / 32)),
    ],
)
def test_default_layers_are_the_published_ones(name: str, layers: int, expected: int) -> None:
    sized = SimpleNamespace(text_config=SimpleNamespace(num_hidden_layers=layers))
    model = dataclasses.replace(fixtures.model(CASE), config=sized)
    assert dataclasses.replace(STEPS[False], model=name).chosen_layer(model) == expected
