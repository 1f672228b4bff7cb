"""Which keys a query may read: worked examples, and Hugging Face's sliding window."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.masking_utils import sliding_window_causal_mask_function

from jaxid.kernels.attention import causal_mask, near, same_span
from jaxid.kernels.masks import NEVER, Reads, blocks, causal, everything, with_spans, within_spans


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


# --- masks told by the tokens -----------------------------------------------------------------------------------------


def test_causal_is_the_worked_example() -> None:
    positions, valid = jnp.arange(4)[None], jnp.array([[True, True, True, False]])
    found = causal(positions, positions, valid)
    np.testing.assert_array_equal(found.mask(), causal_mask(positions, positions, valid))
    assert found.positions.tolist() == [[0, 1, 2, NEVER]]
    np.testing.assert_array_equal(everything(2, valid).mask(), np.array([[[1, 1, 1, 0]] * 2], bool))


@pytest.mark.parametrize("sliding", [True, False])
def test_a_window_is_hugging_faces_where_a_layer_slides(sliding: bool) -> None:
    places, none, positions = torch.arange(9), torch.tensor(0), jnp.arange(9)[None]
    theirs = sliding_window_causal_mask_function(3)(none, none, places[:, None], places)
    found = causal(positions, positions).within(positions, 3, jnp.asarray(sliding)).mask()
    np.testing.assert_array_equal(found[0], theirs.numpy() if sliding else np.tri(9, dtype=bool))


def test_spans_within_and_beside_what_is_causal() -> None:
    """Pictures of two and three tokens after and before a word: their tokens read each other, words do not."""
    positions, spans = jnp.arange(7)[None], jnp.array([[-1, 0, 0, -1, 1, 1, 1]])
    np.testing.assert_array_equal(within_spans(spans).mask(), same_span(spans))
    reads = with_spans(causal(positions, positions), spans, spans)
    np.testing.assert_array_equal(reads.mask()[0], np.tri(7, dtype=bool) | np.asarray(same_span(spans))[0])
    narrow = reads.within(positions, 2, True).mask()[0]
    np.testing.assert_array_equal(narrow, np.asarray(reads.mask()[0]) & np.triu(np.ones((7, 7), bool), -1))


def test_some_queries_and_copies_of_all() -> None:
    positions, spans = jnp.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 3]]), jnp.array([[-1, 0, 0, 1, 1]])
    valid = jnp.array([[True] * 5, [True] * 4 + [False]])
    reads = with_spans(causal(positions, positions, valid).within(positions, 2, True), spans, spans)
    keep = jnp.array([[4, 1], [0, 3]])
    wanted = jnp.take_along_axis(reads.mask(), keep[:, :, None], axis=1)
    np.testing.assert_array_equal(reads.take(keep).mask(), wanted)
    np.testing.assert_array_equal(reads.tile(3).mask(), jnp.tile(reads.mask(), (1, 3, 1)))
    alike = everything(1, valid)
    np.testing.assert_array_equal(alike.take(jnp.zeros((2, 1), jnp.int32)).mask(), alike.mask())
    assert alike.tile(3).high.shape == (2, 1)


@pytest.mark.parametrize("kind", ["causal", "window", "pictures", "own span"])
def test_blocks_leave_nothing_out_and_skip_what_is_far(kind: str) -> None:
    """Against the mask itself, by query blocks and by key blocks; padded to whole blocks."""
    size, count = 8, 12
    positions = jnp.arange(size * count)[None]
    spans = jnp.where(positions % 16 < 2, -1, positions // 16)
    reads = causal(positions, positions, positions < 80)
    reads = {
        "causal": reads,
        "window": reads.within(positions, 10, True),
        "pictures": with_spans(reads, spans, spans),
        "own span": within_spans(spans),
    }[kind]
    tiles = np.asarray(reads.mask())[0].reshape(count, size, count // 2, 2 * size).any(axis=(1, 3))
    for by_key in (False, True):
        first, last = (np.asarray(leaf)[0] for leaf in blocks(reads, size, 2 * size, by_key=by_key))
        needed = tiles.T if by_key else tiles
        index = np.arange(needed.shape[1])
        walked = (index >= first[:, None]) & (index < last[:, None])
        assert not (needed & ~walked).any()
        ends = [np.flatnonzero(row)[[0, -1]] for row in needed if row.any()]
        assert walked.sum() == sum(last - first + 1 for first, last in ends)
    nothing = Reads(jnp.full((1, 16), -1), jnp.arange(16)[None])
    assert [leaf.tolist() for leaf in blocks(nothing, 8, 8)] == [[[0, 0]], [[0, 0]]]
