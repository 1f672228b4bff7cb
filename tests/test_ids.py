"""`jaxid.ids`: planted IDs are recovered, and files come back as they were or are refused."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from jaxid.errors import CheckpointError, InputError, OutputError
from jaxid.ids.accumulate import IDBatch
from jaxid.ids.spatial import SpatialIDs, accumulate_ids
from jaxid.kernels import probing

LAYERS, WIDTH = 3, 20
OBJECTS = ("star", "fish", "cup")
SIZES = (224, 124)
PAIRS = list(itertools.permutations(range(3), 2))  # (A, B)


def _planted(seed: int = 0) -> np.ndarray:
    """IDs [L + 1, size, X, Y, D], linear in the place, smaller for the smaller size."""
    rng = np.random.default_rng(seed)
    right, down = rng.normal(size=(2, LAYERS + 1, 1, 1, 1, WIDTH))
    x, y = np.meshgrid(np.arange(4) - 1.5, np.arange(4) - 1.5, indexing="ij")
    grid = x[..., None] * right + y[..., None] * down
    return grid * np.array([1.0, 0.5])[:, None, None, None]


def _pictures(planted: np.ndarray, noise: float = 0.0, seed: int = 1) -> IDBatch:
    """Every placement of every pair and size in a shuffled order: content + A's place + B's planted ID."""
    rng = np.random.default_rng(seed)
    content = 20 * rng.normal(size=(len(OBJECTS), LAYERS + 1, WIDTH))
    other = 5 * rng.normal(size=(len(PAIRS), 16, LAYERS + 1, WIDTH))
    rows = [
        (PAIRS[pair][1], pair, a, b, s)
        for pair in range(len(PAIRS))
        for a in range(16)
        for b in range(16)
        for s in range(2)
        if a != b
    ]
    index = rng.permutation(np.array(rows)).T
    obj, pair, a, b, s = index
    activations = content[obj] + other[pair, a] + planted[:, s, b % 4, b // 4].swapaxes(0, 1)
    activations += noise * rng.normal(size=activations.shape)
    return IDBatch(activations.astype(np.float32), obj, pair, own_index=b, other_index=a, size_index=s)


def _batches(pictures: IDBatch, size: int = 256):
    """Batches of equal length, the last one padded with NaN rows of pair -1."""
    for first in range(0, len(pictures.pair_index), size):
        part = [np.asarray(field)[first : first + size] for field in pictures if field is not None]
        lacking = size - len(part[0])
        part[0] = np.concatenate([part[0], np.full((lacking, *part[0].shape[1:]), np.nan, np.float32)])
        yield IDBatch(*[part[0], *(np.pad(field, (0, lacking), constant_values=-1) for field in part[1:])])


def _select(pictures: IDBatch, rows: np.ndarray) -> IDBatch:
    return IDBatch(*(np.asarray(field)[rows] for field in pictures if field is not None))


def _extract(pictures: IDBatch, **options) -> SpatialIDs:
    return accumulate_ids(_batches(pictures), pairs=len(PAIRS), objects=OBJECTS, sizes=SIZES, **options)


def _centred(planted: np.ndarray) -> np.ndarray:
    """What extraction finds of the plant.

    Not quite the plant less its mean: a folder has no B at the place of A itself, so folder means differ.
    """
    over_sizes = planted.mean(axis=1, keepdims=True)
    folder_mean = (over_sizes.sum(axis=(2, 3), keepdims=True) - over_sizes) / 15  # A at each place
    seen = (folder_mean.sum(axis=(2, 3), keepdims=True) - folder_mean) / 15  # mean over A's places but b
    return planted - seen


@pytest.fixture(scope="module")
def ids() -> SpatialIDs:
    return _extract(_pictures(_planted()), model="tiny", fingerprint="abc")


def test_planted_ids_are_recovered(ids):
    expected = _centred(_planted())
    for row, _ in enumerate(OBJECTS):
        np.testing.assert_allclose(ids.values[:, row], expected[1:], atol=1e-4)
        np.testing.assert_allclose(ids.embeddings[row], expected[0], atol=1e-4)
    np.testing.assert_allclose(ids.universal, expected[1:, 0], atol=1e-4)
    np.testing.assert_allclose(ids.universal_at(124), expected[1:, 1], atol=1e-4)
    np.testing.assert_array_equal(ids.counts, 2 * 15)
    assert (ids.model, ids.fingerprint, ids.objects, ids.sizes) == ("tiny", "abc", OBJECTS, SIZES)
    assert ids.layer_names == ("blocks.0.resid_post", "blocks.1.resid_post", "blocks.2.resid_post")


def test_planted_geometry_is_recovered(ids):
    planted = _planted()[1:, 0]
    np.testing.assert_allclose(ids.explained_variance(), 1.0, atol=1e-4)
    np.testing.assert_allclose(sum(probing.row_column_shares(ids.universal)), 1.0, atol=1e-4)
    np.testing.assert_allclose(ids.agreement(), 1.0, atol=1e-5)
    x_axis, y_axis = ids.axes()
    for axis, step in (
        (x_axis, planted[:, 1, 0] - planted[:, 0, 0]),
        (y_axis, planted[:, 0, 1] - planted[:, 0, 0]),
    ):
        cosine = (axis * step).sum(-1) / np.linalg.norm(axis, axis=-1) / np.linalg.norm(step, axis=-1)
        np.testing.assert_allclose(cosine, 1.0, atol=1e-5)
    coordinates = ids.plane_coordinates()
    assert coordinates.shape == (LAYERS, 4, 4, 2)
    assert (np.diff(coordinates[..., 1], axis=2) > 0).all()  # the second coordinate grows down the rows
    assert (probing.place_correlation(ids.universal)[:, 1] > 0.999).all()
    words = jnp.ones((LAYERS, 5, WIDTH))
    assert ids.plane_coordinates(words).shape == (LAYERS, 5, 2)


def test_noise_averages_out():
    found = _extract(_pictures(_planted(), noise=1.0))
    error = np.asarray(found.universal) - _centred(_planted())[1:, 0]
    # 90 pictures (6 pairs, 15 places of A) behind each universal ID.
    assert 0.7 < error.std() * 90**0.5 < 1.3
    assert found.agreement().min() > 0.9


def test_one_hot_cells_have_low_additive_shares():
    planted = np.zeros((LAYERS + 1, 2, 4, 4, WIDTH))
    for cell in range(16):
        planted[:, :, cell % 4, cell // 4, cell] = 1.0
    shares = probing.row_column_shares(_extract(_pictures(planted)).universal)
    np.testing.assert_allclose(shares, 0.2, atol=1e-3)


def test_bfloat16_activations_give_float32_ids(ids):
    pictures = _pictures(_planted())
    rounded = pictures._replace(activations=jnp.asarray(pictures.activations, jnp.bfloat16))
    found = accumulate_ids([rounded], pairs=len(PAIRS), objects=OBJECTS, sizes=SIZES)
    assert found.values.dtype == np.float32
    np.testing.assert_allclose(found.values, ids.values, atol=0.1)


def test_objects_and_cells_without_pictures_are_skipped():
    pictures = _pictures(_planted())
    keep = (pictures.object_index != 2) & ~((pictures.object_index == 1) & (pictures.own_index == 6))
    found = _extract(_select(pictures, keep))
    assert (found.counts[2] == 0).all()
    assert found.counts[1, 0, 2, 1] == 0  # cell 6 is column 2, row 1
    np.testing.assert_array_equal(found.values[:, 1, :, 2, 1], 0.0)
    np.testing.assert_allclose(found.universal[:, 2, 1], found.for_object("star")[:, 2, 1], rtol=1e-6)
    np.testing.assert_allclose(found.universal[:, 0, 0], found.values[:, :2, 0, 0, 0].mean(axis=1), rtol=1e-5)
    assert np.isfinite(found.agreement()).all()
    with pytest.raises(InputError, match=r"'fish' at cells \[\(2, 1\)\]"):
        found.for_object("fish")


def test_universal_with_a_hole_is_refused():
    pictures = _pictures(_planted())
    keep = pictures.own_index != 11
    found = _extract(_select(pictures, keep))
    with pytest.raises(InputError, match=r"cells \[\(3, 2\)\], size 224"):
        found.axes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair_index": 6}, "pair_index must be from 0 to 5"),
        ({"other_index": 16}, "other_index must be"),
        ({"own_index": -1}, "own_index must be"),
        ({"size_index": 2}, "size_index must be"),
        ({"object_index": 3}, "object_index must be"),
        ({"other_index": 5, "own_index": 5}, "both objects of a pair in one place"),
        ({"object_index": 0, "pair_index": 0}, "two different objects"),
        ({"activations": np.inf}, "'fish' are not finite"),
    ],
)
def test_wrong_batches_are_refused(change, message):
    pictures = _pictures(_planted())
    row = int(np.flatnonzero(pictures.pair_index == 0)[0])  # pair 0 is (star, fish)
    changed = {name: getattr(pictures, name).copy() for name in change}
    for name, value in change.items():
        changed[name][row] = value
    with pytest.raises(InputError, match=message):
        _extract(pictures._replace(**changed))


def test_a_pair_with_two_objects_in_different_batches_is_refused():
    pictures = _pictures(_planted())
    first = _select(pictures, pictures.pair_index == 0)
    second = first._replace(object_index=np.full_like(first.object_index, 2))
    with pytest.raises(InputError, match="Batch 1 has a pair with two different objects"):
        accumulate_ids([first, second], pairs=1, objects=OBJECTS, sizes=SIZES)


def test_batches_of_other_shapes_and_none_are_refused():
    pictures = _pictures(_planted())
    narrow = pictures._replace(activations=pictures.activations[..., :-1])
    with pytest.raises(InputError, match="Batch 1 has activations"):
        accumulate_ids([pictures, narrow], pairs=len(PAIRS), objects=OBJECTS, sizes=SIZES)
    short = pictures._replace(own_index=pictures.own_index[:-1])
    with pytest.raises(InputError, match="own_index is"):
        accumulate_ids([short], pairs=len(PAIRS), objects=OBJECTS, sizes=SIZES)
    with pytest.raises(InputError, match="hold only padding"):
        accumulate_ids([], pairs=1, objects=OBJECTS)


def test_indexing_broadcasts(ids):
    assert ids[1, 0, 3].shape == (WIDTH,)
    np.testing.assert_array_equal(ids[1, 0, 3], ids.universal[1, 0, 3])
    layers = np.array([0, 2])
    for index in (layers, jnp.asarray(layers), [0, 2]):
        np.testing.assert_array_equal(ids[index, 3, 0], ids.universal[layers, 3, 0])
    grid = ids[layers[:, None, None], np.arange(4)[:, None], np.arange(4)]
    np.testing.assert_array_equal(grid, ids.universal[layers])
    np.testing.assert_array_equal(ids[:, 2, 1], ids.universal[:, 2, 1])


def test_universal_may_first_be_asked_for_inside_a_traced_function():
    ids = _extract(_pictures(_planted()))
    inside = jax.jit(lambda layer: ids[layer, 0, 0] - ids[layer, 3, 0])(2)
    np.testing.assert_allclose(inside, ids[2, 0, 0] - ids[2, 3, 0], rtol=1e-6)


@pytest.mark.parametrize("key", [(3, 0, 0), (-1, 0, 0), ([0, 3], 0, 0), (0, 4, 0), (0, 0, -1), (0.5, 0, 0), (0, 0), 1])
def test_indices_out_of_range_are_refused(ids, key):
    with pytest.raises(InputError):
        ids[key]


def test_unknown_objects_and_sizes_are_refused(ids):
    for function, name, known in ((ids.for_object, "dog", "star, fish, cup"), (ids.universal_at, 74, r"\[224, 124\]")):
        with pytest.raises(InputError, match=known):
            function(name)


def test_at_box(ids):
    # In an image of 400 x 200 a cell is 100 x 50: this box is centred in cell (2, 1).
    np.testing.assert_allclose(ids.at_box(1, (230, 65, 40, 20), (400, 200)), ids[1, 2, 1], atol=1e-6)
    between = ids.at_box(1, (280, 65, 40, 20), (400, 200))
    np.testing.assert_allclose(between, (ids[1, 2, 1] + ids[1, 3, 1]) / 2, atol=1e-5)
    published = ids.at_box(1, (180, 40, 40, 20), (400, 200), half_cell=False)
    np.testing.assert_allclose(published, ids[1, 2, 1], atol=1e-6)
    many = ids.at_box(np.array([0, 2]), np.array([[230, 65, 40, 20.0], [0, 0, 10, 10], [390, 190, 10, 10]]), (400, 200))
    assert many.shape == (2, 3, WIDTH)
    np.testing.assert_allclose(many[1], jnp.stack([ids[2, 2, 1], ids[2, 0, 0], ids[2, 3, 3]]), atol=1e-6)
    for layer, box, size in ((3, (0, 0, 1, 1), (4, 4)), (0, (0, 0, 1), (4, 4)), (0, (0, 0, 1, 1), (0, 4))):
        with pytest.raises(InputError):
            ids.at_box(layer, box, size)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["values", "embeddings"])
def test_ids_are_finite(ids, tmp_path, field, number):
    array = getattr(ids, field).copy()
    array.flat[3] = number
    with pytest.raises(InputError, match=f"{field} must be finite, but 1 of its"):
        dataclasses.replace(ids, **{field: array})
    content = _authors_file(ids)
    content[0][OBJECTS[0]][0, 0, 224][2] = number
    torch.save(content, tmp_path / "ids.pt")
    with pytest.raises(CheckpointError, match=r"ids\.pt.*finite"):
        SpatialIDs.from_torch(tmp_path / "ids.pt")
    ids.save(tmp_path / "ids.safetensors")
    tensors = load_file(tmp_path / "ids.safetensors") | {field: array}
    save_file(tensors, tmp_path / "ids.safetensors", _metadata(tmp_path / "ids.safetensors"))
    with pytest.raises(CheckpointError, match=rf"{field} in .*ids\.safetensors must be finite"):
        SpatialIDs.load(tmp_path / "ids.safetensors")


def _metadata(path) -> dict[str, str]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length])["__metadata__"]


def test_save_and_load(ids, tmp_path):
    path = tmp_path / "ids.safetensors"
    ids.save(path)
    ids.save(path)  # replaces
    back = SpatialIDs.load(path)
    for name in ("values", "counts", "embeddings"):
        np.testing.assert_array_equal(getattr(back, name), getattr(ids, name))
    for name in ("objects", "sizes", "layer_names", "model", "fingerprint"):
        assert getattr(back, name) == getattr(ids, name)
    assert [file.name for file in tmp_path.iterdir()] == ["ids.safetensors"]
    metadata = _metadata(path)
    assert json.loads(metadata["axes"])["values"] == ["layer", "object", "size", "column", "row", "width"]
    assert metadata["created_by"].startswith("jaxid ")


def test_files_of_the_first_version_are_read(ids, tmp_path):
    path = tmp_path / "new" / "ids.safetensors"
    ids.save(path)  # makes the folder
    save_file(load_file(path), path, _metadata(path) | {"sizes": "[224.0, 124.0]"})  # as version 0.1 wrote them
    assert SpatialIDs.load(path).sizes == SIZES


def test_failed_save_leaves_nothing_behind(ids, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        ids.save(tmp_path / "folder")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        ids.save(tmp_path / "file" / "ids.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "foreign bytes",
        "missing",
        "foreign tensors",
        "version",
        "no objects",
        "shape",
        "nan",
        "extra",
    ],
)
def test_damaged_files_are_refused(ids, tmp_path, damage):
    path = tmp_path / "ids.safetensors"
    ids.save(path)
    tensors, metadata = load_file(path), _metadata(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign bytes":
        path.write_bytes(b"not a file of identifiers")
    elif damage == "missing":
        path.unlink()
    elif damage == "foreign tensors":
        metadata = {}
    elif damage == "version":
        metadata["format_version"] = "0"
    elif damage == "no objects":
        del metadata["objects"]
    elif damage == "shape":
        tensors["counts"] = np.ascontiguousarray(tensors["counts"][:-1])
    elif damage == "nan":
        tensors["values"] = tensors["values"] * np.float32(np.nan)
    elif damage == "extra":
        tensors["more"] = tensors["counts"]
    if damage not in ("truncated", "foreign bytes", "missing"):
        save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=r"ids\.safetensors"):
        SpatialIDs.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"objects": ("star", "star", "cup")},
        {"sizes": (224,)},
        {"layer_names": ()},
        {"counts": np.ones((3, 2, 4), np.int32)},
        {"embeddings": np.zeros((3, 2, 4, 4, 1), np.float32)},
        {"values": np.zeros((3, 4, 4, 5), np.float32)},
    ],
)
def test_parts_that_do_not_fit_are_refused(ids, change):
    fields = {name: getattr(ids, name) for name in ("values", "counts", "objects", "sizes", "layer_names")}
    # jaxtyping's import hook, where it is on, finds wrong shapes first.
    with pytest.raises((InputError, jaxtyping.TypeCheckError)):
        SpatialIDs(**{**fields, **change})


def _authors_file(ids: SpatialIDs, *, layer_key="hf", key_type=int, dtype=torch.float32) -> dict:
    """The authors' layout: [layer][object][(x, y, size)] -> [D]."""
    layers = dict(enumerate(ids.values, start=1 if layer_key == "hf" else 0))
    if layer_key == "hf":
        layers[0] = ids.embeddings
    return {
        key_type(layer): {
            name: {
                (x, y, size): torch.tensor(table[row, s, x, y], dtype=dtype)
                for s, size in enumerate(ids.sizes)
                for x in range(4)
                for y in range(4)
            }
            for row, name in enumerate(ids.objects)
        }
        for layer, table in layers.items()
    }


@pytest.mark.parametrize("key_type", [int, str])
@pytest.mark.parametrize("layer_key", ["hf", "layer"])
def test_authors_files_come_back(ids, tmp_path, key_type, layer_key):
    path = tmp_path / "ids.pt"
    torch.save(_authors_file(ids, layer_key=layer_key, key_type=key_type), path)
    back = SpatialIDs.from_torch(path, layer_key=layer_key)
    np.testing.assert_array_equal(back.values, ids.values)
    assert (back.objects, back.sizes, back.layer_names) == (ids.objects, ids.sizes, ids.layer_names)
    if layer_key == "hf":
        np.testing.assert_array_equal(back.embeddings, ids.embeddings)
    else:
        assert back.embeddings is None
    np.testing.assert_array_equal(back.universal, ids.universal)
    one = SpatialIDs.from_torch(path, size=124, layer_key=layer_key)
    np.testing.assert_array_equal(one.universal, ids.universal_at(124))
    back.save(tmp_path / "ids.safetensors")
    assert (SpatialIDs.load(tmp_path / "ids.safetensors").embeddings is None) == (layer_key == "layer")


def test_authors_bfloat16_file_without_embeddings(ids, tmp_path):
    tree = _authors_file(ids, dtype=torch.bfloat16)
    del tree[0]
    torch.save(tree, tmp_path / "ids.pt")
    back = SpatialIDs.from_torch(tmp_path / "ids.pt")
    assert back.embeddings is None
    np.testing.assert_array_equal(back.values, np.asarray(jnp.asarray(ids.values, jnp.bfloat16), np.float32))


@pytest.mark.parametrize("sized", [True, False])
def test_authors_universal_files(ids, tmp_path, sized):
    tree = {
        layer + 1: {
            (x, y, 224) if sized else (x, y): torch.tensor(np.asarray(ids[layer, x, y]))
            for x in range(4)
            for y in range(4)
        }
        for layer in range(LAYERS)
    }
    torch.save(tree, tmp_path / "universal.pt")
    back = SpatialIDs.from_torch(tmp_path / "universal.pt")
    assert back.objects == ("universal",)
    assert back.sizes == (224,)
    np.testing.assert_array_equal(back.universal, ids.universal)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree[2]["fish"].pop((1, 2, 124)), r"\[2\]\['fish'\] has no cell \(1, 2, 124\)"),
        (
            lambda tree: tree[2]["fish"].update({(4, 0, 224): torch.zeros(WIDTH)}),
            r"\[2\]\['fish'\] has an unexpected cell \(4",
        ),
        (
            lambda tree: tree[3]["cup"].update({(0, 0, 224): torch.zeros(7)}),
            r"\[3\]\['cup'\]\[\(0, 0, 224\)\] is not",
        ),
        (
            lambda tree: tree[3]["cup"].update({(0, 0, 224): torch.zeros(WIDTH) / 0}),
            r"\[\(0, 0, 224\)\] is not a finite",
        ),
        (lambda tree: tree[3]["cup"].update({(0, 0, 224): 1.0}), r"\[\(0, 0, 224\)\] is not a tensor"),
        (lambda tree: tree[3]["cup"].update({"0_0": torch.zeros(WIDTH)}), r"\['cup'\] has the key '0_0'"),
        (lambda tree: tree[1].pop("cup"), "layer 1 is of"),
        (lambda tree: tree.pop(2), "has no layer 2"),
        (lambda tree: tree.update({"2": tree[2]}), r"\['2'\] is not the index of a layer, or repeats one"),
        (lambda tree: tree.update({"last": tree[2]}), r"\['last'\] is not the index"),
        (lambda tree: tree.update({2: torch.zeros(WIDTH)}), r"\[2\] is not a dictionary"),
        (
            lambda tree: tree[2].update({"fish": {}}),
            r"\[2\]\['fish'\] is not a dictionary of spatial IDs, or is empty",
        ),
        (lambda tree: tree[2].update({5: {}}), r"\[2\] is keyed by"),
        (lambda tree: tree.clear(), "ids.pt is not a dictionary"),
        (lambda tree: [tree.pop(layer) for layer in (1, 2, 3)], "has no layer 1"),
    ],
)
def test_unknown_layouts_are_refused_naming_the_key(ids, tmp_path, change, message):
    tree = _authors_file(ids)
    change(tree)
    torch.save(tree, tmp_path / "ids.pt")
    with pytest.raises(CheckpointError, match=message):
        SpatialIDs.from_torch(tmp_path / "ids.pt")


def test_asking_a_torch_file_for_what_it_has_not(ids, tmp_path):
    torch.save(_authors_file(ids), tmp_path / "ids.pt")
    with pytest.raises(CheckpointError, match=r"no size 74; it has \[124, 224\]"):
        SpatialIDs.from_torch(tmp_path / "ids.pt", size=74)
    with pytest.raises(InputError, match="layer_key"):
        SpatialIDs.from_torch(tmp_path / "ids.pt", layer_key="block")


class _Anything:
    """A Python object, which a file could use to run code."""


@pytest.mark.parametrize("damage", ["missing", "foreign bytes", "truncated", "objects", "tensor"])
def test_damaged_torch_files_are_refused(ids, tmp_path, damage):
    path = tmp_path / "ids.pt"
    torch.save(_Anything() if damage == "objects" else _authors_file(ids), path)
    if damage == "missing":
        path.unlink()
    elif damage == "foreign bytes":
        path.write_bytes(b"hello" * 30)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "tensor":
        torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match=r"ids\.pt"):
        SpatialIDs.from_torch(path)
