"""The vectors of the belief swap are the published ones, and one sweep does what PyTorch does edit by edit."""

from typing import Any

import fixtures
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxid.errors import InputError
from jaxid.experiments import belief_swap
from jaxid.experiments.belief_swap import Swapped
from jaxid.interp.trace import rerun


def published_direction(axis: str, truth: int, layer: int) -> np.ndarray:
    """What is added to the subject's word."""
    cells = oracle.universal()[layer]
    if axis == "horizontal":
        right = cells[0, 0] - cells[3, 0]
        return right if truth == 1 else -right
    above = cells[0, 3] - cells[0, 0]
    return above if truth == 0 else -above


@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_directions_are_the_published_ones(axis: str) -> None:
    layers, truths = np.array([2, 0]), np.array([0, 1, 1])
    found = np.asarray(belief_swap.directions(oracle.ids(), axis, truths, layers))
    assert found.shape == (2, 3, 2, oracle.WIDTH)
    for row, layer in enumerate(layers):
        for item, truth in enumerate(truths):
            expected = published_direction(axis, int(truth), int(layer))
            np.testing.assert_allclose(found[row, item, 0], expected, atol=1e-5)
            np.testing.assert_array_equal(found[row, item, 1], -found[row, item, 0])


@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_sweep_equals_pytorch_edit_by_edit(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, layers, strengths = oracle.batch(axis), [1, 0], (0.5, 3.0)
    edits = []

    def spy(model: Any, prompts: Any, *edit: Any, **options: Any) -> Any:
        edits.extend(edit)
        return rerun(model, prompts, *edit, **options)

    monkeypatch.setattr(belief_swap, "rerun", spy)
    # Three at a time do not divide the eight edits.
    swap = belief_swap.swap_beliefs(
        fixtures.model(oracle.CASE), batch, oracle.ids(), layers=layers, strengths=strengths, seed=4, chunk=3
    )
    (edit,) = edits
    vectors = np.asarray(edit.vector)
    words = np.stack([oracle.positions(batch, words) for words in zip(*oracle.PAIRS, strict=True)], axis=1)
    residuals = oracle.torch_residuals(batch)
    np.testing.assert_array_equal(swap.layers, layers)
    np.testing.assert_array_equal(swap.truth, oracle.TRUTHS)
    np.testing.assert_allclose(swap.control, oracle.torch_logprobs(batch), atol=1e-4)
    assert swap.steered.shape == (2, 2, 2, 4, 2)
    rows = np.arange(4)[:, None]
    for row, layer in enumerate(layers):
        lengths = np.linalg.norm(residuals[layer][rows, words], axis=-1)
        believed = oracle.torch_logprobs(batch).argmax(axis=-1)
        directions = np.stack([published_direction(axis, int(answer), layer) for answer in believed])
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        for column, strength in enumerate(strengths):
            belief, noise = vectors[:, row, column]
            expected = np.stack([directions, -directions], axis=1) * (strength * lengths)[..., None]
            np.testing.assert_allclose(belief, expected, atol=1e-4 * expected.max())
            np.testing.assert_allclose(np.linalg.norm(noise, axis=-1), strength * lengths, rtol=1e-4)
            for condition in (0, 1):
                added = oracle.adding(layer, words, vectors[condition, row, column])
                np.testing.assert_allclose(
                    swap.steered[condition, row, column], oracle.torch_logprobs(batch, [added]), atol=2e-4
                )
    # The edits do something, and each another thing.
    flat = swap.steered.reshape(8, -1)
    assert min(np.abs(one - other).max() for k, one in enumerate(flat) for other in flat[:k]) > 0.01
    assert np.abs(swap.steered - swap.control).max(axis=(-2, -1)).min() > 0.01


def test_noise_is_drawn_for_every_layer_item_and_word(monkeypatch: pytest.MonkeyPatch) -> None:
    edits = []

    def spy(model: Any, prompts: Any, *edit: Any, **options: Any) -> Any:
        edits.extend(edit)
        return rerun(model, prompts, *edit, **options)

    monkeypatch.setattr(belief_swap, "rerun", spy)
    found = [
        belief_swap.swap_beliefs(
            fixtures.model(oracle.CASE),
            oracle.batch("horizontal"),
            oracle.ids(),
            layers=[2, 0],
            strengths=(0.5, 3.0),
            seed=seed,
            chunk=3,
        )
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(found[0].steered, found[1].steered)
    np.testing.assert_array_equal(found[0].steered[0], found[2].steered[0])
    assert np.abs(found[0].steered[1] - found[2].steered[1]).max() > 0.01

    directions = np.concatenate([np.asarray(edit.vector)[1, :, 0].reshape(-1, oracle.WIDTH) for edit in edits[1:]])
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    cosines = np.abs(directions @ directions.T)[np.triu_indices(len(directions), 1)]
    assert cosines.max() < 0.8  # of 32 independent directions in 32 dimensions
    assert cosines.mean() == pytest.approx(np.sqrt(2 / np.pi / oracle.WIDTH), rel=0.15)
    both = np.asarray(edits[0].vector)[1]
    np.testing.assert_allclose(both[:, 1], 6 * both[:, 0], rtol=1e-5)  # strengths multiply one and the same noise


def test_swapped_is_a_change_of_sign_and_correct_reads_the_control() -> None:
    control = np.log(np.array([[0.6, 0.2], [0.3, 0.5], [0.1, 0.2]]))
    steered = np.log(np.array([[0.1, 0.2], [0.4, 0.5], [0.01, 0.009]]))
    swap = Swapped(
        control=control,
        steered=np.stack([steered, control])[:, None, None],
        layers=np.array([0]),
        strengths=np.array([5.0]),
        truth=np.array([0, 0, 1]),
        control_texts=np.full(3, "", object),
        steered_texts=np.full((2, 1, 1, 3), "", object),
    )
    assert swap.correct.tolist() == [True, False, True]
    assert swap.swapped[:, 0, 0].tolist() == [[True, False, True], [False, False, False]]


def test_rescaled_leaves_a_zero_vector_zero() -> None:
    vectors = jnp.array([[[[0.0, 0.0], [3.0, 4.0]]]])
    scaled = belief_swap.rescaled(vectors, jnp.array([[[1.0, 2.0]]]), np.array([5.0], np.float32))
    np.testing.assert_allclose(np.asarray(scaled)[0, 0, 0], [[0, 0], [6, 8]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, oracle.WIDTH), (oracle.LAYERS, 16)])
def test_ids_of_another_model_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{shape[0]} layers of width {shape[1]}"):
        belief_swap.swap_beliefs(fixtures.model(oracle.CASE), oracle.batch("vertical"), oracle.ids(*shape), layers=[0])


@pytest.mark.parametrize("layer", [-1, oracle.LAYERS])
def test_layers_out_of_range_are_refused(layer: int) -> None:
    with pytest.raises(InputError, match=str(layer)):
        belief_swap.swap_beliefs(fixtures.model(oracle.CASE), oracle.batch("vertical"), oracle.ids(), layers=[layer])
