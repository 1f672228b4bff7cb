"""Qwen2-VL and Qwen2.5-VL: pictures as patches at their own size (HF Qwen2VLProcessor)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxid.errors import CheckpointError
from jaxid.prompts.base import Encoded, PictureSide, PictureTokens, Shown, bucketed, processed
from jaxid.prompts.pictures import Clip, Picture


def token_places(rows: int, columns: int, window: int) -> Int[np.ndarray, "I"]:
    """Where each decoder token of a picture stands among its padded tokens, tokens row by row.

    Without windows they follow each other. With them, window after window stands, each of window * window places.

    Args:
        rows: of tokens.
        columns: of tokens.
        window: side of a window in tokens, 0 without.
    """
    if not window:
        return np.arange(rows * columns)
    row, column = (places.ravel() for places in np.mgrid[:rows, :columns])
    across = -(-columns // window)
    inside = row % window * window + column % window
    return (row // window * across + column // window) * window**2 + inside


class QwenVLSide(PictureSide):
    """Pictures of any size; a decoder token for every square of patches."""

    most_size = 2**24  # of a picture in pixels

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Last axis of the pixels: those of a patch."""
        vision = self.config.vision_config
        return (3 * vision.temporal_patch_size * vision.patch_size**2,)

    @classmethod
    def load_image_processor(cls, folder: Path, config: Any) -> Any:
        """The checkpoint's image processor.

        Raises:
            CheckpointError: if it is missing or unreadable, or cuts other patches than the tower reads.
        """
        found, vision = super().load_image_processor(folder, config), config.vision_config
        sizes = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        for name, size in sizes.items():
            own = getattr(found, name, None)
            if own != size:
                raise CheckpointError(f"the image processor in {folder} has {name} {own}, config.json has {size}.")
        return found

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens of a photograph of 640 x 480 pixels."""
        grid = self._grids([self.open(np.zeros((480, 640, 3), np.uint8))])[1][0]
        return int(grid[1] * grid[2]) // self.config.vision_config.spatial_merge_size**2

    def _grids(self, opened: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        found = processed(self.image_processor, opened)
        return np.asarray(found["pixel_values"], np.float32), np.asarray(found["image_grid_thw"])

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as rows of patches, padded to one length.

        Raises:
            InputError: for a picture that cannot be opened, or of an extreme aspect ratio.
        """
        del members
        vision = self.config.vision_config
        side, window = vision.spatial_merge_size, vision.window_side
        together = side * side
        patches, grids = self._grids([self.open(picture) for picture in pictures])
        shapes = [(int(rows) // side, int(columns) // side) for _, rows, columns in grids]
        places = [token_places(rows, columns, window) for rows, columns in shapes]
        unit = max(1, window * window)
        most = bucketed(max(-(-int(own.max() + 1) // unit) for own in places)) * unit
        pixels = np.zeros((len(pictures), most, together, patches.shape[1]), np.float32)
        positions = np.zeros((len(pictures), most, together, 2), np.int32)
        valid = np.zeros((len(pictures), most, together), bool)
        tokens, first = [], 0
        for number, ((rows, columns), own) in enumerate(zip(shapes, places, strict=True)):
            count = rows * columns
            pixels[number, own] = patches[first * together : (first + count) * together].reshape(count, together, -1)
            token, inner = np.mgrid[:count, :together]
            positions[number, own, :, 0] = token // columns * side + inner // side
            positions[number, own, :, 1] = token % columns * side + inner % side
            valid[number, own] = True
            tokens.append(PictureTokens(self.placeholder * count, number * most + own, (rows, columns)))
            first += count
        flat = (len(pictures), most * together)
        extras = {"patch_positions": positions.reshape(*flat, 2), "patch_valid": valid.reshape(flat)}
        return Encoded(pixels.reshape(*flat, -1), tuple(tokens), extras)

    def rope_positions(
        self, token_ids: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"], shown: Shown
    ) -> Int[np.ndarray, "B A T"]:
        """Positions in time, height and width: a picture's tokens share a time, and text goes on behind its far end.

        Source: `Qwen2VLModel.get_rope_index`.
        """
        batch, length = token_ids.shape
        found = np.zeros((batch, 3, length), np.int32)
        for row, pictures in enumerate(shown):
            here = np.flatnonzero((token_ids[row] == self.image_token_id) & valid[row])
            position, at = 0, 0
            for picture in pictures:
                assert picture.grid is not None
                rows, columns = picture.grid
                start = int(here[0])
                found[row, :, at:start] = position + np.arange(start - at)
                position += start - at
                at = start + rows * columns
                down, across = (places.ravel() for places in np.mgrid[:rows, :columns])
                found[row, :, start:at] = position + np.stack([0 * down, down, across])
                position += max(rows, columns)
                here = here[rows * columns :]
            found[row, :, at:] = position + np.arange(length - at)
        return found
