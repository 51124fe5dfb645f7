"""Decoding compared with known pixels, for each kind of picture that people really send, and for other bytes."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import time
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model import preprocess as module
from model.headers import FORMATS, MAX_SCANS, ImageError, TooManyPixelsError, UnsupportedFormatError, read_header
from model.preprocess import ALPHA_COST, MAX_PIXELS, Pixels, inspect, preprocess, resize
from tests.live import REPOSITORY, encode, png_header

HEIGHT, WIDTH = 48, 64
ORIENTATION = 0x0112


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    return module.decode(data, inspect(data, max_pixels))


def noise(*shape: int, dtype: type = np.uint8, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def gradient() -> Pixels:
    """A smooth picture with four different corners, which lossy formats reproduce closely."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, 255 - (x + y) * 255 // (WIDTH + HEIGHT)], 2).astype(np.uint8)


def cv2_encode(suffix: str, image: NDArray[Any]) -> bytes:
    return bytes(cv2.imencode(suffix, image)[1].tobytes())


def over_white(rgb: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Expected pixels for a transparent image, in exact arithmetic; 8 bits in, 8 bits out."""
    share = alpha[..., None] / 255
    return np.rint(rgb * share + 255 * (1 - share))


def opened(data: bytes) -> NDArray[Any]:
    """The pixels of an opaque picture according to Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def opened_over_white(data: bytes) -> NDArray[Any]:
    rgba = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    return over_white(rgba[..., :3], rgba[..., 3])


def assert_pixels(data: bytes, expected: NDArray[Any], tolerance: float = 0) -> None:
    actual = decode(data)
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape
    difference = np.abs(actual.astype(float) - expected).max()
    assert difference <= tolerance, f"differs by {difference}; expected at most {tolerance}"


COLOUR = noise(HEIGHT, WIDTH, 3)
ALPHA = noise(HEIGHT, WIDTH, seed=1)
GRAY = noise(HEIGHT, WIDTH, seed=2)
OPAQUE = Image.fromarray(COLOUR)
CLEAR = Image.fromarray(np.dstack([COLOUR, ALPHA]))
PALETTE = OPAQUE.quantize(16)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", {"compression": "packbits"}),
    ],
)
def test_lossless_colour_is_exact(kind: str, options: dict[str, Any]) -> None:
    assert_pixels(encode(OPAQUE, kind, **options), COLOUR)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}])
def test_jpeg_agrees_with_pillow_and_the_original(options: dict[str, Any]) -> None:
    data = encode(Image.fromarray(gradient()), "JPEG", quality=95, **options)
    assert_pixels(data, opened(data), tolerance=2)
    assert_pixels(data, gradient(), tolerance=12)


def upright_from(orientation: int, picture: Pixels) -> Pixels:
    """The pixels that a camera held in ``orientation`` stores for ``picture`` (TIFF 6.0, tag 274)."""
    return {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, 1),
        7: picture[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(picture, -1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "transparent", "options", "tolerance"),
    [
        ("JPEG", False, {"quality": 100, "subsampling": 0}, 4),
        ("PNG", False, {}, 0),
        ("PNG", True, {}, 1),
        ("WEBP", False, {"lossless": True}, 0),
        ("WEBP", True, {"lossless": True, "exact": True}, 1),
    ],
)
def test_every_exif_orientation_is_turned_upright(
    orientation: int, kind: str, transparent: bool, options: dict[str, Any], tolerance: int
) -> None:
    stored = Image.fromarray(np.ascontiguousarray(upright_from(orientation, gradient())))
    expected: NDArray[Any] = gradient()
    if transparent:
        stored.putalpha(200)
        expected = over_white(expected, np.full((HEIGHT, WIDTH), 200))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert_pixels(encode(stored, kind, exif=exif, **options), expected, tolerance)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_grayscale_becomes_three_equal_channels(kind: str) -> None:
    assert_pixels(encode(Image.fromarray(GRAY), kind), np.dstack([GRAY] * 3))


def test_grayscale_jpeg_becomes_three_equal_channels() -> None:
    data = encode(Image.fromarray(gradient()).convert("L"), "JPEG")
    assert_pixels(data, opened(data), tolerance=2)


def test_cmyk_jpeg_agrees_with_pillow() -> None:
    data = encode(Image.fromarray(gradient()).convert("CMYK"), "JPEG", quality=95)
    assert_pixels(data, opened(data), tolerance=3)
    assert_pixels(data, gradient(), tolerance=20)


def test_cmyk_tiff_agrees_with_pillow() -> None:
    data = encode(Image.fromarray(gradient()).convert("CMYK"), "TIFF")
    assert_pixels(data, opened(data), tolerance=3)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})], ids=str
)
def test_transparency_is_composited_over_white(kind: str, options: dict[str, Any]) -> None:
    assert_pixels(encode(CLEAR, kind, **options), over_white(COLOUR, ALPHA), tolerance=1)


def test_gray_with_alpha_is_composited_over_white() -> None:
    image = Image.merge("LA", (Image.fromarray(GRAY), Image.fromarray(ALPHA)))
    assert_pixels(encode(image, "PNG"), over_white(np.dstack([GRAY] * 3), ALPHA), tolerance=1)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF"])
def test_an_opaque_palette_is_decoded(kind: str) -> None:
    assert_pixels(encode(PALETTE, kind), np.asarray(PALETTE.convert("RGB")))


@pytest.mark.parametrize("transparency", [2, bytes([0, 50, 255, 128, 0, 9, 255, 3])], ids=["one entry", "by entry"])
def test_a_transparent_palette_png_is_composited_over_white(transparency: int | bytes) -> None:
    data = encode(PALETTE, "PNG", transparency=transparency)
    assert_pixels(data, opened_over_white(data), tolerance=1)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_png_with_one_transparent_colour_is_composited_over_white(mode: str) -> None:
    image = Image.fromarray(GRAY if mode == "L" else COLOUR)
    colour = image.getpixel((3, 5))
    data = encode(image, "PNG", transparency=colour)
    expected = opened_over_white(data)
    assert (expected[5, 3] == 255).all()
    assert_pixels(data, expected)


def test_16_bit_gray_png_with_one_transparent_shade_is_composited_over_white() -> None:
    shades = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 21
    image = Image.fromarray(shades)
    assert image.mode == "I;16"
    pixels = decode(encode(image, "PNG", transparency=int(shades[5, 3])))
    expected = np.dstack([shades >> 8] * 3)
    expected[5, 3] = 255
    np.testing.assert_array_equal(pixels, expected)


def test_gif_shows_its_first_frame_over_white() -> None:
    plain = encode(PALETTE, "GIF", save_all=True, append_images=[Image.new("RGB", PALETTE.size, "red")])
    assert_pixels(plain, np.asarray(PALETTE.convert("RGB")))
    clear = encode(PALETTE, "GIF", transparency=2, save_all=True, append_images=[Image.new("P", PALETTE.size, 3)])
    assert_pixels(clear, opened_over_white(clear))


def test_gif_comments_are_skipped_whatever_they_contain() -> None:
    for length in range(240, 320):  # the length of one of its blocks may equal the marker of an image or extension
        data = encode(PALETTE, "GIF", comment=b"," * length)
        assert read_header(data)[:3] == ("GIF", *PALETTE.size), length


def test_animated_webp_and_png_show_their_first_frame() -> None:
    frames: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGBA", CLEAR.size, "red")]}
    assert_pixels(encode(CLEAR, "PNG", **frames), over_white(COLOUR, ALPHA), tolerance=1)
    assert_pixels(encode(CLEAR, "WEBP", lossless=True, exact=True, **frames), over_white(COLOUR, ALPHA), tolerance=1)


def test_tiff_shows_its_first_page() -> None:
    assert_pixels(encode(OPAQUE, "TIFF", save_all=True, append_images=[Image.new("RGB", (5, 5), "red")]), COLOUR)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_become_eight(suffix: str) -> None:
    gray, colour, alpha = noise(9, 7, dtype=np.uint16), noise(9, 7, 3, dtype=np.uint16), noise(9, 7, dtype=np.uint16)
    assert_pixels(cv2_encode(suffix, gray), np.dstack([gray / 257] * 3), tolerance=1)
    assert_pixels(cv2_encode(suffix, colour[..., ::-1]), colour / 257, tolerance=1)
    clear = cv2_encode(suffix, np.dstack([colour[..., ::-1], alpha]))
    assert_pixels(clear, over_white(colour / 257, alpha / 257), tolerance=2)


def test_a_big_endian_tiff_is_decoded() -> None:
    gray = noise(9, 7, dtype=np.uint16)
    data = encode(Image.fromarray(gray.astype(">u2")), "TIFF")
    assert data.startswith(b"MM")
    assert_pixels(data, np.dstack([gray / 257] * 3), tolerance=1)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "group4"})], ids=str
)
def test_one_bit_images_are_black_and_white(kind: str, options: dict[str, Any]) -> None:
    bits = GRAY > 127
    assert_pixels(encode(Image.fromarray(bits), kind, **options), np.dstack([bits * 255] * 3))


def test_a_multi_picture_jpeg_shows_its_first_picture() -> None:
    """Some phones and stereo cameras write JPEGs with several pictures."""
    first = Image.fromarray(gradient())
    data = encode(first, "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", first.size, "red")])
    assert_pixels(data, gradient(), tolerance=12)


SAMPLES = {
    "jpeg": encode(OPAQUE, "JPEG"),
    "progressive jpeg": encode(OPAQUE, "JPEG", progressive=True),
    "png": encode(OPAQUE, "PNG"),
    "png with alpha": encode(CLEAR, "PNG"),
    "webp": encode(OPAQUE, "WEBP"),
    "webp with alpha": encode(CLEAR, "WEBP", lossless=True),
    "bmp": encode(OPAQUE, "BMP"),
    "gif": encode(PALETTE, "GIF"),
    "gif with transparency": encode(PALETTE, "GIF", transparency=1),
    "tiff": encode(OPAQUE, "TIFF"),
    "tiff with alpha": encode(CLEAR, "TIFF"),
    "compressed tiff": encode(OPAQUE, "TIFF", compression="tiff_lzw"),
}
CHUNK_OF_2_GB = struct.pack(">I4s", 2**31 - 1, b"zTXt") + bytes(1000)
"""The first kilobyte of one, by which a PNG must not be judged once it has ended."""


@pytest.mark.parametrize("name", SAMPLES)
def test_truncated_images_raise_image_errors(name: str) -> None:
    data = SAMPLES[name]
    assert decode(data).shape == (HEIGHT, WIDTH, 3)
    for tenth in range(10):
        with pytest.raises(ImageError):
            decode(data[: len(data) * tenth // 10])


@pytest.mark.parametrize("name", SAMPLES)
def test_what_follows_an_image_is_ignored(name: str) -> None:
    data = SAMPLES[name]
    expected = decode(data)
    for rest in (bytes(1), bytes(1000), b"x" * 1000, data, CHUNK_OF_2_GB):
        np.testing.assert_array_equal(decode(data + rest), expected)


def test_an_end_before_the_pixels_of_a_png_does_not_end_it() -> None:
    start = SAMPLES["png"].index(b"IDAT") - 4
    pixels, end = SAMPLES["png"][start:-12], SAMPLES["png"][-12:]
    with pytest.raises(ImageError, match="a chunk of 2147483647 bytes is not all there"):
        inspect(SAMPLES["png"][:start] + end + CHUNK_OF_2_GB + pixels + end)


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_images_give_pixels_or_image_errors(name: str) -> None:
    random = np.random.default_rng(3)
    for _ in range(60):
        data = bytearray(SAMPLES[name])
        for position in random.integers(0, min(len(data), 400), 3):
            data[position] = random.integers(0, 256)
        try:
            pixels = decode(bytes(data), max_pixels=10**6)
        except ImageError:
            continue
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3


def test_hostile_images_print_nothing_to_standard_error() -> None:
    """Decoders that print would let anyone fill the log with lines that are not JSON."""
    program = (
        "import sys\n"
        "from model.headers import ImageError\nfrom model.preprocess import preprocess\n"
        "for line in sys.stdin:\n"
        "    try:\n"
        "        preprocess(bytes.fromhex(line), (32, 32))\n"
        "    except ImageError:\n"
        "        continue\n"
        "    sys.exit('decoded half an image')\n"
    )
    halves = "\n".join(data[: len(data) * part // 4].hex() for data in SAMPLES.values() for part in (1, 2, 3))
    result = subprocess.run(
        [sys.executable, "-c", program], input=halves, text=True, capture_output=True, cwd=REPOSITORY, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_an_oversized_image_is_refused_from_its_header() -> None:
    started, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooManyPixelsError, match="60000x60000"):
        decode(png_header(60_000, 60_000))
    assert time.perf_counter() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # kB


def test_a_real_decompression_bomb_is_refused() -> None:
    bomb = encode(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(bomb) < 200_000
    with pytest.raises(TooManyPixelsError):
        decode(bomb)


def test_the_pixel_limit_is_exact() -> None:
    data = encode(OPAQUE, "PNG")
    assert decode(data, max_pixels=HEIGHT * WIDTH).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(TooManyPixelsError, match=f"{WIDTH}x{HEIGHT}"):
        decode(data, max_pixels=HEIGHT * WIDTH - 1)


def test_the_pixel_limit_is_lower_for_transparent_images() -> None:
    """Compositing them takes more memory: enough of them at the limit could exhaust it."""
    data = encode(CLEAR, "PNG")
    inspect(data, ALPHA_COST * HEIGHT * WIDTH)
    with pytest.raises(TooManyPixelsError, match=f"expected at most {HEIGHT * WIDTH - 1}"):
        inspect(data, ALPHA_COST * HEIGHT * WIDTH - 1)


def with_widths(*widths: tuple[str, int, int]) -> bytes:
    """A TIFF of ``CLEAR`` with these widths in place of its own: type as for ``struct``, number of values, value."""
    data = bytearray(encode(CLEAR, "TIFF"))
    start, (count,) = len(data), struct.unpack_from("<H", data, struct.unpack_from("<I", data, 4)[0])
    begin = struct.unpack_from("<I", data, 4)[0] + 2
    entries = [data[at : at + 12] for at in range(begin, begin + 12 * count, 12)]
    others = [entry for entry in entries if struct.unpack_from("<H", entry)[0] != 256]
    place = start + 2 + 12 * (len(widths) + len(others)) + 4
    ours, elsewhere = [], b""
    for form, length, width in widths:
        values = struct.pack(f"<{length}{form}", *[width] * length)
        if len(values) > 4:
            values, elsewhere = struct.pack("<I", place + len(elsewhere)), elsewhere + values
        kind = {"H": 3, "I": 4, "i": 9, "Q": 16, "f": 11}[form]
        ours.append(struct.pack("<HHI4s", 256, kind, length, values))
    struct.pack_into("<I", data, 4, start)
    directory = struct.pack("<H", len(widths) + len(others)) + b"".join((*ours, *others)) + bytes(4)
    return bytes(data) + directory + elsewhere


@pytest.mark.parametrize(
    "widths",
    [
        [("I", 1, 5_000)],
        [("I", 2, 5_000)],  # its value is elsewhere
        [("H", 3, 5_000)],
        [("Q", 1, 5_000)],
        [("I", 1, 5_000), ("I", 1, 5)],
        [("i", 1, 5_000), ("I", 1, 5)],
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Metadata Warning")
def test_a_tiff_has_the_width_that_a_decoder_would_find(widths: list[tuple[str, int, int]]) -> None:
    data = with_widths(*widths)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (5_000, HEIGHT)
    with pytest.raises(TooManyPixelsError, match=f"5000x{HEIGHT}"):
        inspect(data, 1_000 * HEIGHT * ALPHA_COST)


def test_a_tiff_whose_width_is_no_integer_is_refused() -> None:
    with pytest.raises(ImageError, match=f"no pixels: 0x{HEIGHT}"):
        inspect(with_widths(("f", 1, 5_000), ("I", 1, 5)))


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"no pixels: {size[0]}x{size[1]}"):
        inspect(png_header(*size))


@pytest.mark.parametrize(("at", "value"), [(11, 14), (12, ord("C"))], ids=["length", "kind"])
def test_a_png_that_does_not_begin_with_its_header_is_refused(at: int, value: int) -> None:
    data = bytearray(SAMPLES["png"])
    data[at] = value
    with pytest.raises(ImageError, match="does not begin with IHDR"):
        inspect(bytes(data))


def test_a_png_with_alpha_may_lack_the_checksum_of_its_end() -> None:
    data = SAMPLES["png with alpha"]
    np.testing.assert_array_equal(decode(data[:-4]), decode(data))


@pytest.mark.parametrize(
    "inserted",
    [
        pytest.param(b"\xff", id="fill"),
        pytest.param(b"\xff\x01", id="marker without a length"),
        pytest.param(b"\xff\xcc\x00\x06\x00\x10\x10\x10", id="arithmetic conditioning"),
    ],
)
def test_what_a_jpeg_may_have_in_front_of_its_scan_is_skipped(inserted: bytes) -> None:
    scan = SAMPLES["jpeg"].index(b"\xff\xda")
    data = SAMPLES["jpeg"][:scan] + inserted + SAMPLES["jpeg"][scan:]
    assert inspect(data)[:3] == ("JPEG", WIDTH, HEIGHT)
    np.testing.assert_array_equal(decode(data), decode(SAMPLES["jpeg"]))


def test_a_jpeg_whose_scan_comes_before_its_frame_is_refused() -> None:
    with pytest.raises(ImageError, match="no scan follows a frame"):
        inspect(SAMPLES["jpeg"][:2] + SAMPLES["jpeg"][SAMPLES["jpeg"].index(b"\xff\xda") :])


def test_a_side_too_long_to_resize_is_refused() -> None:
    assert preprocess(encode(Image.new("L", (32_767, 2)), "PNG"), (32, 32)).shape == (32, 32, 3)
    with pytest.raises(TooManyPixelsError, match="32768x2"):
        preprocess(encode(Image.new("L", (32_768, 2)), "PNG"), (32, 32))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"hello, world", id="text"),
        pytest.param(b"\x00" * 100, id="zeros"),
        pytest.param(b"%PDF-1.7\n" + b"x" * 100, id="pdf"),
        pytest.param(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', id="svg"),
        pytest.param(b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(64), id="psd"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", id="eps"),
        pytest.param(encode(OPAQUE, "PPM"), id="ppm"),
        pytest.param(encode(OPAQUE, "ICO"), id="ico"),
        pytest.param(encode(OPAQUE, "TGA"), id="tga"),
        pytest.param(encode(OPAQUE, "PCX"), id="pcx"),
        pytest.param(encode(OPAQUE, "DDS"), id="dds"),
        pytest.param(encode(OPAQUE, "JPEG2000"), id="jpeg 2000"),
        pytest.param(b"\x76\x2f\x31\x01" + bytes(64), id="openexr"),
        pytest.param(b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 4 +X 4\n" + bytes(64), id="radiance"),
        pytest.param(b"\x00\x00\x00\x20ftypavif" + bytes(64), id="avif"),
        pytest.param(b"RIFF\x48\x00\x00\x00WAVEfmt " + bytes(64), id="wave"),
    ],
)
def test_other_formats_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedFormatError, match="JPEG, PNG, WEBP, BMP, GIF, TIFF"):
        decode(data)


def test_empty_input_has_its_own_error() -> None:
    with pytest.raises(ImageError, match="empty"):
        decode(b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_header_gives_the_size_without_decoding(kind: str) -> None:
    header = read_header(encode(OPAQUE, kind))
    assert (header.format, header.width, header.height, header.has_alpha) == (kind, WIDTH, HEIGHT, False)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(
            b"RIFF    WEBPVP8 " + bytes(10) + struct.pack("<HH", 0x4000 | 700, 0x8000 | 800), id="scaled WEBP"
        ),
        pytest.param(b"BM" + bytes(12) + struct.pack("<IHHHH", 12, 700, 800, 1, 24), id="BMP of OS/2"),
        pytest.param(b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 700, -800, 1, 24, 0), id="BMP from its top row"),
    ],
)
def test_rare_headers_give_the_size(data: bytes) -> None:
    assert read_header(data)[1:3] == (700, 800)


def test_a_webp_of_more_than_16_bit_sides_is_refused() -> None:
    sides = b"".join((side - 1).to_bytes(3, "little") for side in (70_000, 80_000))
    with pytest.raises(TooManyPixelsError, match="70000x80000"):
        inspect(b"RIFF    WEBPVP8X" + bytes(8) + sides)


def test_a_gif_whose_first_frame_exceeds_its_screen_is_refused() -> None:
    """Decoders make room for the frame."""
    with pytest.raises(TooManyPixelsError, match="60010x50020"):
        inspect(b"GIF89a" + struct.pack("<HHBBB", 5, 5, 0, 0, 0) + b"," + struct.pack("<4H", 10, 20, 60_000, 50_000))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 7, 8, 1, 24, 4),
            "BMP of compression 4; expected one of none, ",
        ),
        (b"II*\0" + struct.pack("<IHHHIH", 8, 1, 259, 3, 1, 34_712) + bytes(2), "TIFF of compression 34712; expected"),
    ],
)
def test_an_unknown_compression_is_unsupported(data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=message):
        inspect(data)


def test_shrinking_averages_over_areas() -> None:
    """Any other interpolation samples a few pixels of each area, and aliases."""
    shrunk = resize(COLOUR, (HEIGHT // 8, WIDTH // 8))
    means = COLOUR.reshape(HEIGHT // 8, 8, WIDTH // 8, 8, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - means).max() <= 1


@pytest.mark.parametrize("turned", [False, True])
def test_a_long_strip_is_averaged_along_and_enlarged_across(turned: bool) -> None:
    """Stripes one pixel wide must average out along the strip, whatever the other side needs."""
    strip = np.zeros((20, 3200, 3), np.uint8)
    strip[:, ::2] = 200
    pixels = resize(strip.transpose(1, 0, 2) if turned else strip, (32, 32))
    assert pixels.shape == (32, 32, 3)
    assert np.abs(pixels.astype(int) - 100).max() <= 1


def test_enlarging_is_cubic() -> None:
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 200
    row = resize(edge, (8, 32))[4, :, 0].astype(int)
    assert row.max() > 200  # a cubic kernel overshoots at an edge; a linear one cannot
    assert (np.diff(row[12:20]) >= 0).all()


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (32, 48), (100, 7), (HEIGHT, WIDTH), (224, 224)])
def test_the_result_has_exactly_the_requested_size(size: tuple[int, int]) -> None:
    pixels = preprocess(encode(OPAQUE, "PNG"), size)
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8
    if size == (HEIGHT, WIDTH):
        np.testing.assert_array_equal(pixels, COLOUR)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("side", "reduction"), [(32, 1), (127, 1), (128, 2), (300, 4), (512, 8), (1100, 8)])
def test_a_large_jpeg_is_decoded_at_reduced_size_and_looks_the_same(mode: str, side: int, reduction: int) -> None:
    picture = Image.fromarray(gradient()).resize((side, side + 9), Image.Resampling.BICUBIC)
    data = encode(picture.convert(mode), "JPEG", quality=95)
    header = inspect(data)
    assert module.reduction(header, (32, 32)) == reduction
    assert module.decode(data, header, reduction).shape == (-(-(side + 9) // reduction), -(-side // reduction), 3)
    whole = resize(decode(data), (32, 32))
    assert np.abs(whole.astype(int) - preprocess(data, (32, 32))).max() <= 4


def test_a_jpeg_decoded_at_reduced_size_is_turned_upright_too() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture = Image.fromarray(gradient()).resize((640, 480), Image.Resampling.BICUBIC)
    plain, turned = encode(picture, "JPEG", quality=95), encode(picture, "JPEG", quality=95, exif=exif)
    upright = np.rot90(preprocess(plain, (32, 32)), 3)
    assert np.abs(upright.astype(int) - preprocess(turned, (32, 32))).mean() < 3


def test_other_formats_are_decoded_at_full_size() -> None:
    header = inspect(encode(Image.fromarray(gradient()).resize((640, 480)), "PNG"))
    assert module.reduction(header, (32, 32)) == 1


@pytest.mark.parametrize(("more", "is_taken"), [(20, True), (MAX_SCANS, False)])
def test_the_number_of_scans_of_a_jpeg_is_limited(more: int, is_taken: bool) -> None:
    whole = encode(OPAQUE, "JPEG", progressive=True)
    head, _, last = whole.removesuffix(b"\xff\xd9").rpartition(b"\xff\xda")
    data = head + (b"\xff\xda" + last) * (1 + more) + b"\xff\xd9"
    if is_taken:
        assert preprocess(data, (32, 32)).shape == (32, 32, 3)
    else:
        with pytest.raises(ImageError, match="more than 64 scans"):
            preprocess(data, (32, 32))
