"""How patches of a picture's squares and of a clip's frames are packed into tokens (LLaVA-NeXT, LLaVA-OneVision)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxid.nn.vision import VisionConfig

NEWLINE_POSITIONS = ("grid", "frame", "one_token", "no_token")
"""What the token `image_newline` follows: every row of a frame, every frame, the clip, or nothing."""

POOL_MODES = ("bilinear", "average")
"""How frames are halved."""


def taps(length: int, new: int) -> tuple[Int[np.ndarray, "new 2"], Float[np.ndarray, "new 2"]]:
    """Linear interpolation of a row of values to another length, as `torch.nn.functional.interpolate` does it.

    Args:
        length: number of values.
        new: number of interpolated values.

    Returns:
        Indices of the two values that each new one mixes, and their weights (corners not aligned, no antialiasing).
    """
    # PyTorch rounds the fused product and difference once to float32; at index 80 that changes a weight by 1e-5.
    step = float(np.float32(length) / np.float32(new))
    sources = np.maximum(step * (np.arange(new) + 0.5) - 0.5, 0.0).astype(np.float32)
    first = np.minimum(sources.astype(np.int64), length - 1)
    share = sources - first.astype(np.float32)
    both = np.stack([first, np.minimum(first + 1, length - 1)], axis=1)
    return both, np.stack([np.float32(1) - share, share], axis=1)


def pooling(length: int, mode: str) -> Float[np.ndarray, "new length"]:
    """The matrix that halves a row of values; odd lengths round up when interpolating, down when averaging pairs."""
    if mode == "average":
        pairs = np.repeat(np.eye(length // 2, dtype=np.float32) / 2, 2, axis=1)
        return np.pad(pairs, ((0, 0), (0, length % 2)))
    which, weights = taps(length, math.ceil(length / 2))
    return (np.eye(length, dtype=np.float32)[which] * weights[..., None]).sum(axis=1)


def clip_rows(frames: int, side: int, position: str, first: int) -> Int[np.ndarray, "I"]:
    """Which row of the features each token of a clip is; row 0 is `image_newline`.

    Args:
        frames: number of frames.
        side: tokens along a side of a frame.
        position: one of `NEWLINE_POSITIONS`.
        first: row of the clip's first token.
    """
    tokens = first + np.arange(frames * side * side)
    lines = {"grid": side, "frame": side * side, "one_token": len(tokens)}
    if position not in lines:
        return tokens
    return np.pad(tokens.reshape(-1, lines[position]), ((0, 0), (0, 1))).ravel()


class Layout(NamedTuple):
    """How a picture's tokens follow from the patches of its squares.

    Attributes:
        rows: the patch that each token is, counted over the picture's squares; -1 for `image_newline`, and -2 - k for
            the k-th mixed token.
        taps: the patches that make up each mixed token, Int[R, 4].
        weights: their weights, Float[R, 4].
        squares: number of squares.
    """

    rows: Int[np.ndarray, "I"]
    taps: Int[np.ndarray, "R 4"]
    weights: Float[np.ndarray, "R 4"]
    squares: int


_NO_TAPS = np.zeros((0, 4), np.int64), np.zeros((0, 4), np.float32)


def picture_layout(
    height: int, width: int, tower: VisionConfig, pinpoints: Sequence[tuple[int, int]], most: int, *, alone: bool
) -> Layout:
    """Tokens of a picture (HF `pack_image_features`).

    A picture that is alone in its prompt is shown twice: as a single square, and cut into squares, which are joined
    without their padding, with a newline after every row. A picture among others is a single square and a newline.

    Args:
        height: the picture's height in pixels.
        width: the picture's width in pixels.
        tower: the tower's config; a square is a picture of its size.
        pinpoints: heights and widths to which the picture may be fitted.
        most: pictures with the tokens of more squares are interpolated down.
        alone: whether the prompt shows no other picture.
    """
    side = tower.patch_side
    whole, newline = np.arange(side * side), np.array([-1])
    if not alone:
        return Layout(np.concatenate([whole, newline]), *_NO_TAPS, squares=1)
    from transformers.image_processing_utils import select_best_resolution

    fitted = select_best_resolution((height, width), list(pinpoints))
    down, across = (length // tower.image_size for length in fitted)
    patches = side * side + np.arange(down * across * side * side)
    grid = patches.reshape(down, across, side, side).swapaxes(1, 2).reshape(down * side, across * side)
    if width / height > grid.shape[1] / grid.shape[0]:
        padding = (grid.shape[0] - int(round(height * (grid.shape[1] / width), 7))) // 2
        grid = grid[padding : grid.shape[0] - padding]
    else:
        padding = (grid.shape[1] - int(round(width * (grid.shape[0] / height), 7))) // 2
        grid = grid[:, padding : grid.shape[1] - padding]
    mixes, weights = _NO_TAPS
    ratio = math.sqrt(grid.shape[0] * grid.shape[1] / (most * side**2))
    if ratio > 1.1:
        (rows, row_weights), (columns, column_weights) = (taps(length, int(length // ratio)) for length in grid.shape)
        shape = len(rows), len(columns)
        mixes = grid[rows[:, None, :, None], columns[None, :, None, :]].reshape(-1, 4)
        weights = (row_weights[:, None, :, None] * column_weights[None, :, None, :]).reshape(-1, 4)
        grid = -2 - np.arange(len(mixes)).reshape(shape)
    lines = np.pad(grid, ((0, 0), (0, 1)), constant_values=-1)
    return Layout(np.concatenate([whole, lines.ravel()]), mixes, weights, squares=1 + down * across)
