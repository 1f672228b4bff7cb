"""Blank pictures: made by hand, asked about by PyTorch, and summed up in plain loops."""

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
from PIL import Image
from run_data import CASE, ITEMS, columns, experiment, ids
from run_data import place as place

from jaxid import plots
from jaxid.data.coco_spatial import ANSWERS, SpatialItem, find_coco_spatial, read_coco_spatial
from jaxid.errors import InputError
from jaxid.experiments.belief_swap import noise
from jaxid.experiments.blank_image import COORDINATES, PICTURES, BlankImage, BlankImageSummary, blank_like, mean_picture
from jaxid.experiments.relations import prepare

pytestmark = [
    # The tiny model knows few of the drawn objects by name.
    pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning"),
]

LAYERS = (0, 1)
STRENGTH = 2.0


@functools.cache
def run(place: Path) -> tuple[BlankImage, BlankImageSummary, dict[str, np.ndarray]]:
    blank = experiment(BlankImage, place, "blank", strength=STRENGTH, layers="0-1", batch_size=18)
    return blank, blank.run(), columns(place / "blank")


@functools.cache
def items(place: Path) -> list[SpatialItem]:
    return read_coco_spatial(*find_coco_spatial(place / "data"))


def row(table: dict[str, np.ndarray], kind: str, layer: int, key: str) -> dict[str, Any]:
    (found,) = np.flatnonzero((table["picture"] == kind) & (table["layer"] == layer) & (table["item"] == key))
    return {name: values[found] for name, values in table.items()}


def shown(place: Path, item: SpatialItem, kind: str) -> np.ndarray:
    """What an item is asked about, by hand: all pictures of the data set are of one size."""
    pictures = {one.image_id: np.asarray(Image.open(str(one.picture))) for one in items(place)}
    if kind == "mean":
        return np.rint(np.mean(list(pictures.values()), axis=0)).astype(np.uint8)
    return np.full((48, 48, 3), 128, np.uint8) if kind == "grey" else pictures[item.image_id]


# --- the pictures ----------------------------------------------------------------------------------------------------


def test_mean_of_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    expected = np.rint((one.astype(int) + other) / 2)
    np.testing.assert_array_equal(mean_picture([one, tmp_path / "broken.jpg", other]), expected)
    wide = np.repeat(np.repeat(other, 2, axis=0), 3, axis=1)
    resized = np.asarray(Image.fromarray(wide).resize((6, 4)))
    np.testing.assert_array_equal(mean_picture([one, wide]), np.rint((one.astype(int) + resized) / 2))
    np.testing.assert_array_equal(mean_picture([tmp_path / "broken.jpg"]), np.full((1, 1, 3), 128))


def test_blank_pictures_have_the_size_of_the_picture() -> None:
    picture, mean = np.zeros((5, 9, 3), np.uint8), np.full((2, 2, 3), (10, 20, 30), np.uint8)
    assert blank_like(picture, "original", mean) is picture
    for kind, color in (("grey", (128, 128, 128)), ("mean", (10, 20, 30))):
        np.testing.assert_array_equal(np.asarray(blank_like(picture, kind, mean)), np.full((5, 9, 3), color))


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ANSWERS)
@pytest.mark.parametrize("kind", PICTURES)
def test_rows_equal_pytorch_on_pictures_made_by_hand(place: Path, axis: str, kind: str) -> None:
    _, _, table = run(place)
    model, order = fixtures.model(CASE), list(dict.fromkeys(table["item"].tolist()))
    some = [item for item in items(place) if item.relation in ANSWERS[axis]]
    batch = prepare(model, [dataclasses.replace(item, picture=shown(place, item, kind)) for item in some])
    text = model.prepare(None, list(batch.prompts.questions))
    control, residuals = oracle.torch_logprobs(batch), oracle.torch_residuals(batch)
    alone, rows = fixtures.record(CASE, text)["resid_post"], np.arange(len(some))[:, None]
    indices = np.array([order.index(item.key) for item in some])
    drawn = np.asarray(noise(0, indices, oracle.LAYERS, oracle.WIDTH))
    for layer in LAYERS:
        cells = oracle.universal()[layer]
        words = residuals[layer][rows, batch.words]
        added = words - alone[layer][rows, text.words(batch.names)]
        plane = np.stack([np.asarray(direction)[layer] for direction in ids().plane()], axis=-1)
        first = cells[0, 0] - (cells[3, 0] if axis == "horizontal" else cells[0, 3])
        push = np.where(control.argmax(axis=-1) == 1, 1, -1)[:, None] * first
        answers = {}
        for name, vectors in (("swapped", np.stack([push, -push], axis=1)), ("swapped_by_noise", drawn[layer])):
            norms = STRENGTH * np.linalg.norm(words, axis=-1) / np.linalg.norm(vectors, axis=-1)
            edit = oracle.adding(layer, batch.words, vectors * norms[..., None])
            answers[name] = oracle.torch_logprobs(batch, [edit]).argmax(axis=-1)
        for index, item in enumerate(some):
            found, truth = row(table, kind, layer, item.key), ANSWERS[axis].index(item.relation)
            expected = control[index, [truth, 1 - truth]]
            np.testing.assert_allclose([found["control_correct"], found["control_wrong"]], expected, atol=1e-4)
            places = [found[name] for name in COORDINATES]
            np.testing.assert_allclose(places, (added[index] @ plane).ravel(), atol=2e-4)
            for name, given in answers.items():
                assert found[name] == (given[index] != control[index].argmax())
            assert (found["axis"], found["relation"], found["subject"]) == (axis, item.relation, item.subject)


def test_table_holds_every_picture_layer_and_item(place: Path) -> None:
    _, summary, table = run(place)
    assert len(table["item"]) == len(PICTURES) * len(LAYERS) * ITEMS and summary.items == ITEMS
    lead = {kind: table["control_correct"][table["picture"] == kind] for kind in PICTURES}
    assert all(np.abs(lead["original"] - lead[kind]).max() > 1e-3 for kind in ("grey", "mean"))


# --- the summary -----------------------------------------------------------------------------------------------------


def test_summary_by_hand(place: Path) -> None:
    blank, summary, table = run(place)
    keys = list(dict.fromkeys(table["item"].tolist()))
    assert list(summary.pictures) == list(PICTURES) and summary.layers == list(LAYERS)
    for column, kind in enumerate(PICTURES):
        first = [row(table, kind, 0, key) for key in keys]
        leads = np.array([one["control_correct"] - one["control_wrong"] for one in first])
        originals = [row(table, "original", 0, key) for key in keys]
        correct = np.array([one["control_correct"] > one["control_wrong"] for one in originals])
        assert summary.accuracy[column] == pytest.approx(np.mean(leads > 0))
        assert summary.accuracy_interval[column][0] <= summary.accuracy[column] <= summary.accuracy_interval[column][1]
        assert summary.agreement[column] == pytest.approx(np.mean((leads > 0) == correct))
        assert summary.lead[column] == pytest.approx(leads.mean(), abs=1e-5)
        for index, layer in enumerate(LAYERS):
            rows = [row(table, kind, layer, key) for key in keys]
            assert summary.swapped[column, index] == pytest.approx(np.mean([one["swapped"] for one in rows]))
            assert summary.noise[column, index] == pytest.approx(np.mean([one["swapped_by_noise"] for one in rows]))
            squares, gaps = [], []
            for axis in ANSWERS:
                own = [one for one in rows if one["axis"] == axis]
                for word in ("subject", "object"):
                    points = np.array([[one[f"{word}_x"], one[f"{word}_y"]] for one in own], float)
                    squares += np.square(points - points.mean(axis=0)).sum(axis=1).tolist()
                for one in own:
                    way = "x" if axis == "horizontal" else "y"
                    distance = one[f"object_{way}"] - one[f"subject_{way}"]  # above 0 if the subject is left or above
                    gaps.append(distance if one["relation"] in ("left", "above") else -distance)
            assert summary.id_norm[column, index] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-4)
            assert summary.gap[column, index] == pytest.approx(np.mean(gaps), abs=1e-4)
    lines = list(blank.report(summary))
    assert [line.split()[0] for line in lines] == [*PICTURES, str(ITEMS)] and "100.0% of the IDs' norm" in lines[0]
    assert (blank.out / "blank_image.png").stat().st_size > 1000


# --- the figure ------------------------------------------------------------------------------------------------------


def numbers() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shares = rng.uniform(0.2, 0.8, (3, 5))
    return {
        "layers": np.arange(2, 7),
        "accuracy": shares[:, 0],
        "accuracy_interval": shares[:, :1] + [-0.1, 0.1],
        "id_norm": rng.uniform(1, 2, (3, 5)),
        "gap": rng.normal(size=(3, 5)),
        "gap_interval": rng.uniform(0.1, 0.2, (3, 5)),
        "swapped": shares,
        "swapped_interval": shares[..., None] + [-0.1, 0.1],
        "noise": shares / 2,
    }


def test_figure_draws_what_it_is_given() -> None:
    drawn = numbers()
    figure = plots.blank_image(**drawn, about=plots.About(model="mine", items=12))
    bars, norms, gaps, swaps = figure.axes
    rectangles: Any = bars.patches[:3]
    np.testing.assert_allclose([bar.get_height() for bar in rectangles], drawn["accuracy"])
    for axes, name, unit in ((norms, "id_norm", drawn["id_norm"][0]), (gaps, "gap", drawn["id_norm"][0])):
        curves = [np.asarray(line.get_ydata()) for line in axes.get_lines() if line.get_marker() == "o"]
        np.testing.assert_allclose(curves, drawn[name] / unit)
    for style, name in (("-", "swapped"), ("--", "noise")):
        curves = [np.asarray(line.get_ydata()) for line in swaps.get_lines() if line.get_linestyle() == style]
        np.testing.assert_allclose(curves, drawn[name])
    assert figure.get_supxlabel().startswith("mine; n = 12 items; whiskers and bands")
    with pytest.raises(InputError, match="gap"):  # unwrapped: the tests' run-time shape checks would come first
        inspect.unwrap(plots.blank_image)(**drawn | {"gap": drawn["gap"][:, 1:]})
