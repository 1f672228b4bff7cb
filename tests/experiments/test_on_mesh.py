"""Commands on a mesh of eight devices: the same tables, IDs and answers as on one, and what is refused."""

import functools
import shutil
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
from run_data import CASE, columns, experiment
from run_data import place as place

from jaxid import cli, processes
from jaxid.data.grid import write_grid_folder
from jaxid.devices import DEVICES
from jaxid.errors import InputError
from jaxid.experiments import planning
from jaxid.experiments.activation_swap import MirrorSwap
from jaxid.experiments.ask import Ask
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.session import Session
from jaxid.experiments.spatial_ids import ExtractIDs
from jaxid.ids.spatial import SpatialIDs
from jaxid.meshes import Axes
from jaxid.plan import Plan
from jaxid.processes import Team

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")

MESH = "data=4,model=2"


@functools.cache
def table_on(mesh: str | None, kind: type[Any], place: Path, **options: Any) -> dict[str, np.ndarray]:
    """The table of a run, in a folder that is named after mesh and kind."""
    out = f"{kind.__name__}-{mesh}"
    experiment(kind, place, out, mesh=mesh, **options).run()
    return columns(place / out)


BELIEF = {"layers": "0-1", "max_new_tokens": 0}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(BeliefSwap, BELIEF), pytest.param(MirrorSwap, {}, marks=pytest.mark.slow)],
)
def test_the_same_table(place: Path, kind: type[Any], options: dict[str, Any]) -> None:
    one, many = (table_on(mesh, kind, place, **options) for mesh in (None, MESH))
    assert one.keys() == many.keys()
    for name, values in one.items():
        if name == "score":
            # A ratio of differences of log-probabilities: small denominators magnify the rounding of float32.
            magnified = 1e-5 * (1 + np.abs(values)) / np.abs(one["control"] - one["intervened"])
            assert (np.abs(many[name] - values) <= 1e-5 + magnified).all()
        elif values.dtype.kind == "f":
            np.testing.assert_allclose(many[name], values, atol=1e-5)
        else:
            np.testing.assert_array_equal(many[name], values)


def test_a_run_resumes_on_another_mesh(place: Path) -> None:
    """No row depends on the mesh, so it is none of the settings."""
    before = table_on(MESH, BeliefSwap, place, **BELIEF)
    shutil.copytree(place / f"BeliefSwap-{MESH}", place / "resumed")
    sorted((place / "resumed" / "parts").glob("*.parquet"))[1].unlink()
    summary = experiment(BeliefSwap, place, "resumed", mesh="data=2", **BELIEF).run()
    assert summary.resumed_items == 8
    for name, values in columns(place / "resumed").items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, before[name], atol=1e-4)


@pytest.mark.slow
def test_extraction_and_answers(tmp_path: Path) -> None:
    data = tmp_path / "grids"
    write_grid_folder(data, [("star", "fish")], picture_size=48, object_sizes=[12])
    folder, found, answers = str(fixtures.folder(CASE)), [], []
    picture = next(data.rglob("*.png"))
    for mesh in (None, MESH):
        out = tmp_path / f"{mesh}.safetensors"
        ExtractIDs(data=data, out=out, model=folder, batch_size=80, mesh=mesh).run()
        found.append(SpatialIDs.load(out))
        answers.append(dict(Ask(picture=picture, question="Where is the fish?", model=folder, mesh=mesh, top=3).run()))
    one, many = found
    assert one.fingerprint == many.fingerprint
    np.testing.assert_allclose(many.values, one.values, atol=5e-6)  # differences of activations of size one
    assert answers[1] == pytest.approx(answers[0], rel=1e-4)


def test_a_batch_that_does_not_divide(place: Path) -> None:
    with pytest.raises(InputError, match=r"--batch-size 6 does not divide over data=4; give a multiple"):
        experiment(BeliefSwap, place, "odd", mesh=MESH, batch_size=6).run()


def test_no_worker_is_idle(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve items of three workers are in three chunks at least, and each divides over the worker's devices."""
    monkeypatch.setattr(processes, "team", lambda *_: Team(worker=1, workers=3))
    for mesh, size in ((None, 4), ("data=8", 8)):
        run = experiment(BeliefSwap, place, f"shared-{mesh}", mesh=mesh, batch_size=None, max_new_tokens=0)
        session = Session(run)
        before = session.batch_size
        session.begin(run.items(session))
        assert session.batch_size == size <= before


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=16", "the mesh data=16,model=1 has 16 devices, but JAX sees 8"),
        ("model=7", "model=7 divides none of the decoder's"),
        ("rows=2", "a mesh is given as data=4,model=2, or as auto"),
    ],
)
def test_refused_in_one_line(place: Path, mesh: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{name}={place / file}" for name, file in (("data", "data"), ("ids", "ids.safetensors"))]
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            [
                "run",
                "belief-swap",
                *options,
                f"--out={place / 'no'}",
                f"--model={fixtures.folder(CASE)}",
                f"--mesh={mesh}",
            ]
        )
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and error.startswith(f"error: {message}") and "\n" not in error


def test_plans(place: Path) -> None:
    """Figures of each device; a mesh need not be there."""
    options = {"batch_size": None, "layers": "1", "max_new_tokens": 0}
    many = planning.plan(experiment(BeliefSwap, place, "no", mesh="data=16,model=2", **options), DEVICES["h100"])
    one = planning.plan(experiment(BeliefSwap, place, "no", **options | {"batch_size": 16}), DEVICES["h100"])
    assert isinstance(one, Plan) and isinstance(many, Plan)
    assert many.axes == Axes(16, 2) and many.together % 16 == 0
    assert 0.45 * one.weights < many.weights < one.weights
    assert "data=16,model=2  figures are for each device" in "\n".join(many.report())
    assert one.flops / 32 * 0.9 < many.flops < one.flops
