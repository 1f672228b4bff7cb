"""The geometry of held-out activations: cosines with IDs, straightness, and the folders that are read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_finetune import QUICK, ids, items, model

from jaxid.data.coco_spatial import ANSWERS
from jaxid.errors import InputError
from jaxid.experiments import finetune_geometry
from jaxid.experiments.finetune import resolved
from jaxid.experiments.finetune_geometry import OTHER, OWN, cosines_of, folders, geometry, measured
from jaxid.experiments.finetune_run import Read


def grid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """IDs [X, Y, D] on a plane, their mean zero."""
    places = np.arange(4, dtype=np.float32) - 1.5
    return places[:, None, None] * x + places[None, :, None] * y


def test_geometry_by_hand() -> None:
    rng = np.random.default_rng(0)
    own, turned = grid(*np.eye(6, dtype=np.float32)[:2]), grid(*np.eye(6, dtype=np.float32)[2:4])
    folder, cell = np.divmod(np.arange(3 * 16), 16)
    offsets = 5 * rng.standard_normal((3, 6)).astype(np.float32)
    activations = offsets[folder] + 0.5 * own[cell % 4, cell // 4]
    found = geometry(activations, folder, cell, {"own": own, "turned": turned, "away": -own})
    assert found == pytest.approx({"own": 1.0, "turned": 0.0, "away": -1.0, "variance": 1.0}, abs=1e-5)
    # As much variance off the plane as on it, in a pattern without a straight part.
    bent = np.where((cell % 4 + cell // 4) % 2, 1.0, -1.0).astype(np.float32) * np.sqrt(2.5)
    found = geometry(activations * 2 + bent[:, None] * np.eye(6, dtype=np.float32)[5], folder, cell, {})
    assert found == pytest.approx({"variance": 0.5}, abs=1e-5)
    some = cell != 7
    assert set(geometry(activations[some], folder[some], cell[some], {"own": own})) == {"own"}


def test_folders_are_whole_and_both_axes_are_asked_about() -> None:
    whole = folders(items(), 10_000, 0)
    assert len(whole) == 3 * 4 * 2 and sum(map(len, whole)) == 2 * len(items())
    for group in whole:
        assert len({(one.item.object_a, one.item.cell_a, one.item.object_b, one.axis) for one in group}) == 1
        assert len({one.item.cell_b for one in group}) == len(group) == 15
    assert {group[0].axis for group in whole} == set(ANSWERS)
    assert len(folders(items(), 50, 0)) == 3 and len(folders(items(), 1, 0)) == 2 and not folders([], 50, 0)
    drawn = [[group[0].item.key for group in folders(items(), 50, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_measured_is_the_loss_on_whole_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word, layer and centring are those of the ID loss; batches of questions change nothing."""
    from jaxid.experiments import finetune

    config = resolved(QUICK, model())
    group = folders(items(), 1, 3)[0]
    found = measured(model(), [group], {OWN: ids(), OTHER: dataclasses.replace(ids(), values=-ids().values)}, config)
    assert found[OTHER] == pytest.approx(-found[OWN], abs=1e-4) and abs(found[OWN]) > 0.02
    batch = jax.tree.map(jnp.asarray, finetune.small_batch(model(), group, ids(), config, len(group)))
    whole = jax.jit(functools.partial(finetune.loss, model().definition, id_layer=config.id_layer or 0, id_weight=1.0))
    _, metrics = whole(model().parameters, batch)
    assert found[OWN] == pytest.approx(1 - float(metrics["id_loss"]), abs=1e-3)
    monkeypatch.setattr(finetune_geometry, "BATCH", 4)
    assert measured(model(), [group], {OWN: ids()}, config)[OWN] == pytest.approx(found[OWN], abs=2e-4)
    assert not measured(model(), [], {OWN: ids()}, config)


def test_ids_are_told_apart_by_their_model() -> None:
    other = dataclasses.replace(ids(), fingerprint="another", model="another")
    read = Read(ids=other, compared=ids(), items=(), training=(), sets={}, folders=())
    found = read.sources(model())
    assert found[OWN] is ids() and found[OTHER] is other
    for both, whose in ((ids(), "own"), (other, "other models'")):
        with pytest.raises(InputError, match=whose):
            dataclasses.replace(read, ids=both, compared=both).sources(model())
    wide = dataclasses.replace(ids(), values=np.ones((model().num_layers, 1, 1, 4, 4, 7), np.float32))
    with pytest.raises(InputError, match="width 7"):
        dataclasses.replace(read, compared=wide).check(model())


def test_cosines_of_two_models() -> None:
    values = ids().values.copy()
    values[1, 0, 0, 2, 3] *= -3
    found = cosines_of(ids(), dataclasses.replace(ids(), values=values))
    assert found.shape == (model().num_layers, 4, 4)
    assert found[1, 2, 3] == pytest.approx(-1) and found.sum() == pytest.approx(found.size - 2, abs=1e-3)
