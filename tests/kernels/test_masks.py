"""Which keys a query may read: worked examples, and Hugging Face's sliding window."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.masking_utils import sliding_window_causal_mask_function

from jaxid.kernels.attention import causal_mask, near, same_span


def test_causal_mask_is_the_worked_example() -> None:
    positions, valid = jnp.arange(4)[None], jnp.array([[True, True, True, False]])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    np.testing.assert_array_equal(causal_mask(positions, positions, valid)[0], np.array(expected, bool))


def test_causal_mask_of_later_queries() -> None:
    """Two queries after a prefix of three keys, as in a continued prompt; row 1 has one key less."""
    queries = jnp.array([[3, 4], [2, 3]])
    keys = jnp.array([[0, 1, 2, 3, 4], [0, 1, 9, 2, 3]])
    valid = jnp.array([[True] * 5, [True, True, False, True, True]])
    expected = [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]]
    np.testing.assert_array_equal(causal_mask(queries, keys, valid), np.array(expected, bool))


def test_near_is_a_sliding_window() -> None:
    """Three keys back at most, the query's own included; the window counts positions, not indices."""
    positions = jnp.arange(5)[None]
    expected = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(near(positions, positions, 3)[0], expected)
    causal = causal_mask(positions, positions, jnp.ones((1, 5), bool))
    np.testing.assert_array_equal((causal & near(positions, positions, 1))[0], np.eye(5, dtype=bool))
    found = near(jnp.array([[6, 9], [2, 3]]), jnp.array([[3, 4, 6, 9], [0, 5, 1, 2]]), 3)
    expected = [[[0, 1, 1, 1], [0, 0, 0, 1]], [[1, 1, 1, 1], [0, 1, 1, 1]]]
    np.testing.assert_array_equal(found, np.array(expected, bool))


@pytest.mark.parametrize("window", [1, 3, 8])
def test_near_is_hugging_faces_window(window: int) -> None:
    places, none = torch.arange(8), torch.tensor(0)
    theirs = sliding_window_causal_mask_function(window)(none, none, places[:, None], places)
    positions = jnp.arange(8)[None]
    ours = near(positions, positions, window) & causal_mask(positions, positions, jnp.ones((1, 8), bool))
    np.testing.assert_array_equal(ours[0], theirs.numpy())


def test_same_span_is_the_worked_example() -> None:
    found = same_span(jnp.array([[-1, 0, 0, 1], [0, -1, 1, 0], [-1, -1, -1, -1]]))
    expected = [
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]],
        [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]],
        np.zeros((4, 4)),
    ]
    np.testing.assert_array_equal(found, np.array([np.array(row, bool) for row in expected]))
