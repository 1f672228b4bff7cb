"""Video files and folders of frames: a few evenly spaced frames of a video, with their times."""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, UInt8

from jaxid.errors import DataError, InputError
from jaxid.io import reading, whole_file
from jaxid.prompts.pictures import MOST_PIXELS, Clip, Picture

if TYPE_CHECKING:
    import av

FRAMES = 8
"""Frames of a clip, as in the paper."""

VIDEO_ENDINGS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".gif")
"""Endings of files that count as videos."""

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def time_text(clip: Clip) -> str:
    """The length and frame times of a clip, as LLaVA-Video's prompts state them before the question.

    Returns:
        The text, or "" for a clip without times.
    """
    if clip.times is None or clip.seconds is None:
        return ""
    times = ",".join(f"{time:.2f}s" for time in clip.times)
    return (
        f"The video lasts for {clip.seconds:.2f} seconds, and {len(clip.times)} frames are uniformly sampled from it. "
        f"These frames are located at {times}.Please answer the following questions related to this video."
    )


def with_times(clip: Clip, question: str) -> str:
    """The question, preceded by the `time_text` of its clip."""
    text = time_text(clip)
    return f"{text}\n{question}" if text else question


def spread(total: int, count: int = FRAMES) -> Int[np.ndarray, "count"]:
    """Indices of evenly spaced frames of a video, including the first and the last."""
    return np.linspace(0, total - 1, count).astype(np.int64)


def read_video(path: str | Path, *, frames: int = FRAMES, rate: float = 1.0) -> Clip:
    """Reads a clip from a video file, or from a folder of pictures sorted by the numbers in their names.

    Frames are rotated upright: those of a file by its display matrix, which phones write, and pictures by their
    orientation tag.

    Args:
        path: the file or folder.
        frames: how many frames to read, evenly spaced.
        rate: frames per second of a folder's pictures; video files state their own.

    Returns:
        The frames, their times and the video's length.

    Raises:
        DataError: if the video is missing or unreadable, has fewer frames, or is to be shown at an oblique angle.
        InputError: if `frames` or `rate` is not above 0, or, for a file, if PyAV is not installed.
    """
    path = Path(path)
    if frames < 1 or not (math.isfinite(rate) and rate > 0):
        raise InputError(f"a clip needs at least one frame and a rate above 0, not {frames} frames at {rate} Hz.")
    if path.is_dir():
        found = sorted((file for file in path.iterdir() if file.suffix.lower() in _PICTURES), key=_numbers)
        chosen = _chosen(path, len(found), frames)
        pictures: list[Picture] = [found[index] for index in chosen]
    elif path.is_file():
        decoded, chosen, total, rate = _read_file(path, frames)
        with reading(path, "a video", DataError):  # the frames' size may change within a file
            return Clip(np.stack(decoded), _times(chosen, rate), total / rate)
    else:
        raise DataError(f"{path} does not exist; give a video file, or a folder of its frames.")
    return Clip(pictures, _times(chosen, rate), len(found) / rate)


def _times(chosen: Int[np.ndarray, "F"], rate: float) -> tuple[float, ...]:
    return tuple(float(index) / rate for index in chosen)


def _numbers(path: Path) -> list[tuple[int, int, str]]:
    """Sorts "frame10" after "frame9"."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path.stem)]


def _chosen(path: Path, total: int, count: int) -> Int[np.ndarray, "count"]:
    if total < count:
        raise DataError(f"{path} has {total} frames, but {count} are needed; remove it, or give a longer video.")
    return spread(total, count)


def _read_file(path: Path, count: int) -> tuple[list[UInt8[np.ndarray, "Y X 3"]], Int[np.ndarray, "count"], int, float]:
    """Frames, their indices, how many frames the file has, and how many per second."""
    # Counted first: the length that a file states is often wrong, and all frames together may not fit in memory.
    with _opened(path) as (stream, decoded):
        total = sum(1 for _ in decoded)
        rate = float(stream.average_rate or stream.guessed_rate or 1)
    chosen = _chosen(path, total, count)
    kept: dict[int, UInt8[np.ndarray, "Y X 3"]] = {}
    wanted = set(chosen.tolist())
    with _opened(path) as (_, decoded):
        for index, frame in enumerate(decoded):
            if index in wanted:
                kept[index] = _upright(frame)
    return [kept[index] for index in chosen.tolist()], chosen, total, rate


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple["av.VideoStream", Iterator[object]]]:
    """The first video stream of a file and its decoded frames.

    Raises:
        DataError: if the file cannot be opened or decoded.
    """
    av = _av()
    with reading(path, "a video", DataError), av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path} holds no video.")
        stream = container.streams.video[0]
        if stream.width * stream.height > MOST_PIXELS:
            raise DataError(
                f"{path} has {stream.width} x {stream.height} pixels, more than {MOST_PIXELS}; make it smaller."
            )
        stream.thread_type = "AUTO"
        yield stream, container.decode(stream)


def _upright(frame: Any) -> UInt8[np.ndarray, "Y X 3"]:
    """A decoded frame, rotated as its display matrix asks.

    Raises:
        ValueError: if the rotation is not a multiple of 90 degrees.
    """
    pixels = frame.to_ndarray(format="rgb24")
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            # The pixel at column x and row y is shown at (a x + c y, b x + d y).
            matrix = np.frombuffer(data, np.int32)[[0, 1, 3, 4]].astype(float)
            a, b, c, d = np.where(abs(matrix) > abs(matrix).max() / 1000, np.sign(matrix), 0).tolist()
            if a * d == 0:
                pixels, a, b, c, d = pixels.swapaxes(0, 1), c, d, a, b
            if a * d == 0 or b or c:
                raise ValueError(
                    "its frames are to be shown at an angle that is not a multiple of 90 degrees; rotate them with a "
                    "video editor"
                )
            pixels = np.ascontiguousarray(pixels[:: int(d), :: int(a)])
    return pixels


def write_video(path: str | Path, frames: UInt8[np.ndarray, "F Y X 3"], *, rate: int) -> None:
    """Writes an H.264 file atomically; makes missing folders.

    Args:
        path: the file; its name ends in `.mp4`.
        frames: pictures of even height and width.
        rate: frames per second.

    Raises:
        InputError: for another ending, no frames or odd sides, or if PyAV is not installed.
        OutputError: if the file cannot be written.
    """
    av = _av()
    if Path(path).suffix.lower() != ".mp4" or not len(frames) or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise InputError(
            f"a video needs a name that ends in .mp4 and frames of even sides; got {path} and {list(frames.shape)}."
        )
    with whole_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "15"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise InputError(
            "video files need PyAV: pip install 'jaxid-vlm[video]'. Folders of frames work without it."
        ) from error
    return av
