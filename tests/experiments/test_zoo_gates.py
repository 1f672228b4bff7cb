"""The gates of tiny-llava: what is pooled over seeds, which way it is aligned, and what passes."""

from typing import Any

import numpy as np
import pytest

from jaxid.experiments import zoo_gates
from jaxid.experiments.zoo_gates import Gate, Run

GOOD = {"rate": [0.1, 1.0], "interval": [[0, 1]] * 2}
LATE = {"image": [1.0, 1.0], "words": [0.0, 1.0]}
BENT = {"preference_by_cell": [[3.0, 1.0, -1.0, -3.0], [3.0, 1.0, 2.0, -3.0]]}
QUIET = {"rate": [0.0, 0.02], "interval": [[0, 1]] * 2}


def run_of(**changes: Any) -> Run:
    """A run that passes every gate, at layer 1 of two."""
    summary = {
        "best_layer": 1,
        "swap_items": {"reported": 100},
        "swap_by_relation": {"left_right": {"belief": GOOD, "noise": QUIET}},
        "mirror_swap": {"image": [1.0, 0.0], "words": [0.1, 0.95]},
        "explained_variance": [0.5, 0.9],
        "column_correlation": [0.9, 0.99],
        "row_correlation": [0.9, 0.99],
        "column_gap": [-1.0, 0.5],
        "row_gap": [-1.0, 0.4],
        "word_angles": {"left_right": [90.0, 12.0]},
        "steering": {"left_right": {"preference_by_cell": [[0, 0, 0, 0], [3.0, 1.0, -1.0, -3.0]]}},
    }
    fields: dict[str, Any] = {
        "summary": summary | changes.pop("summary", {}),
        "answers": {"left_right": {"value": 1.0, "count": 100}},
        "near_far": np.array([2.0, 1.0, -1.0, -2.0]),
        "between": np.array([2.0, 1.0, -1.0, -2.0]),
        "depth": {"height": np.array([4.0, 2.0, -2.0, -4.0]), "depth": np.array([-1.0, -0.5, 0.5, 1.0])},
    }
    return Run(**fields | changes)


def gates_of(*runs: Run) -> dict[str, Gate]:
    parts = (zoo_gates.of_answers, zoo_gates.of_swaps, zoo_gates.of_geometry, zoo_gates.of_steering)
    return {gate.name: gate for part in parts for gate in part(runs)}


def test_a_good_run_passes() -> None:
    gates = gates_of(run_of(), run_of())
    assert all(gate.passed for gate in gates.values()), [gate for gate in gates.values() if not gate.passed]
    assert gates["correct: left_right"].value == 1.0 and gates["correct: left_right"].low > 0.98
    assert gates["steering height moves front_behind, as a share of above_below"].value == pytest.approx(0.25)
    assert gates["correlation of the two"].value == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("correct: left_right", {"answers": {"left_right": {"value": 0.97, "count": 100}}}),
        ("explained variance", {"summary": {"explained_variance": [0.9, 0.7]}}),
        ("row gap", {"summary": {"row_gap": [0.5, -0.1]}}),
        ("angle of the words left and right", {"summary": {"word_angles": {"left_right": [1.0, 40.0]}}}),
        ("mirror swap of the image tokens after the last layer", {"summary": {"mirror_swap": LATE}}),
        ("steering: near_far", {"near_far": np.array([2.0, 1.0, 1.5, -2.0])}),
        ("steering: between", {"between": np.array([-2.0, 1.0, 1.5, 2.0])}),
        ("steering: left_right", {"summary": {"steering": {"left_right": BENT}}}),
    ],
)
def test_one_bad_seed_of_two_misses_its_gate_alone(name: str, changes: dict[str, Any]) -> None:
    gates = gates_of(run_of(), run_of(**changes))
    assert [missed for missed, gate in gates.items() if not gate.passed] == [name]


def test_shares_are_pooled_over_seeds() -> None:
    other = run_of(answers={"left_right": {"value": 0.98, "count": 300}})
    gate = gates_of(run_of(), other)["correct: left_right"]
    assert gate.value == pytest.approx(394 / 400) and gate.low < gate.value < gate.high and not gate.passed
    loud = {"left_right": {"belief": GOOD, "noise": {"rate": [0.0, 0.12]}}}
    gate = gates_of(run_of(), run_of(summary={"swap_by_relation": loud}))["noise swap: left_right"]
    assert gate.value == pytest.approx(0.07) and gate.bounds == "<= 0.06" and not gate.passed


def test_scenes_to_steer_and_their_alignment() -> None:
    rng = np.random.default_rng(0)
    scenes, right = zoo_gates.far_scenes(rng, 8)
    columns = (scenes.centers[..., 0] * 4).astype(int)
    np.testing.assert_array_equal(columns[:, 0], np.where(right, 3, 0))
    np.testing.assert_array_equal(columns[:, 1], np.where(right, 0, 3))
    rows = (zoo_gates.outside_scenes(rng, 12).centers[..., 1] * 4).astype(int)
    assert len(rows) == 12 and (rows[:, :2] == 0).all() and (rows[:, 2] >= 2).all()
    # Change by column, of a scene whose other object is in column 3, and of one in which it is in column 0.
    found = np.array([[0.0, 7.0], [1.0, 5.0], [2.0, 3.0], [9.0, 1.0]])
    np.testing.assert_allclose(zoo_gates.towards(found, np.array([False, True])), [8.0, 3.5, 2.0, 0.5])
