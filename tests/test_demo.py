"""The demo: its parts by hand, and (slowly) the whole of it, with the gates, on the model that ships."""

import base64
import gzip
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxid.data.coco_spatial import ANSWERS
from jaxid.data.grid import placements
from jaxid.data.objects import OBJECTS
from jaxid.experiments import demo, zoo_gates
from jaxid.experiments.belief_swap import Swapped
from jaxid.experiments.demo_report import render
from jaxid.experiments.zoo_gates import Gate, Gates
from jaxid.ids.spatial import SpatialIDs
from jaxid.io import read_table

pytestmark = pytest.mark.optimized

FIGURES = ("scenes", "id_plane", "variance", "belief_swap", "steering", "steering_map", "mirror_swap")
GEOMETRY = (
    "explained_variance",
    "id_agreement",
    "column_correlation",
    "row_correlation",
    "axes_cosine",
    "column_gap",
    "row_gap",
    "row_share",
    "column_share",
)


def swap(swapped: np.ndarray) -> Swapped:
    """A belief swap in which exactly the given items [condition, layer, strength, item] are swapped."""
    control = np.tile([-0.5, -1.5], (swapped.shape[-1], 1))
    return Swapped(
        control=control,
        steered=np.where(swapped[..., None], control[:, ::-1], control),
        layers=np.arange(swapped.shape[1]),
        strengths=np.arange(1.0, 1 + swapped.shape[2]),
        truth=np.zeros(swapped.shape[-1], int),
        control_texts=np.full(swapped.shape[-1], "", object),
        steered_texts=np.full(swapped.shape, "", object),
    )


def test_choose_best_weighs_belief_against_noise_on_the_chosen_items_alone() -> None:
    swapped = np.zeros((2, 3, 2, 8), bool)
    swapped[0, 0, 1, 4:] = True  # many, but among the items that are reported, not chosen on
    swapped[:, 1, 0] = True  # all, but by noise as well
    swapped[0, 2, 1, :3] = True
    swapped[0, 2, 0, :2] = True
    other = np.zeros_like(swapped)
    other[0, 2, 0, :1] = True
    assert demo.choose_best({"horizontal": swap(swapped), "vertical": swap(other)}, 4) == (2, 0)
    assert demo.choose_best({"horizontal": swap(swapped)}, 4) == (2, 1)
    assert demo.choose_best({"horizontal": swap(swapped)}, 8) == (0, 1)


def test_grid_items_cover_every_placement_of_every_object() -> None:
    pairs, total, items = demo.grid_items(2, seed=3)
    assert Counter(b for _, b in pairs) == dict.fromkeys(OBJECTS, 2)
    assert len(set(pairs)) == len(pairs) == 32 and all(a != b for a, b in pairs)
    assert total == 32 * 240
    first = list(itertools.islice(items, 241))
    assert [(item.cell_a, item.cell_b) for item in first[:240]] == placements()
    assert {(item.object_a, item.object_b) for item in first[:240]} == {pairs[0]}
    assert (first[240].object_a, first[240].object_b) == pairs[1]
    assert len({np.asarray(item.picture).tobytes() for item in first}) == 241
    # B is where it is said to be: between two pictures that differ in its cell, the picture changes there.
    again = next(demo.grid_items(2, seed=3)[2])
    np.testing.assert_array_equal(np.asarray(again.picture), np.asarray(first[0].picture))
    assert demo.grid_items(2, seed=4)[0] != pairs


def synthetic_summary() -> dict[str, Any]:
    """A summary of three layers in which every number is another one."""
    numbers = (round(0.101 + 0.001 * k, 3) for k in itertools.count())

    def per_layer() -> list[float]:
        return [next(numbers) for _ in range(3)]

    def condition() -> dict[str, Any]:
        return {"rate": per_layer(), "interval": [[next(numbers), next(numbers)] for _ in range(3)]}

    steering = {"correlation": per_layer(), "monotone": [True, False, True], "preference_by_cell": [[0.0] * 4] * 3}
    return {
        "model": "some-model",
        "fingerprint": "abc123",
        "seconds": 12.5,
        "accuracy": {"left_right": next(numbers), "above_below": next(numbers)},
        "accuracy_interval": {name: [next(numbers), next(numbers)] for name in ("left_right", "above_below")},
        **{name: per_layer() for name in GEOMETRY},
        "word_angles": {"left_right": [11.0, 22.0, 33.0], "above_below": [44.0, 55.0, 66.0]},
        "best_layer": 1,
        "best_factor": 2.0,
        "belief_swap": per_layer(),
        "noise_swap": per_layer(),
        "swap_by_factor": {factor: {"belief": next(numbers), "noise": next(numbers)} for factor in ("2.0", "5.0")},
        "swap_by_relation": {"left_right": {"belief": condition(), "noise": condition()}},
        "swap_items": {"choosing": 24, "reported": 72, "per": "relation"},
        "steering": {"left_right": steering, "above_below": steering},
        "mirror_swap": {name: per_layer() for name in ("image", "text", "words")},
        "versions": {"jax": "9.8.7", "python": "3.99"},
    }


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_report_shows_every_number_and_figure() -> None:
    summary = synthetic_summary()
    text = render(summary)
    assert re.findall(r"!\[[^]]+\]\(figures/(\w+)\.png\)", text) == list(FIGURES)
    for line in ("some-model", "abc123", "12.5 s", "jax 9.8.7", "24 items per relation", "other 72", "here 2.0"):
        assert line in text
    rows = table_rows(text)
    for name, value in summary["accuracy"].items():
        low, high = summary["accuracy_interval"][name]
        assert [name, f"{value:.1%}".replace("%", " %"), f"{100 * low:.1f} % to {100 * high:.1f} %"] in rows
    columns = ("explained_variance", "column_share", "row_share", "id_agreement", "column_correlation")
    columns += ("row_correlation", "axes_cosine", "column_gap", "row_gap")
    for k in range(3):
        assert [str(k), *(f"{summary[name][k]:.3f}" for name in columns)] in rows
        assert [str(k), *(f"{angles[k]:.0f}" for angles in summary["word_angles"].values())] in rows
        assert [str(k), *(f"{100 * summary[name][k]:.1f} %" for name in ("belief_swap", "noise_swap"))] in rows
        assert [str(k), *(f"{summary['mirror_swap'][name][k]:.3f}" for name in ("image", "text", "words"))] in rows
        monotone = "no" if k == 1 else "yes"
        cell = f"{summary['steering']['left_right']['correlation'][k]:.3f}, {monotone}"
        assert [str(k), cell, cell] in rows
    for factor, entry in summary["swap_by_factor"].items():
        assert [factor, *(f"{100 * entry[name]:.1f} %" for name in ("belief", "noise"))] in rows
    entry = summary["swap_by_relation"]["left_right"]
    shown = ["left/right"]
    for name in ("belief", "noise"):  # at the best layer
        low, high = entry[name]["interval"][1]
        shown += [f"{100 * entry[name]['rate'][1]:.1f} %", f"{100 * low:.1f} % to {100 * high:.1f} %"]
    assert shown in rows
    # Every table is whole: as many cells in each row as in its header.
    for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        assert len({len(row) for row in table_rows(table)}) == 1


# --- the whole of it -----------------------------------------------------------------------------------------------


SETTINGS = demo.Demo()

Done = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Gate]]:
    """The gates of one seed that the model card does not report, and their folder."""
    out = tmp_path_factory.mktemp("gates") / "out"
    return out, Gates(out=out, seeds=1, seed=131, progress=False).run()


@pytest.fixture(scope="module")
def done(gates: tuple[Path, list[Gate]]) -> Done:
    """The folder of the demo among them, and its summary."""
    out = gates[0] / "seed-131"
    return out, json.loads((out / "summary.json").read_text())


def columns_of(path: Path) -> dict[str, np.ndarray]:
    table = read_table(path)
    return {name: np.asarray(table[name].to_pylist()) for name in table.column_names}


@pytest.mark.slow
def test_summary_is_complete(done: Done) -> None:
    _, summary = done
    assert {"left_right", "above_below"} <= set(summary["accuracy"])
    layers = 8
    for name in (*GEOMETRY, "belief_swap", "noise_swap"):
        assert len(summary[name]) == layers, name
        assert all(isinstance(value, float) and math.isfinite(value) for value in summary[name]), name
    for name in ("explained_variance", "row_share", "column_share", "belief_swap", "noise_swap"):
        assert all(0 <= value <= 1 for value in summary[name]), name
    for name in ("id_agreement", "column_correlation", "row_correlation", "axes_cosine"):
        assert all(-1 <= value <= 1 for value in summary[name]), name
    strengths = SETTINGS.strengths
    assert list(summary["swap_by_factor"]) == [str(strength) for strength in strengths]
    assert all(set(entry) == {"belief", "noise"} for entry in summary["swap_by_factor"].values())
    assert summary["best_layer"] in range(layers) and summary["best_factor"] in strengths
    at_best = summary["swap_by_factor"][str(summary["best_factor"])]
    assert at_best["belief"] == summary["belief_swap"][summary["best_layer"]]
    assert at_best["noise"] == summary["noise_swap"][summary["best_layer"]]
    assert summary["seconds"] > 0
    assert {"jaxid-vlm", "jax", "python"} <= set(summary["versions"])
    for entry in summary["steering"].values():
        assert np.shape(entry["preference_by_cell"]) == (layers, 4)
    assert {name: len(values) for name, values in summary["mirror_swap"].items()} == dict.fromkeys(
        ("image", "text", "words"), layers
    )


@pytest.mark.slow
def test_figures_are_drawn_and_reported(done: Done) -> None:
    out, _ = done
    assert sorted(path.name for path in (out / "figures").iterdir()) == sorted(f"{name}.png" for name in FIGURES)
    text = (out / "report.md").read_text()
    for name in FIGURES:
        assert f"(figures/{name}.png)" in text
        with Image.open(out / "figures" / f"{name}.png") as picture:
            assert picture.format == "PNG" and min(picture.size) >= 300
            pixels = np.asarray(picture.convert("RGB"))
        assert pixels.std() > 10 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100, name
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml",
        "figures",
        "report.md",
        "results",
        "summary.json",
        "view.html",
    ]


@pytest.mark.slow
def test_the_page_shows_the_tables(done: Done) -> None:
    out, summary = done
    page = (out / "view.html").read_text()
    found = re.search(r'<script type="application/json" id="manifest">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    swap, *others = json.loads(found[1])["contents"]
    assert [one["title"] for one in others] == ["steering · left/right", "steering · above/below", "mirror swap"]
    assert len(swap["items"]["key"]) == 2 * SETTINGS.swap_items and set(swap["items"]["truth"]) == {0}
    record = json.loads(found[1])["arrays"][swap["values"][0]["array"]]
    block = gzip.decompress(base64.b64decode(page.partition('id="arrays">')[2].partition("</script>")[0]))
    swapped = np.frombuffer(block, "<f4", math.prod(record["shape"]), record["offset"]).reshape(record["shape"])
    entries = dict(swap["axes"])
    strength = entries["strength"].index(str(summary["best_factor"]))
    reported = swapped.reshape(2, SETTINGS.swap_items, *swapped.shape[1:])[:, SETTINGS.swap_items // 4 :]
    np.testing.assert_allclose(reported.mean(axis=(0, 1))[0, :, strength], summary["belief_swap"], atol=1e-4)


@pytest.mark.slow
def test_swap_table_gives_the_rates(done: Done) -> None:
    out, summary = done
    table = columns_of(out / "results" / "belief_swap.parquet")
    config = SETTINGS
    choosing = config.swap_items // 4
    reported = table["item"] >= choosing
    counted = config.swap_items - choosing
    assert summary["swap_items"] == {"choosing": choosing, "reported": counted, "per": "relation"}

    def rate(axis: str, condition: str, layer: int, strength: float) -> float:
        """Share of items whose preferred word is no longer that of the control pass."""
        rows = reported & (table["relation"] == axis) & (table["condition"] == condition)
        rows &= (table["layer"] == layer) & np.isclose(table["strength"], strength)
        first, second = (rows & (table["word"] == word) for word in ANSWERS[axis])
        np.testing.assert_array_equal(table["item"][first], table["item"][second])
        assert first.sum() == counted
        preferred = table["logprob"][first] > table["logprob"][second]
        return float((preferred != (table["control"][first] > table["control"][second])).mean())

    for condition in ("belief", "noise"):
        for layer in range(8):
            rates = {axis: rate(axis, condition, layer, summary["best_factor"]) for axis in ANSWERS}
            assert summary[f"{condition}_swap"][layer] == pytest.approx(np.mean(list(rates.values())), abs=1e-4)
            for axis, value in rates.items():
                entry = summary["swap_by_relation"]["_".join(ANSWERS[axis])][condition]
                assert entry["rate"][layer] == pytest.approx(value, abs=1e-4)
                assert entry["interval"][layer][0] <= value <= entry["interval"][layer][1]
        for strength in config.strengths:
            mean = np.mean([rate(axis, condition, summary["best_layer"], strength) for axis in ANSWERS])
            assert summary["swap_by_factor"][str(strength)][condition] == pytest.approx(mean, abs=1e-4)
    for axis in ANSWERS:
        once = (table["relation"] == axis) & (table["condition"] == "belief") & (table["layer"] == 0)
        once &= np.isclose(table["strength"], config.strengths[0])
        first = once & (table["word"] == ANSWERS[axis][0])
        second = once & (table["word"] == ANSWERS[axis][1])
        says_first = table["control"][first] > table["control"][second]
        right = (says_first == (table["truth"][first] == ANSWERS[axis][0])).mean()
        assert summary["control_accuracy"]["_".join(ANSWERS[axis])] == pytest.approx(right, abs=1e-4)


@pytest.mark.slow
def test_other_tables_agree_with_the_summary(done: Done) -> None:
    out, summary = done
    accuracy = columns_of(out / "results" / "accuracy.parquet")
    for question, value, count in zip(accuracy["question"], accuracy["value"], accuracy["count"], strict=True):
        assert summary["accuracy"][question] == pytest.approx(value, abs=1e-4)
        assert count > SETTINGS.accuracy_questions / 2  # few scenes allow some kinds of questions
    geometry = columns_of(out / "results" / "ids_by_layer.parquet")
    assert geometry["layer"].tolist() == list(range(8))
    for name in GEOMETRY:
        np.testing.assert_allclose(geometry[name], summary[name], atol=1e-9)
    ids = SpatialIDs.load(out / "results" / "spatial_ids.safetensors")
    assert (ids.model, ids.fingerprint) == (summary["model"], summary["fingerprint"])
    assert ids.objects == tuple(OBJECTS) and (ids.counts == 15 * SETTINGS.partners).all()
    np.testing.assert_allclose(ids.explained_variance(), summary["explained_variance"], atol=1e-4)
    for axis, words in ANSWERS.items():
        steering = columns_of(out / "results" / f"steering_{axis}.parquet")
        along = steering["x" if axis == "horizontal" else "y"]
        entry = summary["steering"]["_".join(words)]
        for layer, cell in np.ndindex(8, 4):
            rows = (steering["layer"] == layer) & (along == cell)
            first, second = (steering["change"][rows & (steering["word"] == word)].mean() for word in words)
            assert entry["preference_by_cell"][layer][cell] == pytest.approx(first - second, abs=1e-3)
    mirror = columns_of(out / "results" / "mirror_swap.parquet")
    for name, values in summary["mirror_swap"].items():
        for layer, value in enumerate(values):
            here = (mirror["tokens"] == name) & (mirror["layer"] == layer)
            medians = [np.median(mirror["score"][here & (mirror["word"] == word)]) for word in ANSWERS["horizontal"]]
            assert summary["mirror_swap_by_word"][name][layer] == pytest.approx(medians, abs=1e-3)
            assert value == pytest.approx(np.mean(medians), abs=1e-3)


@pytest.mark.slow
def test_ids_are_causal(done: Done) -> None:
    """What the demo is there to show."""
    _, summary = done
    best = summary["best_layer"]
    assert min(summary["accuracy"][name] for name in ("left_right", "above_below")) > 0.95
    assert summary["belief_swap"][best] > summary["noise_swap"][best] + 0.3
    assert max(summary["explained_variance"]) > 0.4


@pytest.mark.slow
def test_every_gate_is_passed(gates: tuple[Path, list[Gate]]) -> None:
    out, found = gates
    assert [gate for gate in found if not gate.passed] == []
    assert {gate.name for gate in found if gate.bounds != "no bound"} >= {
        *(f"correct: {kind}" for kind in zoo_gates.ACCURACY),
        "steering: near_far",
        "steering: between",
        "angle of the words above and below",
    }
    assert [row["name"] for row in json.loads((out / "gates.json").read_text())] == [gate.name for gate in found]
