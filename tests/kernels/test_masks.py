"""Which keys a query may read: worked examples, and Hugging Face's sliding window."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.masking_utils import sliding_window_causal_mask_function

from jaxid.kernels.masks import NEVER, Reads, blocks, causal, everything, with_spans, within_spans


def test_causal_is_the_worked_example() -> None:
    positions, valid = jnp.arange(4)[None], jnp.array([[True, True, True, False]])
    found = causal(positions, positions, valid)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    np.testing.assert_array_equal(found.mask()[0], np.array(expected, bool))
    assert found.positions.tolist() == [[0, 1, 2, NEVER]]
    np.testing.assert_array_equal(everything(2, valid).mask(), np.array([[[1, 1, 1, 0]] * 2], bool))


def test_causal_for_later_queries() -> None:
    """Two queries after a prefix of three keys, as in a continued prompt; row 1 has one key less."""
    queries = jnp.array([[3, 4], [2, 3]])
    keys = jnp.array([[0, 1, 2, 3, 4], [0, 1, 9, 2, 3]])
    valid = jnp.array([[True] * 5, [True, True, False, True, True]])
    expected = [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]]
    np.testing.assert_array_equal(causal(queries, keys, valid).mask(), np.array(expected, bool))


@pytest.mark.parametrize("window", [1, 3, 9])
@pytest.mark.parametrize("sliding", [True, False])
def test_a_window_is_hugging_faces_where_a_layer_slides(window: int, sliding: bool) -> None:
    places, none, positions = torch.arange(9), torch.tensor(0), jnp.arange(9)[None]
    theirs = sliding_window_causal_mask_function(window)(none, none, places[:, None], places)
    found = causal(positions, positions).within(positions, window, jnp.asarray(sliding)).mask()
    np.testing.assert_array_equal(found[0], theirs.numpy() if sliding else np.tri(9, dtype=bool))


def test_a_window_counts_positions_and_not_indices() -> None:
    queries, keys = jnp.array([[6, 9], [2, 3]]), jnp.array([[3, 4, 6, 9], [0, 5, 1, 2]])
    found = causal(queries, keys).within(queries, 3, True)
    expected = [[[0, 1, 1, 0], [0, 0, 0, 1]], [[1, 0, 1, 1], [0, 0, 1, 1]]]
    np.testing.assert_array_equal(found.mask(), np.array(expected, bool))
    narrower = found.within(queries, 1, True).within(queries, 2, True)  # the narrowest counts
    np.testing.assert_array_equal(narrower.mask(), keys[:, None] == queries[:, :, None])


def test_spans_are_the_worked_example() -> None:
    found = within_spans(jnp.array([[-1, 0, 0, 1], [0, -1, 1, 0], [-1, -1, -1, -1]])).mask()
    expected = [
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]],
        [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]],
        np.zeros((4, 4)),
    ]
    np.testing.assert_array_equal(found, np.array([np.array(row, bool) for row in expected]))


def test_spans_beside_what_is_causal() -> None:
    """Pictures of two and three tokens after and before a word: their tokens read each other, words do not."""
    positions, spans = jnp.arange(7)[None], jnp.array([[-1, 0, 0, -1, 1, 1, 1]])
    reads = with_spans(causal(positions, positions), spans, spans)
    wanted = np.tri(7, dtype=bool) | np.asarray(within_spans(spans).mask())[0]
    np.testing.assert_array_equal(reads.mask()[0], wanted)
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


@pytest.mark.parametrize("window", [None, 2, "full"])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_side_by_side_read_their_own_keys(rows: int, window: int | str | None) -> None:
    """Against blocks of the mask on a diagonal; prompts begin at other places, and one has padding."""
    positions, valid = jnp.array([[700, 701, 702, 703], [0, 1, 2, 2]]), jnp.array([[True] * 4, [True] * 3 + [False]])
    reads = causal(positions[:, 1:], positions, valid)
    if window is not None:  # in a layer without a window too, whose lowest position has no bound
        reads = reads.within(positions[:, 1:], 2, jnp.asarray(window == 2))
    wanted = np.zeros((2, rows, 3, rows, 4), bool)
    wanted[:, np.arange(rows), :, np.arange(rows)] = reads.mask()
    np.testing.assert_array_equal(reads.by_row(rows).mask(), wanted.reshape(2, rows * 3, rows * 4))


def test_rows_side_by_side_stay_apart_at_the_ends_of_positions() -> None:
    """One prompt's positions serve two; a query may read nothing, or all that is no padding."""
    keys = jnp.array([[5, 6, 7, NEVER]])
    reads = Reads(jnp.array([[-9, NEVER - 1], [4, 6]]), keys, jnp.array([[NEVER, -9]]))
    wanted = np.zeros((2, 2, 2, 2, 4), bool)
    wanted[:, np.arange(2), :, np.arange(2)] = reads.mask()
    assert wanted.any() and not reads.mask()[0, 0].any()
    np.testing.assert_array_equal(reads.by_row(2).mask(), wanted.reshape(2, 4, 8))
    with pytest.raises(ValueError, match=r"spans"):
        within_spans(keys).by_row(2)


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
