"""What the runs check before they read a model's weights, and what they do with numbers that are not finite."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
from run_data import CASE, ITEMS, columns, experiment, ids
from run_data import place as place
from test_cli import run as command

from jaxid import io
from jaxid.checkpoints import tensors
from jaxid.errors import DataError, InputError, JaxidError, JaxidWarning, OutputError, PromptError
from jaxid.experiments import belief_swap, steering
from jaxid.experiments.activation_swap import AttributeSwap, MirrorSwap
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.compare import Compare
from jaxid.experiments.depth import Depth
from jaxid.experiments.deviation import Deviation
from jaxid.experiments.occlusion import Occlusion
from jaxid.experiments.steer_picture import SteerPicture
from jaxid.experiments.steering import Steer

pytestmark = [
    # The tiny model knows few of the drawn objects by name.
    pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning"),
]


def start(place: Path, kind: type[Any], changed: dict[str, Any]) -> Any:
    """Starts a run of a kind; `changed` says where it writes."""
    if kind is SteerPicture:
        picture = next((place / "data" / "val2017").glob("*.jpg"))
        changed = {"data": None, "picture": picture, "subject": "star", "object": "fish"} | changed
    return experiment(kind, place, **changed | {"out": changed["out"].absolute()}).run()


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights cannot be read."""
    ids()  # of a model that is loaded before

    def read(*_: Any, **__: Any) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr(tensors, "read_parameters", read)


WITH_IDS = (BeliefSwap, Steer, SteerPicture, Depth, Deviation)
ALL = (*WITH_IDS, MirrorSwap, AttributeSwap, Occlusion)


def but(*some: type[Any]) -> tuple[type[Any], ...]:
    return tuple(kind for kind in ALL if kind not in some)


@pytest.mark.parametrize(
    ("kinds", "changed", "error", "named"),
    [
        (but(Occlusion, Deviation), {"layers": "0-99999999"}, InputError, "layer"),
        ((Deviation,), {"layer": -1}, InputError, "layer"),
        ((SteerPicture,), {"id_layer": 3}, InputError, "layer 3"),
        (WITH_IDS, {"ids": Path("missing.safetensors")}, JaxidError, "missing.safetensors"),
        (WITH_IDS, {"ids": Path("narrow.safetensors")}, InputError, "width 4"),
        (but(SteerPicture), {"data": Path("missing")}, DataError, "missing"),
        ((SteerPicture,), {"picture": Path("missing.png")}, InputError, "missing.png"),
        ((SteerPicture,), {"subject": "fish"}, InputError, "same name"),
        (but(Depth), {"case": "capital"}, PromptError, "Left"),
        ((Depth,), {}, PromptError, "front"),
        (ALL, {"out": Path("another")}, OutputError, "another"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_is_quick_to_check_comes_before_the_weights(
    place: Path,
    kinds: tuple[type[Any], ...],
    changed: dict[str, Any],
    error: type[Exception],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_weights: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    narrow = ids()
    dataclasses.replace(narrow, values=narrow.values[..., :4]).save("narrow.safetensors")
    Path("another").mkdir()
    Path("another", "settings.json").write_text("{}")
    for kind in kinds:
        with pytest.raises(error, match=named):
            start(place, kind, {"out": tmp_path / "out"} | changed)


def test_a_bad_first_item_is_found_before_the_weights(place: Path, tmp_path: Path, no_weights: None) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "val2017").glob("*.jpg"):
        path.write_bytes(b"no picture")
    for kind in (BeliefSwap, MirrorSwap, Deviation, Occlusion, Steer):
        with pytest.raises(JaxidError, match=r"item '0000.*--skip-bad"):
            start(place, kind, {"data": tmp_path / "data", "out": tmp_path / kind.name})


def test_a_run_with_other_settings_is_found_before_the_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_weights: None
) -> None:
    settings = {
        "settings": {"strength": 2.0, "fingerprint": "unknown so far", "seed": 0},
        "chunk_size": 4,
        "items": {"count": 1, "digest": ""},
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(OutputError, match=r"strength was 2.0, is now 3.0.*--restart") as caught:
        start(place, BeliefSwap, {"out": tmp_path, "strength": 3.0})
    assert "fingerprint" not in str(caught.value) and "seed" not in str(caught.value)
    with io.locked(tmp_path), pytest.raises(OutputError, match="another process"):
        start(place, MirrorSwap, {"out": tmp_path})


# --- numbers that are not finite -------------------------------------------------------------------------------------


def poisoned(monkeypatch: pytest.MonkeyPatch, module: Any, function: str, rows: slice) -> None:
    """Gives the first items of every batch log-probabilities of NaN."""
    whole = getattr(module, function)

    def run(*arguments: Any, **more: Any) -> Any:
        found = whole(*arguments, **more)
        control = np.array(found.control)
        control[rows] = np.nan
        return dataclasses.replace(found, control=control)

    monkeypatch.setattr(module, function, run)


def test_items_that_are_not_finite_are_named_and_skipped(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    swap = experiment(BeliefSwap, place, tmp_path, strength=2.0, layers="0-1", max_new_tokens=0, batch_size=ITEMS)
    monkeypatch.setattr(BeliefSwap, "figures", lambda *_: ())
    poisoned(monkeypatch, belief_swap, "swap_beliefs", slice(0, 1))
    with pytest.warns(JaxidWarning, match=r"2 of 12 items are skipped.*NaN or infinite: 0000"):
        summary = swap.run()
    table = columns(tmp_path)
    bad = list(dict.fromkeys(table["item"][np.isnan(table["control_correct"])].tolist()))
    assert summary.not_finite == {"count": 2, "items": bad} and len(bad) == 2  # one of either axis
    assert summary.items == ITEMS - 2 and summary.answered_items + summary.unanswered_items == ITEMS - 2
    kept = ~np.isin(table["item"], bad) & (table["condition"] == "belief") & (table["layer"] == 0)
    assert kept.sum() == ITEMS - 2
    assert summary.swapped["belief"][0] == pytest.approx(table["swapped"][kept].mean())


def test_a_run_without_a_finite_number_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, steering, "steer_to_cells", slice(None))
    arguments = ["--data", place / "data", "--ids", place / "ids.safetensors", "--prompt", "{query}"]
    assert (
        command("run", "steer", *arguments, "--model", fixtures.folder(CASE), "--out", tmp_path, "--layers", "1") == 2
    )
    line = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert len(line) == 1 and line[0].startswith("error: the model's numbers are NaN or infinite for all")
    assert not (tmp_path / "summary.json").exists() and not list(tmp_path.glob("*.png"))


def test_options_that_are_not_numbers(place: Path) -> None:
    for changed in ({"strength": float("nan")}, {"strength": float("-inf")}, {"seed": -1}, {"seed": 2**32}):
        (name,) = changed
        with pytest.raises(InputError, match=name):
            experiment(BeliefSwap, place, "x", **changed)
    with pytest.raises(InputError, match="radius"):
        experiment(Occlusion, place, "x", radius=float("nan"))


# --- folders of other runs -------------------------------------------------------------------------------------------

SUMMARY = {
    "experiment": "belief-swap",
    "model": "tiny",
    "accuracy": 0.9,
    "accuracy_interval": [0.8, 0.95],
    "mean_accuracy_drop": 0.25,
    "answered_items": 40,
    "settings": {"strength": 5.0},
    "best": {
        "layers": [1],
        "belief": 0.5,
        "belief_std": 0.1,
        "belief_interval": [0.4, 0.6],
        "noise": 0.25,
        "noise_std": 0.0,
        "noise_interval": [0.2, 0.3],
        "items": 20,
        "chosen_on": "other items",
    },
}


def test_damaged_folders_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "run" / "summary.json"
    path.parent.mkdir()
    path.write_text("\ufeff" + json.dumps(SUMMARY), encoding="utf-8")
    assert Compare((path.parent,), out=tmp_path / "out").run()["tiny"].best.belief == 0.5
    texts = ["", "{", "[]", "null", "\x00", "[" * 100_000, json.dumps(SUMMARY).replace("0.9,", "NaN,")]
    texts += [json.dumps(SUMMARY).replace(*pair) for pair in (("[0.4, 0.6]", "[0.6, 0.4]"), ("0.25,", "1.25,"))]
    texts += [json.dumps(SUMMARY).replace(*pair) for pair in (("[0.8", "[-0.8"), ('"items": 20', '"items": 0'))]
    odd: list[Any] = [None, [], {}, "x", -1, 7.5, [[1]], True]
    for name in SUMMARY.keys() - {"experiment", "model"}:
        texts += [json.dumps({key: value for key, value in SUMMARY.items() if key != name})]
        texts += [
            json.dumps(SUMMARY | {name: value}) for value in odd if not (name == "answered_items" and value == 7.5)
        ]
    good = {
        ("accuracy", "true"),
        ("mean_accuracy_drop", "true"),
        ("mean_accuracy_drop", "-1"),
        ("answered_items", "true"),
    }
    for text in texts:
        path.write_text(text, encoding="utf-8")
        if any(f'"{name}": {value}' in text for name, value in good):
            continue
        with pytest.raises(DataError, match=r"run holds no summary of a finished jaxid run belief-swap"):
            Compare((path.parent,), out=tmp_path / "out").run()
    with pytest.raises(OutputError, match="holds a run"):
        (tmp_path / "run" / "settings.json").write_text("{}")
        Compare((path.parent,), out=path.parent).run()
