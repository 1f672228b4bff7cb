"""What a picture file means: the oracle is the same picture, stored upright as a plain RGB PNG."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_utils import load_image

from jaxid.errors import InputError
from jaxid.prompts import pictures
from jaxid.prompts.pictures import Stored, open_picture, stored

GREY = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (20, 30, 3)).astype(np.uint8)


def opened(image: Any) -> np.ndarray:
    found = open_picture(image)
    assert found.mode == "RGB"
    return np.asarray(found)


def in_colour(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return share * colours + (1 - share) * 255


def png(depth: int, kind: int, samples: np.ndarray, **chunks: bytes) -> bytes:
    """A PNG file of any bit depth, whose samples are Int[Y, X * channels]."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    bits = (samples[..., None] >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1)
    head = struct.pack(">IIBBBBB", samples.shape[1] // channels, len(samples), depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [
        (b"IHDR", head),
        *((name.encode(), data) for name, data in chunks.items()),
        (b"IDAT", body),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- orientation ----------------------------------------------------------------------------------------------------

KINDS = {
    "png": {},
    "jpg": {"quality": 95, "subsampling": 0},
    "webp": {"lossless": True},
    "tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
}


def with_tag(path: Path, orientation: int, **options: Any) -> Path:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(COLOUR).save(path, exif=exif, **options)
    return path


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The upright picture as EXIF's table says that a camera stores it: where row 0 and column 0 of the file are."""
    transposed = upright.swapaxes(0, 1)
    return {
        1: upright,
        2: upright[:, ::-1],  # row 0 top, column 0 right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: transposed,  # left, top
        6: transposed[::-1],  # right, top
        7: transposed[::-1, ::-1],  # right, bottom
        8: transposed[:, ::-1],  # left, bottom
    }[orientation]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_rotated_upright(orientation: int, kind: str, tmp_path: Path) -> None:
    path = with_tag(tmp_path / f"a.{kind}", orientation, **KINDS[kind])
    found = opened(path)
    assert found.shape == ((30, 20, 3) if orientation > 4 else (20, 30, 3))
    np.testing.assert_array_equal(found, np.asarray(load_image(str(path))))  # Hugging Face's
    difference = np.abs(as_stored(found, orientation).astype(int) - COLOUR)
    assert difference.max() <= (0 if kind != "jpg" else 40) and difference.mean() < 8
    assert stored(path) == Stored((30, 20), orientation)
    assert stored(path).upright == (found.shape[1], found.shape[0])


def test_a_tag_after_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(COLOUR).save(buffer, "PNG", exif=exif)
    data = buffer.getvalue()
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    end = data.index(b"IEND") - 4
    path = written(tmp_path / "a.png", data[:start] + data[stop:end] + data[start:stop] + data[end:])
    np.testing.assert_array_equal(opened(path), np.rot90(COLOUR, -1))
    assert stored(path) == Stored((30, 20), 6)


def test_the_tag_may_be_xmp(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="8"/></x:xmpmeta>'
    Image.fromarray(COLOUR).save(tmp_path / "a.webp", lossless=True, xmp=xmp)
    np.testing.assert_array_equal(opened(tmp_path / "a.webp"), np.rot90(COLOUR))


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_an_unknown_tag_changes_nothing(orientation: int, tmp_path: Path) -> None:
    np.testing.assert_array_equal(opened(with_tag(tmp_path / "a.png", orientation)), COLOUR)


@pytest.mark.parametrize("damage", [b"", b"II*\0\xff\xff\xff\xff", b"no TIFF at all", b"MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_tags_leave_the_picture(damage: bytes, tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=b"Exif\0\0" + damage)
    np.testing.assert_array_equal(opened(tmp_path / "a.png"), COLOUR)


def test_pil_images_and_arrays_are_not_rotated(tmp_path: Path) -> None:
    with Image.open(with_tag(tmp_path / "a.png", 6)) as image:
        np.testing.assert_array_equal(opened(image), COLOUR)
        assert stored(image) == Stored((30, 20))
    assert stored(COLOUR) == stored(GREY) == Stored((30, 20))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_rotated_with_their_picture(orientation: int) -> None:
    boxes = np.array([[3, 2, 5, 4], [0, 0, 1, 1], [20, 10, 10, 10]])
    here = Stored((30, 20), orientation)
    for (x, y, width, height), (left, top, across, down) in zip(
        boxes, here.rotated(boxes * 1.0).astype(int), strict=True
    ):
        marked = np.zeros((20, 30), np.uint8)
        marked[y : y + height, x : x + width] = 255
        image = Image.fromarray(marked)
        image.getexif()[274] = orientation
        upright = np.asarray(ImageOps.exif_transpose(image))
        expected = np.zeros_like(upright)
        expected[top : top + down, left : left + across] = 255
        np.testing.assert_array_equal(upright, expected)


# --- depth ----------------------------------------------------------------------------------------------------------


def samples16() -> np.ndarray:
    edges = [0, 1, 128, 129, 255, 256, 257, 32767, 32768, 65406, 65407, 65535]
    return np.concatenate([edges, np.random.default_rng(2).integers(0, 65536, 228)]).reshape(12, 20)


def test_16_bit_grey_of_an_8_bit_picture_is_that_picture(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "a.png")
    Image.fromarray(GREY).convert("RGB").save(tmp_path / "plain.png")
    np.testing.assert_array_equal(opened(tmp_path / "a.png"), opened(tmp_path / "plain.png"))


@pytest.mark.parametrize("kind", ["png", "tif", "lzw.tif", "big.tif", "white.tif", "pgm", "jp2", "PIL", "PIL big"])
def test_16_bit_grey_is_scaled(kind: str, tmp_path: Path) -> None:
    values, path = samples16().astype(np.uint16), tmp_path / f"a.{kind}"
    expected = in_colour(np.array([[round(int(v) * 255 / 65535) for v in row] for row in values]))
    shown: Any = path
    if kind == "png":
        written(path, png(16, 0, values.astype(int)))
    elif kind == "pgm":
        written(path, b"P5 20 12 65535\n" + values.astype(">u2").tobytes())
    elif kind == "big.tif":
        written(path, tiff(values, ">"))
    elif kind == "white.tif":
        written(path, tiff(values, "<", white_is_zero=True))
        expected = 255 - expected
    elif kind.startswith("PIL"):
        shown = Image.frombytes("I;16B", (20, 12), values.astype(">u2").tobytes())
        shown = shown if kind == "PIL big" else Image.fromarray(values)
    else:
        Image.fromarray(values).save(path, **KINDS.get(kind, {}))
    np.testing.assert_array_equal(opened(shown), expected)


def tiff(values: np.ndarray, order: Any, *, bits: int = 16, white_is_zero: bool = False, kind: int = 1) -> bytes:
    """An uncompressed grey TIFF."""
    pixels = values.tobytes() if bits == 12 else values.astype(values.dtype.newbyteorder(order)).tobytes()
    width, height = (20, 12)
    fields = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1)]
    fields += [(273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(pixels)), (339, 3, kind)]
    body = b""
    for tag, form, value in fields:
        packed = struct.pack(order + ("HH" if form == 3 else "I"), *((value, 0) if form == 3 else (value,)))
        body += struct.pack(order + "HHI", tag, form, 1) + packed
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(fields)) + body + struct.pack(order + "I", 0)


def test_12_bit_grey_is_scaled(tmp_path: Path) -> None:
    values = samples16() >> 4
    bits = ((values[..., None] >> np.arange(12)[::-1]) & 1).astype(np.uint8)
    path = written(tmp_path / "a.tif", tiff(np.packbits(bits.reshape(12, -1), axis=1), "<", bits=12))
    np.testing.assert_array_equal(opened(path), in_colour(np.rint(values / 4095 * 255)))


def test_16_bit_colour_keeps_its_upper_byte(tmp_path: Path) -> None:
    values = samples16().reshape(12, 20)[:, :18]
    path = written(tmp_path / "a.png", png(16, 2, values))
    np.testing.assert_array_equal(opened(path), (values >> 8).reshape(12, 6, 3))


@pytest.mark.parametrize("kind", ["tif", "white.tif", "PIL"])
def test_floating_point_from_0_to_1(kind: str, tmp_path: Path) -> None:
    values = np.linspace(0, 1, 240, dtype=np.float32).reshape(12, 20)
    expected, shown = in_colour(np.rint(values * 255)), Image.fromarray(values)
    if kind != "PIL":
        shown = written(tmp_path / kind, tiff(values, "<", bits=32, kind=3, white_is_zero=kind == "white.tif"))
    expected = 255 - expected if kind == "white.tif" else expected
    np.testing.assert_allclose(opened(shown), expected, atol=1 if kind == "white.tif" else 0)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((12, 20), 255, np.float32), "between 0 and 1"),
        (np.full((12, 20), -0.1, np.float32), "between 0 and 1"),
        (np.full((12, 20), np.nan, np.float32), "between 0 and 1"),
        (np.full((12, 20), 100, np.int32), "integers is unknown"),
    ],
)
def test_values_without_a_known_range_are_refused(values: np.ndarray, reason: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=rf"a\.tif cannot be read as a picture: .*{reason}"):
        open_picture(tmp_path / "a.tif")
    with pytest.raises(InputError, match=reason):
        open_picture(Image.fromarray(values))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits(depth: int, tmp_path: Path) -> None:
    values = np.arange(240).reshape(12, 20) % 2**depth
    path = written(tmp_path / "a.png", png(depth, 0, values))
    np.testing.assert_array_equal(opened(path), in_colour(values * 255 // (2**depth - 1)))
    if depth == 1:
        Image.fromarray(values.astype(bool)).save(tmp_path / "a.tif", compression="group4")
        np.testing.assert_array_equal(opened(tmp_path / "a.tif"), in_colour(values * 255))


# --- transparency ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "stored_as"),
    [
        *((kind, "PIL") for kind in ("LA", "RGBA", "PA", "La", "RGBa")),
        *((kind, "file") for kind in ("LA", "RGBA", "PA")),
    ],
)
def test_alpha_is_shown_on_white(kind: str, stored_as: str, tmp_path: Path) -> None:
    alpha = np.random.default_rng(3).integers(0, 256, (20, 30)).astype(np.uint8)
    base = Image.fromarray(GREY if kind in ("LA", "La") else COLOUR).convert("RGB")
    if kind == "PA":
        base = base.quantize(64)
        shown = Image.merge("PA", (Image.fromarray(np.asarray(base)), Image.fromarray(alpha)))
        shown.putpalette(base.getpalette() or [])
        base = base.convert("RGB")
    else:
        shown = base.convert("RGBA")
        shown.putalpha(Image.fromarray(alpha))
        shown = shown.convert("LA") if kind in ("LA", "La") else shown
    expected, tolerance = on_white(np.asarray(base), alpha), 1.0
    if kind in ("La", "RGBa"):
        shown, tolerance = shown.convert(kind), 3.0  # premultiplied values are rounded
    if stored_as == "file":
        shown.save(tmp_path / "a.tif")
        shown = tmp_path / "a.tif"
    np.testing.assert_allclose(opened(shown), expected, atol=tolerance)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_value(depth: int, tmp_path: Path) -> None:
    values = np.arange(240).reshape(12, 20) * (277 if depth == 16 else 1) % 2**depth
    for clear in {0, 1, 2**depth - 1, int(values[3, 5])}:
        path = written(tmp_path / "a.png", png(depth, 0, values, tRNS=struct.pack(">H", clear)))
        grey = np.where(values == clear, 255, np.rint(values * 255 / (2**depth - 1)))
        np.testing.assert_array_equal(opened(path), in_colour(grey))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour(depth: int, tmp_path: Path) -> None:
    values = np.random.default_rng(4).integers(0, 2**depth, (12, 6, 3))
    values[::2] = values[0, 0]
    clear = struct.pack(">HHH", *values[0, 0].tolist())
    path = written(tmp_path / "a.png", png(depth, 2, values.reshape(12, -1), tRNS=clear))
    expected = np.where((values == values[0, 0]).all(axis=-1, keepdims=True), 255, values >> (depth - 8))
    np.testing.assert_array_equal(opened(path), expected)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_transparent_palette(depth: int, tmp_path: Path) -> None:
    values = np.arange(240).reshape(12, 20) % 2**depth
    rng = np.random.default_rng(5)
    palette, alphas = (rng.integers(0, 256, (2**depth, count)).astype(np.uint8) for count in (3, 1))
    data = png(depth, 3, values, PLTE=palette.tobytes(), tRNS=alphas.tobytes())
    expected = on_white(palette[values], alphas[values][..., 0])
    np.testing.assert_allclose(opened(written(tmp_path / "a.png", data)), expected, atol=1)
    plain = written(tmp_path / "plain.png", png(depth, 3, values, PLTE=palette.tobytes()))
    np.testing.assert_array_equal(opened(plain), palette[values])


def test_transparent_parts_of_a_gif_are_white(tmp_path: Path) -> None:
    image = Image.fromarray(COLOUR).quantize(16)
    image.save(tmp_path / "a.gif", transparency=3)
    colours = np.asarray(image.convert("RGB"))
    expected = np.where(np.asarray(image)[..., None] == 3, 255, colours)
    np.testing.assert_array_equal(opened(tmp_path / "a.gif"), expected)


@pytest.mark.parametrize("kind", [4, 6])
def test_alpha_of_16_bits(kind: int, tmp_path: Path) -> None:
    channels = {4: 2, 6: 4}[kind]
    values = np.random.default_rng(6).integers(0, 65536, (12, 5 * channels))
    found = opened(written(tmp_path / "a.png", png(16, kind, values)))
    parts = (values >> 8).reshape(12, 5, channels)
    np.testing.assert_allclose(
        found, on_white(parts[..., :-1].repeat(3 if kind == 4 else 1, -1), parts[..., -1]), atol=1
    )


# --- colours, frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "RGBX", "P", "L", "1"])
def test_modes_as_pillow_converts_them(mode: str, tmp_path: Path) -> None:
    from PIL import ImageCms

    if mode == "LAB":
        way = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image: Any = ImageCms.applyTransform(Image.fromarray(COLOUR), way)
    else:
        image = Image.fromarray(COLOUR).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(opened(image), expected)
    if mode in ("CMYK", "YCbCr", "LAB", "P", "L", "1"):
        image.save(tmp_path / "a.tif")
        np.testing.assert_array_equal(opened(tmp_path / "a.tif"), expected)
    if mode in ("CMYK", "LAB"):  # the colours are those of the picture, not their negative
        assert np.abs(expected.astype(int) - COLOUR).mean() < 12


def test_inverted_cmyk_of_adobe(tmp_path: Path) -> None:
    flat = np.zeros((16, 16, 3), np.uint8) + np.array([200, 40, 90], np.uint8)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "a.jpg", quality=100)  # Pillow writes Adobe's mark
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    np.testing.assert_allclose(opened(tmp_path / "a.jpg"), flat, atol=4)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tif"])
def test_the_first_frame_is_read(kind: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), shade, np.uint8)) for shade in (10, 100, 200)]
    frames[0].save(
        tmp_path / f"a.{kind}",
        save_all=True,
        append_images=frames[1:],
        lossless=True,
    )
    np.testing.assert_array_equal(opened(tmp_path / f"a.{kind}"), np.full((8, 8, 3), 10))


# --- arrays, and what is refused ------------------------------------------------------------------------------------


def test_arrays() -> None:
    np.testing.assert_array_equal(opened(COLOUR), COLOUR)
    np.testing.assert_array_equal(opened(GREY), in_colour(GREY))
    np.testing.assert_array_equal(opened(COLOUR[::-1, ::2]), COLOUR[::-1, ::2])


@pytest.mark.parametrize(
    "image",
    [
        COLOUR / 255,
        COLOUR.astype(int),
        GREY > 100,
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros(5, np.uint8),
        [[1, 2], [3]],
        None,
        b"bytes",
        3,
    ],
    ids=lambda image: f"{type(image).__name__}{getattr(image, 'shape', '')}{getattr(image, 'dtype', '')}",
)
def test_other_arrays_are_refused(image: Any) -> None:
    with pytest.raises(InputError, match="picture") as caught:
        open_picture(image)
    assert "\n" not in str(caught.value)


def refused(image: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        open_picture(image)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [13_350, 18_000, 20_000, 60_000])
def test_decompression_bombs(side: int, tmp_path: Path) -> None:
    """Just below what Pillow refuses, and beyond it."""
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    path = written(tmp_path / "bomb.png", b"\x89PNG\r\n\x1a\n" + data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        refused(path, "bomb.png .*pixels")
        with pytest.raises(InputError, match="pixels"):
            stored(path)
    assert said == []


def test_the_largest_picture_is_opened_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Image.MAX_IMAGE_PIXELS is not None and 2 * Image.MAX_IMAGE_PIXELS > pictures.MOST_PIXELS
    path = written(tmp_path / "a.png", png(1, 0, np.zeros((20, 20), int)))
    monkeypatch.setattr(pictures, "MOST_PIXELS", 400)
    assert opened(path).shape == (20, 20, 3)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 399)
    refused(path, "20 x 20 pixels, more than 399")


@pytest.mark.parametrize("size", [(1, 201), (2000, 3)])
def test_strips(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", rf"a\.png is a strip: {size[0]} x {size[1]} pixels")
    refused(Image.new("RGB", size), "is a strip")
    assert opened(Image.new("RGB", (1, 200))).shape == (200, 1, 3)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "gif", "bmp"])
@pytest.mark.parametrize("share", [0, 0.05, 0.5, 0.9])
def test_truncated_files(kind: str, share: float, tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / f"whole.{kind}")
    whole = (tmp_path / f"whole.{kind}").read_bytes()
    refused(written(tmp_path / f"cut.{kind}", whole[: int(share * len(whole))]), rf"cut\.{kind} cannot be read")


def test_names_of_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path, tmp_path / "missing.png", tmp_path / "pipe", "a\0b", "", "x" * 5000, "http://host/a.png"):
        refused(name, "^picture .* does not exist")
    refused(written(tmp_path / "a.png", b"no picture"), r"a\.png cannot be read as a picture")
    refused(Image.new("RGB", (0, 5)), "has no pixels")
    refused(Image.new("RGB", (5, 0)), "has no pixels")


def test_a_broken_pil_image(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    image = Image.open(written(tmp_path / "cut.png", (tmp_path / "a.png").read_bytes()[:300]))
    refused(image, "a PIL image cannot be read as a picture")
    image.close()


def test_sequences_of_frames_may_be_grey() -> None:
    assert [opened(frame).shape for frame in np.stack([GREY, GREY[::-1]])] == [(20, 30, 3)] * 2
