"""Grid pictures with a transparent ground: shown on white by default; the published code drops the alpha channel."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
from PIL import Image
from test_cli import run
from test_grid import torch_activations

from jaxid.data.cutouts import Pasting, read_cutouts
from jaxid.data.grid import paste_grid_folder, placements, read_finetune_folder, read_grid_folder
from jaxid.experiments.finetune_run import Finetune
from jaxid.experiments.reference import with_bugs
from jaxid.experiments.session import Session
from jaxid.experiments.steering import Steer
from jaxid.ids.spatial import SpatialIDs
from jaxid.prompts.pictures import open_picture

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")  # of the tiny vocabulary

A_CELLS = ((0, 0), (3, 3))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells of A, and all others for B; the objects are half transparent, with colours under what is not seen."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for name in ("star", "fish"):
        picture = rng.integers(0, 256, (8, 8, 4), np.uint8)
        picture[:2, :, 3] = 0
        Image.fromarray(picture).save(folder / f"{name}.png")
    cells = [(a, b) for a, b in placements() if a in A_CELLS]
    pasting = Pasting(picture_size=32)
    paste_grid_folder(
        folder / "grid", read_cutouts(folder), [("star", "fish")], pasting, object_sizes=(224,), cells=cells
    )
    return folder / "grid"


def expected(folder: Path, *, dropped: bool) -> np.ndarray:
    """PyTorch's IDs of the fish, [L, X, Y, D], from colours alone or blended with white in NumPy."""
    shown = []
    for item in read_grid_folder(folder):
        pixels = np.asarray(Image.open(str(item.picture))).astype(float)
        shares = np.ones_like(pixels[..., 3:]) if dropped else pixels[..., 3:] / 255
        blended = np.rint(shares * pixels[..., :3] + (1 - shares) * 255).astype(np.uint8)
        shown.append(dataclasses.replace(item, picture=blended))
    activations = torch_activations(shown)[:, 1:]
    sums, counts = np.zeros((4, 4, *activations.shape[1:])), np.zeros((4, 4, 1, 1))
    for cell_a in A_CELLS:
        rows = [row for row, item in enumerate(shown) if item.cell_a == cell_a]
        for row in rows:
            sums[shown[row].cell_b] += activations[row] - activations[rows].mean(axis=0)
            counts[shown[row].cell_b] += 1
    return (sums / counts).transpose(2, 0, 1, 3)


@pytest.mark.parametrize("dropped", [False, True])
def test_extraction(dropped: bool, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "ids.safetensors"
    arguments = ["ids", "extract", "--data", grid, "--out", out, "--model", fixtures.folder(oracle.CASE)]
    assert run(*arguments, "--batch-size", "32", *(["--reference-bugs"] if dropped else [])) == 0
    found = np.asarray(SpatialIDs.load(out).universal)
    right, wrong = (expected(grid, dropped=which) for which in (dropped, not dropped))
    # Blending rounds to whole numbers, in Pillow now and then to the other one.
    assert fixtures.distance(found, right) < 0.02
    assert fixtures.distance(found, wrong) > 0.3


def test_near_far_pictures_lose_their_alpha_in_reference_mode(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "flat" / "star_0-0_fish_3-0.png")
    steer = Steer(out=tmp_path, data=tmp_path / "flat", ids=tmp_path / "ids.safetensors", relation="near-far")

    class Everything(Session):
        def sample(self, items: Any) -> Any:
            return items

    for experiment, grey in ((steer, 255), (with_bugs(steer), 0)):
        (item,) = experiment.items(object.__new__(Everything))
        assert item.names == ("star", "fish")
        assert (np.asarray(open_picture(item.picture)) == grey).all()


def test_fine_tuning_drops_alpha_in_reference_mode(tmp_path: Path) -> None:
    for a, b in itertools.permutations(("star", "fish", "moon"), 2):
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / f"{a}_0-0_{b}_3-0.png")
    config = Finetune(out=tmp_path / "out", data=tmp_path, ids=tmp_path / "ids.safetensors", held_out=0.4)
    for experiment, grey in ((config, 255), (with_bugs(config), 0)):
        training, held = experiment.split(read_finetune_folder(tmp_path))
        assert len(training) + len(held) == 6
        assert all((np.asarray(open_picture(item.picture)) == grey).all() for item in (*training, *held))
