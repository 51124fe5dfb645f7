"""Image bytes to the uint8 array that a network sees: one function for training, evaluation and serving.

The header is read before anything is decoded, so that what is too large or no image at all costs next to nothing.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded, told by the leading bytes whatever the declared type: every other decoder stays unreachable."""
MAX_PIXELS = 50_000_000
"""Default limit on width times height, from the header: a 50-megapixel photograph, 150 MB decoded."""
MAX_SIDE = 32_767
"""Limit on width and on height: OpenCV's own resizing fails beyond 16-bit coordinates."""

# Pillow only reads headers here, and the pixel limit below is ours: its own would warn on standard error.
Image.MAX_IMAGE_PIXELS = None


class ImageError(ValueError):
    """Bytes that cannot be turned into pixels: empty, truncated or broken."""


class UnsupportedFormatError(ImageError):
    """Bytes of no format in ``FORMATS``."""


class TooManyPixelsError(ImageError):
    """An image whose header announces more pixels than the limit."""


class Header(NamedTuple):
    """What an image says of itself; ``width`` and ``height`` in pixels, before any EXIF rotation."""

    format: str
    width: int
    height: int
    has_alpha: bool


def read_header(data: bytes) -> Header:
    """Format, size and transparency from the leading bytes; no pixel is decoded.

    Raises ``UnsupportedFormatError`` for what is none of ``FORMATS`` and ``ImageError`` for a header that is broken.
    """
    if not data:
        raise ImageError("the image is empty: 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return Header(str(image.format), *image.size, has_alpha=image.has_transparency_data)
    except UnidentifiedImageError:
        raise UnsupportedFormatError(f"not an image of a known format; expected one of {', '.join(FORMATS)}") from None
    except Exception as error:  # a parser of hostile bytes: whatever it raises, the bytes are at fault
        raise ImageError(f"the image's header is broken: {error}") from error


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode one image to (H, W, 3) uint8 RGB at its own size.

    EXIF orientation is applied; grayscale, palette and CMYK become RGB; 16 bits become 8; transparency is laid over
    white; of an animation the first frame counts. Raises ``ImageError`` or one of its subclasses.
    """
    header = read_header(data)
    if header.width * header.height > max_pixels:
        raise TooManyPixelsError(f"the image has {header.width}x{header.height} pixels; expected at most {max_pixels}")
    if max(header.width, header.height) > MAX_SIDE:
        raise TooManyPixelsError(f"the image is {header.width}x{header.height}; expected at most {MAX_SIDE} a side")
    flags = cv2.IMREAD_UNCHANGED if header.has_alpha else cv2.IMREAD_COLOR_RGB
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"the {header.format} image cannot be decoded: {error.err}") from error
    if image is None:
        raise ImageError(f"the {header.format} image cannot be decoded: its data is truncated or broken")
    return _flatten(image) if header.has_alpha else image.astype(np.uint8, copy=False)


def _flatten(image: NDArray[np.generic]) -> Pixels:
    """Undecoded-depth BGRA, BGR or gray pixels laid over white, as 8-bit RGB."""
    if image.dtype == np.uint16:
        image = image >> 8  # type: ignore[operator]
    pixels = np.asarray(image, np.uint8)
    if pixels.ndim == 2:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB), np.uint8)
    rgb = np.asarray(cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2RGB), np.uint8)
    if pixels.shape[2] == 3:
        return rgb
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    """(H, W, 3) to (height, width, 3): area interpolation when shrinking (no aliasing), cubic when enlarging."""
    height, width = size
    if image.shape[:2] == size:
        return image
    shrinking = image.shape[0] >= height and image.shape[1] >= width
    return np.asarray(
        cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC), np.uint8
    )


def preprocess(data: bytes, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> Pixels:
    """Image bytes to what the network of input ``size`` (height, width) sees: (height, width, 3) uint8 RGB."""
    return resize(decode(data, max_pixels), size)
