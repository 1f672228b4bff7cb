"""LLaVA-Video and LLaVA-OneVision: clips frame by frame, pictures cut into squares (HF LlavaOnevisionProcessor)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxid.errors import CheckpointError, InputError
from jaxid.io import read_json, reading
from jaxid.prompts.base import SMALL, Encoded, PictureSide, PictureTokens, Shown, bucketed, check_settings, processed
from jaxid.prompts.pictures import Clip, Picture, open_picture

IMAGE_TOKEN = "<image>"

# Conversation "qwen_1_5" of LLaVA-NeXT; clips stand before the user's text.
QWEN_TEMPLATE = """{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list %}\
{% for part in pictures %}{{ '<image>' + ('\n' if loop.last else ' ') }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{% endif %}\
{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def clip_rows(frames: int, side: int, position: str, first: int) -> Int[np.ndarray, "I"]:
    """Which row of the features each token of a clip takes; row 0 is `image_newline`.

    Args:
        frames: number of frames.
        side: rows, and columns, of a frame's tokens.
        position: behind what newlines stand: every row ("grid"), every frame, the clip ("one_token") or nothing.
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
        rows: patches, counted over the picture's squares, of every token; -1 for `image_newline`, and -2 - k for the
            k-th mixed token.
        taps: patches that the mixed tokens mix, Int[R, 4].
        weights: their weights, Float[R, 4].
        squares: number of squares.
    """

    rows: Int[np.ndarray, "I"]
    taps: Int[np.ndarray, "R 4"]
    weights: Float[np.ndarray, "R 4"]
    squares: int


_NO_TAPS = np.zeros((0, 4), np.int64), np.zeros((0, 4), np.float32)


def picture_layout(height: int, width: int, config: Any, *, alone: bool) -> Layout:
    """Tokens of a picture (HF `pack_image_features`).

    The whole picture as one square; then, if it stands alone in its prompt, its squares side by side without their
    padding, a newline behind every row. A picture beside others is one square and a newline.

    Args:
        height: of the picture, pixels.
        width: of the picture, pixels.
        config: the network's.
        alone: no other picture stands in the prompt.
    """
    side = config.patch_side
    whole, newline = np.arange(side * side), np.array([-1])
    if not alone:
        return Layout(np.concatenate([whole, newline]), *_NO_TAPS, squares=1)
    from transformers.image_processing_utils import select_best_resolution

    fitted = select_best_resolution((height, width), list(config.image_grid_pinpoints))
    down, across = (length // config.vision_config.image_size for length in fitted)
    numbers = side * side + np.arange(down * across * side * side)
    grid = numbers.reshape(down, across, side, side).swapaxes(1, 2).reshape(down * side, across * side)
    if width / height > grid.shape[1] / grid.shape[0]:
        padding = (grid.shape[0] - int(round(height * (grid.shape[1] / width), 7))) // 2
        grid = grid[padding : grid.shape[0] - padding]
    else:
        padding = (grid.shape[1] - int(round(width * (grid.shape[0] / height), 7))) // 2
        grid = grid[:, padding : grid.shape[1] - padding]
    mixes, weights = _NO_TAPS
    ratio = math.sqrt(grid.shape[0] * grid.shape[1] / (config.max_squares * side**2))
    if ratio > 1.1:
        (rows, row_weights), (columns, column_weights) = (
            config.taps(length, int(length // ratio)) for length in grid.shape
        )
        shape = len(rows), len(columns)
        mixes = grid[rows[:, None, :, None], columns[None, :, None, :]].reshape(-1, 4)
        weights = (row_weights[:, None, :, None] * column_weights[None, :, None, :]).reshape(-1, 4)
        grid = -2 - np.arange(len(mixes)).reshape(shape)
    lines = np.pad(grid, ((0, 0), (0, 1)), constant_values=-1)
    return Layout(np.concatenate([whole, lines.ravel()]), mixes, weights, squares=1 + down * across)


class VideoSide(PictureSide):
    """Clips in LLaVA-NeXT's own layout, which reads pictures only in a way that is not implemented here."""

    template = QWEN_TEMPLATE
    trial = (Clip([SMALL]),)
    tokenizer_of = "qwen2"

    @staticmethod
    def token_id(tokenizer: Any, config: Any) -> int:
        """Id of `<image>`, which the published tokenizer lacks; its embedding is never read."""
        del config
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @classmethod
    def load_image_processor(cls, folder: Path, config: Any) -> Any:
        """SigLIP's, whose settings are constants in LLaVA-NeXT."""
        del folder
        side = config.vision_config.image_size
        return frame_processor(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens of a clip of eight frames."""
        return len(clip_rows(8, self.config.frame_side, self.config.mm_newline_position, 1))

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Clips as frames and tokens.

        Raises:
            InputError: for a picture, or a frame that cannot be opened.
        """
        del members
        side, frames, tokens, first = self.config.frame_side, [], [], 1
        for clip in pictures:
            if not isinstance(clip, Clip):
                raise InputError(
                    "this checkpoint reads clips, not pictures: wrap frames in jaxid.Clip([picture, ...])."
                )
            frames.append(self.frames(clip, self.image_processor))
            rows = clip_rows(len(clip.frames), side, self.config.mm_newline_position, first)
            tokens.append(PictureTokens(self.placeholder * len(rows), rows))
            first += len(clip.frames) * side * side
        pixels = np.concatenate(frames)
        return Encoded(pixels, tuple(tokens), {"frames": np.arange(len(pixels), dtype=np.int32)})

    def frames(self, clip: Clip, processor: Any) -> Float[np.ndarray, "M C Y X"]:
        """A clip's frames through an image processor."""
        opened = [open_picture(frame) for frame in clip.frames]
        return np.asarray(processed(processor, opened)["pixel_values"], np.float32)


def frame_processor(**settings: Any) -> Any:
    """An image processor that resizes to a square and normalises, and nothing else."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(**settings)


class Processors(NamedTuple):
    """Image processors of Hugging Face's layout.

    Attributes:
        pictures: cuts pictures into squares.
        frames: resizes frames of clips.
    """

    pictures: Any
    frames: Any


class OnevisionSide(VideoSide):
    """Pictures and clips in Hugging Face's layout."""

    template = tokenizer_of = None
    trial = (SMALL, Clip([SMALL]))
    token_id = staticmethod(PictureSide.token_id)

    def __init__(self, tokenizer: Any, image_processor: Any, config: Any):
        """Takes loaded parts and the network's config.

        Raises:
            CheckpointError: if the tokenizer does not have the token of clips.
        """
        super().__init__(tokenizer, image_processor, config)
        self.clip_placeholder = tokenizer.convert_ids_to_tokens(config.video_token_index)
        if self.clip_placeholder in (None, tokenizer.unk_token):
            raise CheckpointError(f"the tokenizer has no token of id {config.video_token_index}, which clips need.")

    @classmethod
    def load_image_processor(cls, folder: Path, config: Any) -> Processors:
        """The checkpoint's image processor, and what its video processor does to each frame.

        Raises:
            CheckpointError: if one is missing or unreadable, or of a kind that is not implemented.
        """
        pictures = PictureSide.load_image_processor.__func__(cls, folder, config)
        settings = _video_settings(folder) or pictures.to_dict()
        check_settings(settings, folder)
        side = config.vision_config.image_size
        with reading(folder, "a video processor"):
            size = dict(settings.get("size") or {})
        if (size.get("height"), size.get("width")) != (side, side) or settings.get("do_center_crop"):
            raise CheckpointError(f"the video processor in {folder} does not resize frames to {side} x {side} pixels.")
        names = "size resample do_resize do_rescale rescale_factor do_normalize image_mean image_std".split()
        with reading(folder, "a video processor"):
            return Processors(pictures, frame_processor(**{name: settings[name] for name in names if name in settings}))

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens of a photograph of 640 x 480 pixels."""
        return len(picture_layout(480, 640, self.config, alone=True).rows)

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as squares, clips as frames, and both as tokens.

        Raises:
            InputError: for one that cannot be opened, or a picture that stands alone in one prompt and beside others
                in another, where its squares differ.
        """
        cut = self._cut(pictures, members)
        tiles = [cut[number][0] for number in sorted(cut)]
        clips = [picture for picture in pictures if isinstance(picture, Clip)]
        frames = [self.frames(clip, self.image_processor.frames) for clip in clips]
        count = sum(map(len, tiles))
        if count:
            tiles.append(np.zeros((bucketed(count) - count, *tiles[0].shape[1:]), np.float32))
            count = bucketed(count)
        pixels = np.concatenate([*tiles, *frames])

        # Rows of the features: newline, patches of all squares if there are pictures, frames' tokens, mixed tokens.
        patches, side = self.config.patch_side**2, self.config.frame_side
        clip_row = 1 + (len(pixels) * patches if count else 0)
        mixed_row = clip_row + sum(map(len, frames)) * side**2
        tokens, mixes, weights, square = [], [], [], 0
        for number, picture in enumerate(pictures):
            if isinstance(picture, Clip):
                rows = clip_rows(len(picture.frames), side, self.config.mm_newline_position, clip_row)
                clip_row += len(picture.frames) * side**2
                tokens.append(PictureTokens(self.clip_placeholder * len(rows), rows))
                continue
            layout = cut[number][1]
            rows = np.where(layout.rows >= 0, 1 + square * patches + layout.rows, 0)
            rows = np.where(layout.rows < -1, mixed_row - 2 - layout.rows, rows)
            tokens.append(PictureTokens(self.placeholder * len(rows), rows))
            mixes.append(square * patches + layout.taps)
            weights.append(layout.weights)
            mixed_row += len(layout.taps)
            square += layout.squares
        extras: dict[str, np.ndarray] = {}
        if frames:
            extras["frames"] = np.arange(count, len(pixels), dtype=np.int32)
        mixed = sum(map(len, mixes))
        if mixed:
            room = ((0, bucketed(mixed) - mixed), (0, 0))
            extras["taps"] = np.pad(np.concatenate(mixes), room).astype(np.int32)
            extras["weights"] = np.pad(np.concatenate(weights), room)
        return Encoded(pixels, tuple(tokens), extras)

    def _cut(
        self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]
    ) -> dict[int, tuple[Float[np.ndarray, "S C Y X"], Layout]]:
        """Squares and layout of every picture that is no clip, by its number."""
        alone: dict[int, bool] = {}
        for shown in members:
            numbers = [number for number in shown if not isinstance(pictures[number], Clip)]
            for number in numbers:
                if alone.setdefault(number, len(numbers) == 1) != (len(numbers) == 1):
                    raise InputError(
                        f"picture {number} stands alone in one prompt and beside others in another, and would be cut "
                        "differently: prepare these prompts in batches of their own."
                    )
        opened = {number: self.open(pictures[number]) for number in sorted(alone)}
        together = [number for number in opened if not alone[number]]
        processor, squares = self.image_processor.pictures, {}
        if together:
            # One list within a list stands for one prompt of several pictures.
            made = processed(processor, [[opened[number] for number in together]])["pixel_values"]
            squares = dict(zip(together, made, strict=True))
        cut = {}
        for number, image in opened.items():
            if alone[number]:
                squares[number] = processed(processor, [image])["pixel_values"][0]
            layout = picture_layout(image.height, image.width, self.config, alone=alone[number])
            if len(squares[number]) != layout.squares:
                raise CheckpointError(
                    f"the image processor cuts a picture into {len(squares[number])} squares, where config.json's "
                    f"image_grid_pinpoints make {layout.squares}."
                )
            cut[number] = np.asarray(squares[number], np.float32), layout
        return cut

    def slots(
        self, token_ids: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"], shown: Shown
    ) -> Int[np.ndarray, "B T"]:
        """Which row of the features stands at each position, or -1; clips have a token of their own."""
        clips = token_ids == self.config.video_token_index
        return super().slots(np.where(clips, self.image_token_id, token_ids).astype(token_ids.dtype), valid, shown)


def _video_settings(folder: Path) -> dict[str, Any] | None:
    """Settings of the checkpoint's video processor, from where Hugging Face's processors keep them."""
    for name, part in (("video_preprocessor_config.json", None), ("processor_config.json", "video_processor")):
        found = read_json(folder / name, missing={})
        found = found if part is None else found.get(part)
        if not isinstance(found, dict | None):
            raise CheckpointError(f"{folder / name} holds {found!r:.100} where {part} should hold settings.")
        if found:
            return found
    return None
