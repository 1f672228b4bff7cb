"""Temporal IDs: what is recovered from known parts, the line from early to late, files."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxid.errors import CheckpointError, InputError, OutputError
from jaxid.experiments.reference import last_clips
from jaxid.ids.accumulate import IDBatch
from jaxid.ids.temporal import FRAMES, TemporalIDs, accumulate_temporal_ids, early_to_late

LAYERS, WIDTH, OBJECTS = 3, 5, ("star", "fish", "cup")
PAIRS = [(a, b) for a in range(3) for b in range(3) if a != b]


def parts(seed: int = 0) -> dict[str, np.ndarray]:
    """What activations are made of: the time, the object, the partner, and when the partner comes."""
    rng = np.random.default_rng(seed)
    time = rng.standard_normal((7, LAYERS + 1, WIDTH))
    return {
        "time": time - time.mean(axis=0),
        "object": 10 * rng.standard_normal((3, LAYERS + 1, WIDTH)),
        "partner": 5 * rng.standard_normal((3, LAYERS + 1, WIDTH)),
        "other": rng.standard_normal((7, LAYERS + 1, WIDTH)),
    }


def batches(made: dict[str, np.ndarray], size: int = 10, *, shuffled: int | None = None) -> Iterator[IDBatch]:
    """Every pair at all pairs of frames, B's word alone, the last batch padded."""
    rows = [(pair, i, j) for pair in range(len(PAIRS)) for i in range(7) for j in range(7) if i != j]
    if shuffled is not None:
        rows = [rows[k] for k in np.random.default_rng(shuffled).permutation(len(rows))]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        full = part + part[:1] * (size - len(part))
        index = np.array(full)
        object_, partner = np.array([PAIRS[pair] for pair, _, _ in full]).T
        activations = (
            made["time"][index[:, 1]] + made["object"][object_] + made["partner"][partner] + made["other"][index[:, 2]]
        )
        yield IDBatch(
            activations=activations.astype(np.float32),
            object_index=object_,
            pair_index=np.where(np.arange(size) < len(part), index[:, 0], -1),
            own_index=index[:, 1],
            other_index=index[:, 2],
        )


def ids(**changes: object) -> TemporalIDs:
    made = accumulate_temporal_ids(batches(parts()), pairs=len(PAIRS), objects=OBJECTS, model="tiny", fingerprint="f00")
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_the_time_is_what_is_left() -> None:
    """Object and partner go; as no two come at once, 1/36 of every time goes with them."""
    made, found = parts(), ids()
    expected = np.moveaxis(made["time"][:, 1:], 0, 1) * 35 / 36
    for row in range(3):
        np.testing.assert_allclose(found.values[:, row], expected, atol=2e-5)
    np.testing.assert_allclose(found.universal, expected, atol=2e-5)
    assert found.embeddings is not None
    np.testing.assert_allclose(found.embeddings[0], made["time"][:, 0] * 35 / 36, atol=2e-5)
    assert (found.counts == 2 * 6).all() and found.frames == FRAMES


def test_order_and_size_of_batches_do_not_matter() -> None:
    found, again = ids(), accumulate_temporal_ids(batches(parts(), 64, shuffled=3), pairs=len(PAIRS), objects=OBJECTS)
    np.testing.assert_allclose(found.values, again.values, atol=2e-5)


def test_reference_keeps_the_last_clip() -> None:
    made = parts()
    found = last_clips(batches(made), pairs=len(PAIRS), objects=OBJECTS)
    last: dict[tuple[int, int], np.ndarray] = {}
    for batch in batches(made):
        for row in np.flatnonzero(batch.pair_index >= 0):
            last[int(batch.object_index[row]), int(batch.own_index[row])] = np.asarray(batch.activations[row])
    for (row, frame), activation in last.items():
        np.testing.assert_array_equal(found.values[:, row, frame], activation[1:])


def test_index_by_frame() -> None:
    found = ids()
    np.testing.assert_array_equal(found[1, 3], found.universal[1, 2])
    layers = np.arange(3)
    assert found[layers, 7].shape == (3, WIDTH)
    np.testing.assert_array_equal(found[2, np.array([1, 7])], found.universal[2][np.array([0, 6])])
    for key in ((3, 1), (0, 0), (0, 8), 1, (0, 1, 1)):
        with pytest.raises(InputError):
            found[key]


def test_line_from_early_to_late() -> None:
    rng = np.random.default_rng(1)
    direction = rng.standard_normal((2, WIDTH))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    places = np.array([0.0, 1.0, 2.5, 3.0, 4.0, 6.0, 7.0])
    universal = np.stack([(sign * places[:, None]) * direction[k] + 3.0 for k, sign in enumerate((1, -1))])
    line = early_to_late(universal.astype(np.float32), np.arange(1, 8))
    np.testing.assert_allclose(line.order, [1, 1], atol=1e-6)
    np.testing.assert_allclose(line.share, [1, 1], atol=1e-5)
    np.testing.assert_allclose(line.coordinates(universal.astype(np.float32)), np.tile(places / 7, (2, 1)), atol=1e-5)
    np.testing.assert_allclose((line.direction * direction).sum(axis=1), [1, -1], atol=1e-5)
    # What is centred already lies where the origin lies, moved by its own part along the line.
    middle = line.coordinates(np.zeros((2, 1, WIDTH), np.float32), centred=True)
    np.testing.assert_allclose(middle[:, 0], places.mean() / 7, atol=1e-5)
    swapped = early_to_late(universal[:, [1, 0, 2, 3, 4, 5, 6]].astype(np.float32), np.arange(1, 8))
    assert 0.9 < swapped.order[0] < 1


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    found = ids()
    found.save(path)
    again = TemporalIDs.load(path)
    for field in dataclasses.fields(TemporalIDs):
        one, other = getattr(found, field.name), getattr(again, field.name)
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
    from jaxid.ids.spatial import SpatialIDs

    with pytest.raises(CheckpointError, match="not a file of spatial IDs"):
        SpatialIDs.load(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as a file of temporal IDs"):
        TemporalIDs.load(path)
    from safetensors.numpy import save_file

    metadata = {"format": "jaxid.ids.temporal", "format_version": "1", "axes": json.dumps({"values": ["layer"]})}
    save_file({"values": np.zeros(2, np.float32)}, path, metadata)
    with pytest.raises(CheckpointError, match="has axes"):
        TemporalIDs.load(path)
    with pytest.raises(OutputError, match="cannot write"):
        found.save(path / "ids.safetensors")


def test_traced_layers_and_frames_that_do_not_exist_give_nan() -> None:
    found = ids()
    read = jax.jit(lambda layer, frame: found[layer, frame])
    for layer, frame in ((0, 1), (2, 7), (-1, 3), (3, 3), (1, 0), (1, 8), (1, -7), (2**31 - 1, 4)):
        known = 0 <= layer < LAYERS and 1 <= frame <= 7
        expected = found[layer, frame] if known else np.full(WIDTH, np.nan)
        np.testing.assert_allclose(read(layer, frame), expected, rtol=1e-6)
        if not known:
            with pytest.raises(InputError, match=r"a layer is an integer from 0 to 2|no IDs of frame"):
                found[layer, frame]
    for key in ((1, 1.0), (True, 1), ("1", 1)):
        with pytest.raises(InputError):
            found[key]


def test_what_is_not_finite() -> None:
    for number in (np.nan, np.inf):
        values = ids().values.copy()
        values[1, 1, 1, 1] = number
        with pytest.raises(InputError, match="values must be finite, but 1 of its"):
            ids(values=values)


def test_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="ascending frames"):
        ids(frames=(7, 6, 5, 4, 3, 2, 1))
    with pytest.raises(InputError, match="objects must name 3"):
        ids(objects=("star", "star", "cup"))
    with pytest.raises(InputError, match=r"no ID at frames \[2\]"):
        _ = ids(counts=np.tile(np.array([1, 0, 1, 1, 1, 1, 1], np.int32), (3, 1))).universal
    with pytest.raises(InputError, match="hold only padding"):
        accumulate_temporal_ids([], pairs=1, objects=OBJECTS)
    batch = next(batches(parts()))
    for change, message in (
        ({"own_index": batch.own_index + 7}, "own_index must be from 0 to 6"),
        ({"object_index": batch.object_index[:3]}, "object_index is .3., activations"),
        ({"activations": np.asarray(batch.activations) * np.nan}, "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            accumulate_temporal_ids([batch._replace(**change)], pairs=len(PAIRS), objects=OBJECTS)
