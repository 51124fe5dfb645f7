"""Image bytes to the network's uint8 input: the same code for training, evaluation and serving.

The header is read before anything is decoded, so that bytes that are no image, or too large a one, cost next to
nothing. For untrusted images, ``model.sandbox`` decodes whatever is not plain and small in a process of its own.
"""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from model.headers import FORMATS, Header, ImageError, TooManyPixelsError, read_header

Pixels = NDArray[np.uint8]
MAX_PIXELS = 50_000_000
"""Default limit on width times height, from the header: a 50-megapixel photograph, 150 MB decoded."""
ALPHA_COST = 4
"""An image with transparency takes this many times the memory; its pixel limit is divided by it."""
MAX_SIDE = 32_767
"""Limit on width and on height: OpenCV's resizing fails beyond 16-bit coordinates."""

REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    # "Grayscale" only means that OpenCV's flag for BGR is absent; it excludes the flag for RGB.
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}
"""Flags for decoding at 1/N of the size, which a JPEG decoder does in a fraction of the time."""
OVERSAMPLING = 2
"""A reduced image is at least this many times larger than the target size, so that areas are still averaged."""

# `inspect` enforces the pixel limit; Pillow's own would warn on standard error.
Image.MAX_IMAGE_PIXELS = None
# Errors go to the sender of the image; if decoders could print them, anyone could fill the log.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings("ignore", module=r"PIL\.")


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """The header, as from ``read_header``; raises ``TooManyPixelsError`` for an image beyond the limits."""
    header = read_header(data)
    if header.has_alpha:
        max_pixels //= ALPHA_COST
    if header.width * header.height > max_pixels:
        raise TooManyPixelsError(f"the image has {header.width}x{header.height} pixels; expected at most {max_pixels}")
    if max(header.width, header.height) > MAX_SIDE:
        raise TooManyPixelsError(f"the image is {header.width}x{header.height}; expected at most {MAX_SIDE} a side")
    return header


def decode(data: bytes, header: Header, reduction: int = 1) -> Pixels:
    """Decode one image of a known ``header`` to (H, W, 3) uint8 RGB, its size divided by ``reduction`` (1, 2, 4 or 8).

    EXIF orientation is applied; grayscale, palette and CMYK become RGB; 16 bits become 8; transparency is composited
    over white; only the first frame of an animation is decoded. Raises ``ImageError``.
    """
    return _over_white(data) if header.has_alpha else _opaque(data, header.format, reduction)


def _opaque(data: bytes, kind: str, reduction: int) -> Pixels:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), REDUCED[reduction])
    except cv2.error as error:
        raise ImageError(f"the {kind} image cannot be decoded: {error.err}") from error
    if image is None:
        raise ImageError(f"the {kind} image cannot be decoded: its data is truncated or broken")
    return image.astype(np.uint8, copy=False)


def _over_white(data: bytes) -> Pixels:
    """With Pillow: given transparency, OpenCV ignores EXIF, a PNG's transparent gray, and how a TIFF stores alpha."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            layer = ImageOps.exif_transpose(_with_alpha(image))
    except UnidentifiedImageError:  # its own message names an object in memory
        raise ImageError("the image cannot be decoded: its data is truncated or broken") from None
    except Exception as error:
        raise ImageError(f"the image cannot be decoded: {error}") from error
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return np.asarray(white.convert("RGB"))


def _with_alpha(image: Image.Image) -> Image.Image:
    """Convert to RGBA. Pillow's own conversion clips 16-bit gray at 255 instead of scaling it."""
    if not image.mode.startswith("I;16"):
        return image.convert("RGBA")
    gray = np.asarray(image)
    opaque = gray != image.info.get("transparency")
    return Image.merge("LA", [Image.fromarray(np.uint8(p)) for p in (gray >> 8, opaque * 255)]).convert("RGBA")


def resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    """(H, W, 3) to (height, width, 3): area interpolation for sides that shrink (no aliasing), cubic for the others."""
    least = min(image.shape[0], size[0]), min(image.shape[1], size[1])
    for (height, width), how in ((least, cv2.INTER_AREA), (size, cv2.INTER_CUBIC)):
        if image.shape[:2] != (height, width):
            image = np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)
    return image


def preprocess(data: bytes, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> Pixels:
    """Image bytes to the input of a network of ``size`` (height, width): (height, width, 3) uint8 RGB."""
    return render(data, inspect(data, max_pixels), size)


def render(data: bytes, header: Header, size: tuple[int, int]) -> Pixels:
    """``preprocess`` for a caller that has already inspected the header."""
    return resize(decode(data, header, reduction(header, size)), size)


def shrink(data: bytes, header: Header, longest: int) -> Pixels:
    """Decode at the image's own aspect ratio, with no side longer than ``longest``."""
    image = decode(data, header, reduction(header, (longest, longest)))
    scale = min(1.0, longest / max(image.shape[:2]))
    return resize(image, (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))))


def reduction(header: Header, size: tuple[int, int]) -> int:
    """The largest ``reduction`` at which an image can be decoded that becomes ``size`` (height, width)."""
    if header.format != "JPEG":
        return 1
    spare = min(header.width, header.height) // (OVERSAMPLING * max(size))
    return max(factor for factor in REDUCED if factor <= max(1, spare))
