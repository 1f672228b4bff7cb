"""Videos: which frames are taken, what is said of their times, files and folders read back, and what is refused."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxid.data import videos
from jaxid.data.videos import read_video, spread, time_text, write_video
from jaxid.errors import DataError, InputError, OutputError
from jaxid.prompts.pictures import Clip, open_picture


def moving(frames: int, size: int = 32) -> np.ndarray:
    """Grey pictures, each brighter than the one before."""
    shades = np.linspace(20, 230, frames).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (frames, size, size, 3)).copy()


def test_frames_are_spread_as_published() -> None:
    for total in (8, 9, 24, 100, 301):
        expected = np.linspace(0, total - 1, 8, dtype=int)
        np.testing.assert_array_equal(spread(total), expected)
        assert spread(total)[0] == 0 and spread(total)[-1] == total - 1


@pytest.mark.parametrize(("frames", "rate"), [(8, 4), (24, 8), (31, 10)])
def test_a_file_read_back(frames: int, rate: int, tmp_path: Path) -> None:
    video = moving(frames)
    write_video(tmp_path / "clips" / "a.mp4", video, rate=rate)
    clip = read_video(tmp_path / "clips" / "a.mp4")
    chosen = spread(frames)
    np.testing.assert_allclose(np.asarray(clip.frames, float), video[chosen], atol=4)  # it is compressed
    assert clip.times is not None and clip.seconds == pytest.approx(frames / rate)
    np.testing.assert_allclose(clip.times, chosen / rate)
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["a.mp4"]


def test_a_folder_of_frames(tmp_path: Path) -> None:
    for number, picture in enumerate(moving(12)):
        Image.fromarray(picture).save(tmp_path / f"frame{number}.png")  # "frame10" stands before "frame2" by letters
    (tmp_path / "notes.txt").write_text("no picture")
    clip = read_video(tmp_path, rate=2.0)
    assert [Path(str(frame)).stem for frame in clip.frames] == [f"frame{number}" for number in spread(12)]
    assert clip.seconds == 6.0 and clip.times is not None and clip.times[-1] == 5.5


# What a display matrix (a, b, c, d) makes of a frame: column x, row y are shown at (a x + c y, b x + d y).
SHOWN: dict[tuple[int, ...], Any] = {
    (1, 0, 0, 1): lambda frame: frame,
    (0, 1, -1, 0): lambda frame: np.rot90(frame, -1),
    (-1, 0, 0, -1): lambda frame: np.rot90(frame, 2),
    (0, -1, 1, 0): lambda frame: np.rot90(frame),
    (-1, 0, 0, 1): lambda frame: frame[:, ::-1],
    (1, 0, 0, -1): lambda frame: frame[::-1],
    (0, 1, 1, 0): lambda frame: frame.swapaxes(0, 1),
    (0, -1, -1, 0): lambda frame: np.rot90(frame, 2).swapaxes(0, 1),
}


def with_matrix(path: Path, matrix: tuple[float, ...]) -> None:
    """Rewrites the display matrix in the track's header."""
    data = path.read_bytes()
    start = data.index(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", data[start : start + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (int(number * 65536) for number in matrix)
    path.write_bytes(data[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[start + 36 :])


@pytest.mark.parametrize("matrix", SHOWN)
def test_frames_are_shown_upright(matrix: tuple[int, ...], tmp_path: Path) -> None:
    frames = np.zeros((8, 32, 48, 3), np.uint8)
    frames[:, :10, :14] = 255
    frames[:, :10, 32:, 0] = 200
    frames[3] //= 2
    write_video(tmp_path / "a.mp4", frames, rate=8)
    plain = read_video(tmp_path / "a.mp4").frames
    with_matrix(tmp_path / "a.mp4", matrix)
    shown = read_video(tmp_path / "a.mp4").frames
    for one, other in zip(plain, shown, strict=True):
        np.testing.assert_array_equal(other, SHOWN[matrix](one))


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (0, 0, 0, 0), (1, 0, 0, 0), (1, 0.5, 0, 1)])
def test_frames_shown_at_an_oblique_angle_are_refused(matrix: tuple[float, ...], tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving(8), rate=8)
    with_matrix(tmp_path / "a.mp4", matrix)
    with pytest.raises(DataError, match=r"a\.mp4 cannot be read as a video: .*multiple of 90 degrees"):
        read_video(tmp_path / "a.mp4")


def test_pictures_of_a_folder_are_shown_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    picture = moving(1)[0]
    picture[:4] = 255
    for number in range(8):
        Image.fromarray(picture).save(tmp_path / f"frame\u00b2{number}.png", exif=exif)
    for frame in read_video(tmp_path).frames:
        np.testing.assert_array_equal(np.asarray(open_picture(frame)), np.rot90(picture, -1))


def test_large_videos_and_odd_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", moving(8), rate=8)
    odd: list[Any] = [{"frames": 0}, {"frames": -1}, {"rate": 0.0}, {"rate": float("nan")}, {"rate": -1.0}]
    for options in odd:
        with pytest.raises(InputError, match="at least one frame and a rate above 0"):
            read_video(tmp_path, **options)
    monkeypatch.setattr(videos, "MOST_PIXELS", 32 * 32 - 1)
    with pytest.raises(DataError, match=r"a\.mp4 has 32 x 32 pixels, more than 1023"):
        read_video(tmp_path / "a.mp4")


def test_time_text() -> None:
    clip = Clip([""] * 3, (0.0, 0.515, 1.5), 2.0)
    assert time_text(clip) == (
        "The video lasts for 2.00 seconds, and 3 frames are uniformly sampled from it. These frames are located at "
        "0.00s,0.52s,1.50s.Please answer the following questions related to this video."
    )
    assert time_text(Clip([""])) == ""


def test_reversed_keeps_the_times() -> None:
    clip = Clip(["a", "b", "c"], (0.0, 1.0, 2.0), 3.0)
    assert list(clip.reversed().frames) == ["c", "b", "a"] and clip.reversed().times == (0.0, 1.0, 2.0)
    with pytest.raises(InputError, match="3 frames was given 2 times"):
        Clip(["a", "b", "c"], (0.0, 1.0))


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "short.mp4", moving(5), rate=4)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    whole = (tmp_path / "short.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"short\.mp4 has 5 frames, but 8 are needed"):
        read_video(tmp_path / "short.mp4")
    for name in ("broken.mp4", "cut.mp4"):
        with pytest.raises(DataError, match=rf"{name} cannot be read as a video"):
            read_video(tmp_path / name)
    with pytest.raises(DataError, match="does not exist; give a video"):
        read_video(tmp_path / "missing.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has 0 frames"):
        read_video(tmp_path / "empty")
    for bad in (moving(8, 31), moving(8)[:0]):
        with pytest.raises(InputError, match="frames of even sides"):
            write_video(tmp_path / "odd.mp4", bad, rate=4)
    with pytest.raises(InputError, match=r"ends in \.mp4"):
        write_video(tmp_path / "a.webm", moving(8), rate=4)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_video(tmp_path / "file" / "a.mp4", moving(8), rate=4)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 'jaxid-vlm\[video\]'"):
        read_video(tmp_path / "short.mp4")
