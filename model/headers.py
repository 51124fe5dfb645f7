"""Read an image file's format, size and kind from its header.

Pure Python, so that no native code sees a byte before the format is known and the size is within limits. Work is
bounded whatever the file contains: at most ``MAX_STEPS`` segments, chunks, blocks or entries are read, and no header
copies anything.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

MAX_STEPS = 4096
"""Most parts of a file that are read; real files have tens before the first pixel."""

MAX_SCANS = 64
"""Most scans in a JPEG. A progressive one has about ten; a scan of a few bytes may cost as much as the whole image."""

JPEG_NO_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD8)})
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SCAN = b"\xff\xda"
JPEG_BASELINE, JPEG_END, JPEG_SCAN, JPEG_EXIF, JPEG_FILL = 0xC0, 0xD9, 0xDA, 0xE1, 0xFF

PNG_PLAIN = frozenset(
    {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"pHYs", b"bKGD", b"tEXt", b"tIME"}
)
"""Chunks that libpng reads itself or skips; images with any other chunk are decoded in a process of their own."""

BMP_COMPRESSIONS = {0: "none", 1: "RLE8", 2: "RLE4", 3: "bit fields"}
TIFF_COMPRESSIONS = {
    1: "none",
    2: "CCITT RLE",
    3: "CCITT group 3",
    4: "CCITT group 4",
    5: "LZW",
    7: "JPEG",
    8: "Deflate",
    32773: "PackBits",
    32946: "old Deflate",
}
TIFF_WIDTH, TIFF_HEIGHT, TIFF_COMPRESSION, TIFF_COLOURS, TIFF_SAMPLES, TIFF_EXTRA = 256, 257, 259, 262, 277, 338
TIFF_RGB, TIFF_ALPHA = 2, (1, 2)
TIFF_READ = frozenset((TIFF_WIDTH, TIFF_HEIGHT, TIFF_COMPRESSION, TIFF_COLOURS, TIFF_SAMPLES, TIFF_EXTRA))
TIFF_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q"}


class ImageError(ValueError):
    """Bytes that cannot be turned into pixels: empty, truncated or broken."""


class UnsupportedFormatError(ImageError):
    """Bytes of no format in ``FORMATS``, or with an unsupported compression."""


class TooManyPixelsError(ImageError):
    """An image whose header declares more pixels than the limit."""


class Header(NamedTuple):
    """What an image declares; ``width`` and ``height`` in pixels, before any EXIF rotation."""

    format: str
    width: int
    height: int
    has_alpha: bool = False
    is_plain: bool = False
    """A baseline JPEG of one scan or an opaque 8-bit PNG, without EXIF, interlacing or unusual chunks."""


def read_header(data: bytes) -> Header:
    """Format, size and kind from the leading bytes.

    Raises ``UnsupportedFormatError`` for none of ``FORMATS`` and ``ImageError`` for a broken header.
    """
    if not data:
        raise ImageError("the image is empty: 0 bytes")
    read = _reader(data)
    try:
        header = read(data)
    except (struct.error, IndexError):
        raise ImageError("the image's header is broken: it ends too early") from None
    if not (header.width > 0 and header.height > 0):
        raise ImageError(f"the {header.format} image has no pixels: {header.width}x{header.height}")
    return header


def _reader(data: bytes) -> Callable[[bytes], Header]:
    for magic, reader in _READERS.items():
        if data.startswith(magic) and (magic != b"RIFF" or data[8:12] == b"WEBP"):
            return reader
    raise UnsupportedFormatError(f"not an image of a known format; expected one of {', '.join(FORMATS)}")


def _jpeg(data: bytes) -> Header:
    frame: tuple[int, int, int, int] | None = None
    is_plain = True
    at = 2
    for _ in range(MAX_STEPS):
        lead, marker = data[at], data[at + 1]
        if lead != 0xFF or marker == JPEG_END:
            break
        if marker in JPEG_NO_LENGTH or marker == JPEG_FILL:
            at += 1 if marker == JPEG_FILL else 2
            continue
        if marker == JPEG_SCAN:
            if frame is None:
                break
            if data.count(SCAN, at) > MAX_SCANS:
                raise ImageError(f"the JPEG image has more than {MAX_SCANS} scans; expected at most {MAX_SCANS}")
            precision, height, width, components = frame
            # A scan of fewer components than the image has means that more scans follow, at the cost of an image each.
            is_plain &= precision == 8 and components in (1, 3) and data[at + 4] == components
            return Header("JPEG", width, height, is_plain=is_plain)
        if marker in JPEG_FRAMES:
            frame = struct.unpack_from(">BHHB", data, at + 4)
            is_plain &= marker == JPEG_BASELINE
        is_plain &= marker != JPEG_EXIF
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise ImageError("the JPEG image's header is broken: no scan follows a frame")


def _png(data: bytes) -> Header:
    length, kind, width, height, depth, colour, *_, interlace = struct.unpack_from(">I4sIIBBBBB", data, 8)
    if (length, kind) != (13, b"IHDR"):
        raise ImageError("the PNG image's header is broken: it does not begin with IHDR")
    kinds = set()
    for kind, start, length in _png_chunks(data):
        if start + length + 4 <= len(data):
            kinds.add(kind)
        elif (kind, length) != (b"IEND", 0):  # OpenCV would allocate the declared length
            raise ImageError(f"the PNG image is truncated: a chunk of {length} bytes is not all there")
    is_plain = depth <= 8 and not colour & 4 and not interlace and kinds <= PNG_PLAIN and b"IEND" in kinds
    return Header("PNG", width, height, bool(colour & 4) or b"tRNS" in kinds, is_plain)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and length of each chunk's content; four bytes of checksum follow it.

    Ends at the image's end: editors that overwrite a longer file leave its rest behind, and decoders do not read it.
    """
    at, has_pixels = 8, False
    for _ in range(MAX_STEPS):
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8, length
        has_pixels |= kind == b"IDAT"
        if kind == b"IEND" and has_pixels:  # before any pixels, a decoder would read on
            break
        at += 12 + length


def has_exact_data(data: bytes) -> bool:
    """Whether the compressed data of a plain PNG hold its pixels and no more.

    libpng inflates any excess to its end before it drops it: 16 KB hold the thread for as long as 16 MB take.
    """
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    size = height * (1 + -(-width * depth * (3 if colour == 2 else 1) // 8))  # a byte of filter type in front of a row
    packed = b"".join(data[start : start + length] for kind, start, length in _png_chunks(data) if kind == b"IDAT")
    inflater = zlib.decompressobj()
    try:
        return len(inflater.decompress(packed, size + 1)) == size and inflater.eof
    except zlib.error:
        return False


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if kind == b"VP8X":
        flags, width, width_high, height, height_high = struct.unpack_from("<B3xHBHB", data, 20)
        return Header("WEBP", width + (width_high << 16) + 1, height + (height_high << 16) + 1, bool(flags & 0x10))
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return Header("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1))
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("WEBP", width & 0x3FFF, height & 0x3FFF)
    raise ImageError("the WEBP image's header is broken: it does not begin with VP8, VP8L or VP8X")


def _bmp(data: bytes) -> Header:
    size = struct.unpack_from("<I", data, 14)[0]
    if size == 12:
        return Header("BMP", *struct.unpack_from("<HH", data, 18))
    if size < 40:
        raise ImageError(f"the BMP image's header is broken: {size} bytes of it")
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression not in BMP_COMPRESSIONS:
        raise UnsupportedFormatError(_compressed("BMP", compression, BMP_COMPRESSIONS))
    has_mask = bits == 32 and BMP_COMPRESSIONS[compression] == "bit fields" and size >= 56
    return Header("BMP", width, abs(height), has_mask and struct.unpack_from("<I", data, 66)[0] != 0)


def _gif(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    has_alpha = False
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    is_extension = False
    for _ in range(MAX_STEPS):
        if is_extension:  # in its sub-blocks, which an empty one ends
            is_extension = data[at] > 0
            at += 1 + data[at]
        elif data[at] == 0x2C:
            x, y, frame_width, frame_height = struct.unpack_from("<4H", data, at + 1)
            return Header("GIF", max(width, x + frame_width), max(height, y + frame_height), has_alpha)
        elif data[at] == 0x21:
            has_alpha |= data[at + 1] == 0xF9 and bool(data[at + 3] & 1)
            is_extension = True
            at += 2
        else:
            break
    raise ImageError("the GIF image's header is broken: no frame in it")


def _tiff(data: bytes) -> Header:
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    count = struct.unpack_from(order + "H", data, start)[0]
    found: dict[int, int] = {}
    for at in range(start + 2, start + 2 + 12 * min(count, MAX_STEPS), 12):
        tag, kind, length = struct.unpack_from(order + "HHI", data, at)
        if tag in TIFF_READ and tag not in found:  # decoders take the first
            form = order + TIFF_TYPES.get(kind, "")
            # Longer than four bytes, values are elsewhere, and their place is here.
            is_elsewhere = length * struct.calcsize(form) > 4
            place = struct.unpack_from(order + "I", data, at + 8)[0] if is_elsewhere else at + 8
            found[tag] = struct.unpack_from(form, data, place)[0] if kind in TIFF_TYPES and length else 0
    values = {TIFF_COMPRESSION: 1, TIFF_WIDTH: 0, TIFF_HEIGHT: 0, **found}
    if values[TIFF_COMPRESSION] not in TIFF_COMPRESSIONS:
        raise UnsupportedFormatError(_compressed("TIFF", values[TIFF_COMPRESSION], TIFF_COMPRESSIONS))
    # In RGB with four samples and no ExtraSamples tag, the fourth is commonly taken for alpha.
    unspoken = (values.get(TIFF_COLOURS), values.get(TIFF_SAMPLES)) == (TIFF_RGB, 4) and TIFF_EXTRA not in values
    has_alpha = unspoken or values.get(TIFF_EXTRA) in TIFF_ALPHA
    return Header("TIFF", values[TIFF_WIDTH], values[TIFF_HEIGHT], has_alpha)


def _compressed(kind: str, found: int, known: dict[int, str]) -> str:
    return f"{kind} of compression {found}; expected one of {', '.join(known.values())}"


_READERS = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"RIFF": _webp,
    b"BM": _bmp,
    b"GIF87a": _gif,
    b"GIF89a": _gif,
    b"II*\0": _tiff,
    b"MM\0*": _tiff,
}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""The formats decoded, recognised by their leading bytes whatever the declared type; no other decoder is reachable."""
