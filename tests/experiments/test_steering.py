"""Steering to every cell: the vectors by hand, the answers by PyTorch."""

from pathlib import Path

import fixtures
import numpy as np
import oracle
import pytest

from jaxid.experiments.reference import with_bugs
from jaxid.experiments.steer_picture import steer_apart
from jaxid.experiments.steering import Steer, cell_vectors, steer_to_cells

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")  # of the tiny vocabulary


@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_vectors_are_differences_of_mirrored_cells(axis: str) -> None:
    layers, cells = [2, 0], oracle.universal()
    found = np.asarray(cell_vectors(oracle.ids(), axis, layers))
    assert found.shape == (2, 4, 4, oracle.WIDTH)
    for row, layer in enumerate(layers):
        for x, y in np.ndindex(4, 4):
            across = (3 - x, y) if axis == "horizontal" else (x, 3 - y)
            np.testing.assert_allclose(found[row, x, y], cells[layer, x, y] - cells[layer][across], atol=1e-5)
            np.testing.assert_array_equal(found[row, x, y], -found[row][across])


@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_steering_equals_pytorch_cell_by_cell(axis: str) -> None:
    batch, strength = oracle.batch(axis), 3.0
    found = steer_to_cells(fixtures.model(oracle.CASE), batch, oracle.ids(), layers=[2, 1], strength=strength).change
    assert found.shape == (2, 4, 4, 4, 2)
    control = oracle.torch_logprobs(batch)
    subject = oracle.positions(batch, [subject for subject, _ in oracle.PAIRS])[:, None]
    for row, layer in enumerate([2, 1]):
        vectors = strength * np.asarray(cell_vectors(oracle.ids(), axis, [layer]))[0]
        for x, y in [(0, 0), (1, 3), (3, 2)]:
            everywhere = np.broadcast_to(vectors[x, y], (4, 1, oracle.WIDTH))
            steered = oracle.torch_logprobs(batch, [oracle.adding(layer, subject, everywhere)])
            np.testing.assert_allclose(found[row, x, y], steered - control, atol=1e-4)
            assert layer == 2 or np.abs(steered - control).max() > 0.01
    # After the last layer no token but the last one counts.
    np.testing.assert_allclose(found[0], 0, atol=1e-5)


def test_both_words_are_pushed_apart_with_one_layers_ids() -> None:
    batch = oracle.batch("horizontal")
    found = steer_apart(
        fixtures.model(oracle.CASE),
        batch,
        oracle.ids(),
        layers=[0, 1],
        cells=((1, 2), (3, 0)),
        id_layer=2,
        strength=4.0,
    )
    words = np.stack([oracle.positions(batch, words) for words in zip(*oracle.PAIRS, strict=True)], axis=1)
    push = 4.0 * (oracle.universal()[2, 1, 2] - oracle.universal()[2, 3, 0])
    vectors = np.broadcast_to(np.stack([push, -push]), (4, 2, oracle.WIDTH))
    assert found.change.shape == (2, 4, 2)
    for layer in (0, 1):
        expected = oracle.torch_logprobs(batch, [oracle.adding(layer, words, vectors)])
        np.testing.assert_allclose(found.steered[layer], expected, atol=1e-4)
        assert np.abs(found.change[layer]).max() > 0.01


def test_bugs_of_the_published_code(tmp_path: Path) -> None:
    """Vectors read one layer earlier, added one token late, and the change's sign reversed."""
    model, batch = fixtures.model(oracle.CASE), oracle.batch("vertical")
    oracle.ids().save(tmp_path / "ids.safetensors")
    bugs = with_bugs(Steer(out=tmp_path, data=tmp_path, ids=tmp_path / "ids.safetensors"))
    found = bugs.change(
        steer_to_cells(model, batch, bugs.read_ids(), layers=[0, 1], strength=2.0, positions=bugs.positions(batch))
    )
    late = oracle.positions(batch, [subject for subject, _ in oracle.PAIRS])[:, None] + 1
    earlier = oracle.universal()[0]
    for x, y in [(0, 0), (2, 3)]:
        vectors = np.broadcast_to(2.0 * (earlier[x, y] - earlier[x, 3 - y]), (4, 1, oracle.WIDTH))
        steered = oracle.torch_logprobs(batch, [oracle.adding(1, late, vectors)])
        np.testing.assert_allclose(found[1, x, y], oracle.torch_logprobs(batch) - steered, atol=1e-4)
        assert np.abs(found[1, x, y]).max() > 0.005
    # What leaves layer 0 gets the embeddings' IDs, which hold no place.
    np.testing.assert_allclose(found[0], 0, atol=1e-5)
    assert np.abs(steer_to_cells(model, batch, oracle.ids(), layers=[0, 1], strength=2.0).change[0]).max() > 0.01
