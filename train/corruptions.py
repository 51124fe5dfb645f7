"""The corruptions of CIFAR-10-C, in four families and five severities (Hendrycks & Dietterich, 2019, arXiv:1903.12261).

The severities are the published ones for 32x32 pixels; lengths scale with larger images. Frost is synthesised here; the
authors cut it out of photographs. Implemented here because no library fits: ``imagecorruptions`` dates from 2020 and
needs another OpenCV, ``albumentations`` is archived and its successor AGPL, ``kornia`` and torchvision have other
corruptions and no severities.

Every function takes images (N, H, W, 3) as floats from 0 to 1, its parameters, and a random generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from model.preprocess import Pixels

Floats = NDArray[np.float32]
Noisy = NDArray[np.floating[Any]]
Rng = np.random.Generator
SEVERITIES = (1, 2, 3, 4, 5)
PUBLISHED_SIDE = 32
"""Side of the images for which the parameters were published."""
FROST_COLOUR = np.array([0.85, 0.93, 1.0], np.float32)


def gaussian_noise(images: Floats, scale: float, rng: Rng) -> Noisy:
    return images + rng.normal(0, scale, images.shape)


def shot_noise(images: Floats, photons: float, rng: Rng) -> Noisy:
    return rng.poisson(images * photons) / photons


def impulse_noise(images: Floats, share: float, rng: Rng) -> Noisy:
    """Salt and pepper, in each channel."""
    return np.where(rng.random(images.shape) < share, rng.integers(0, 2, images.shape), images)


def speckle_noise(images: Floats, scale: float, rng: Rng) -> Noisy:
    return images * (1 + rng.normal(0, scale, images.shape))


def gaussian_blur(images: Floats, sigma: float, rng: Rng) -> Floats:
    width = sigma * _scale(images)
    return _each(images, lambda image: cv2.GaussianBlur(image, (0, 0), width, borderType=cv2.BORDER_REPLICATE))


def defocus_blur(images: Floats, radius: float, softness: float, rng: Rng) -> Floats:
    """A disk with a soft edge."""
    scale = _scale(images)
    reach = int(np.ceil(radius * scale)) + 2
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (rows**2 + columns**2 <= (radius * scale) ** 2).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (0, 0), softness * scale)
    return _each(images, lambda image: cv2.filter2D(image, -1, kernel))


def glass_blur(images: Floats, sigma: float, reach: int, passes: int, rng: Rng) -> Floats:
    """Every pixel takes the place of a neighbour, between two blurs."""
    images = gaussian_blur(images, sigma, rng)
    count, height, width, _ = images.shape
    reach = max(1, round(reach * _scale(images)))
    which, rows, columns = np.ogrid[:count, :height, :width]
    for _ in range(passes):
        down, right = rng.integers(-reach, reach, (2, count, height, width))
        images = images[which, np.clip(rows + down, 0, height - 1), np.clip(columns + right, 0, width - 1)]
    return gaussian_blur(images, sigma, rng)


def motion_blur(images: Floats, radius: float, sigma: float, rng: Rng) -> Floats:
    scale = _scale(images)
    return _each(
        images, lambda image: cv2.filter2D(image, -1, _streak(radius * scale, sigma * scale, rng.uniform(-45, 45)))
    )


def zoom_blur(images: Floats, furthest: float, rng: Rng) -> Floats:
    """The mean of the image and its enlargements, in steps of a hundredth."""
    factors = [1.0, *np.arange(1, furthest, 0.01)]
    return _each(images, lambda image: np.mean([_zoomed(image, factor) for factor in factors], axis=0))


def snow(
    images: Floats,
    mean: float,
    spread: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    kept: float,
    rng: Rng,
) -> Floats:
    """Wind-blown flakes over a whitened image."""
    scale = _scale(images)

    def fall(image: Floats) -> Any:
        flakes = _zoomed(rng.normal(mean, spread, image.shape[:2]).astype(np.float32), zoom)
        flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
        wind = _streak(radius * scale, sigma * scale, rng.uniform(-135, -45))
        blown = cv2.filter2D(flakes, -1, wind)[..., None]
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
        white = kept * image + (1 - kept) * np.maximum(image, gray * 1.5 + 0.5)
        return white + blown + blown[::-1, ::-1]

    return _each(images, fall)


def frost(images: Floats, kept: float, weight: float, rng: Rng) -> Floats:
    """Ice crystals: the ridges of a cloud pattern."""

    def freeze(image: Floats) -> Any:
        ridges = 1 - np.abs(2 * _cloud(image, 1.5, rng) - 1)
        return kept * image + weight * ridges[..., None] * FROST_COLOUR

    return _each(images, freeze)


def fog(images: Floats, thickness: float, decay: float, rng: Rng) -> Floats:
    def cover(image: Floats) -> Any:
        brightest = image.max()
        return (image + thickness * _cloud(image, decay, rng)[..., None]) * brightest / (brightest + thickness)

    return _each(images, cover)


def brightness(images: Floats, added: float, rng: Rng) -> Floats:
    return _in_hsv(images, 2, 1, added)


def contrast(images: Floats, factor: float, rng: Rng) -> Floats:
    mean = images.mean(axis=(1, 2), keepdims=True)
    return np.asarray((images - mean) * factor + mean, np.float32)


def elastic_transform(images: Floats, push: float, smoothness: float, jitter: float, rng: Rng) -> Floats:
    """A random affine map, then a smooth random displacement; lengths as shares of the side."""
    height, width = images.shape[1:3]
    side = min(height, width)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    centre = np.array([width // 2, height // 2], np.float32)
    corners = centre + np.array([[1, 1], [1, -1], [-1, -1]], np.float32) * (side // 3)

    def bend(image: Floats) -> Any:
        moved = corners + rng.uniform(-jitter, jitter, corners.shape).astype(np.float32) * side
        affine = cv2.getAffineTransform(corners, moved)
        mapped = cv2.warpAffine(image, affine, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        across, down = rng.uniform(-1, 1, (2, height, width)).astype(np.float32) * push * side
        if smoothness:
            across, down = (cv2.GaussianBlur(field, (0, 0), smoothness * side) for field in (across, down))
        return cv2.remap(mapped, x + across, y + down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)

    return _each(images, bend)


def pixelate(images: Floats, share: float, rng: Rng) -> Floats:
    height, width = images.shape[1:3]
    coarse = (int(width * share), int(height * share))

    def coarsen(image: Floats) -> Any:
        small = cv2.resize(image, coarse, interpolation=cv2.INTER_AREA)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)

    return _each(images, coarsen)


def jpeg_compression(images: Floats, quality: int, rng: Rng) -> Floats:
    def recompress(image: Floats) -> Any:
        bgr = cv2.cvtColor(_to_pixels(image), cv2.COLOR_RGB2BGR)
        _, content = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)) / 255

    return _each(images, recompress)


def saturate(images: Floats, factor: float, added: float, rng: Rng) -> Floats:
    return _in_hsv(images, 1, factor, added)


class Corruption(NamedTuple):
    """``parameters`` of ``apply`` by severity; ``extra`` ones are not among the benchmark's fifteen."""

    family: str
    apply: Callable[..., Any]
    parameters: tuple[tuple[float, ...], ...]
    extra: bool = False


def _single(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


_SNOW = (
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)
_ELASTIC = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
_GLASS = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
_DEFOCUS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))

CORRUPTIONS = {
    "gaussian_noise": Corruption("noise", gaussian_noise, _single(0.04, 0.06, 0.08, 0.09, 0.1)),
    "shot_noise": Corruption("noise", shot_noise, _single(500, 250, 100, 75, 50)),
    "impulse_noise": Corruption("noise", impulse_noise, _single(0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": Corruption("noise", speckle_noise, _single(0.06, 0.1, 0.12, 0.16, 0.2), extra=True),
    "defocus_blur": Corruption("blur", defocus_blur, _DEFOCUS),
    "glass_blur": Corruption("blur", glass_blur, _GLASS),
    "motion_blur": Corruption("blur", motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Corruption("blur", zoom_blur, _single(1.06, 1.11, 1.16, 1.21, 1.26)),
    "gaussian_blur": Corruption("blur", gaussian_blur, _single(0.4, 0.6, 0.7, 0.8, 1), extra=True),
    "snow": Corruption("weather", snow, _SNOW),
    "frost": Corruption("weather", frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption("weather", fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption("weather", brightness, _single(0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption("digital", contrast, _single(0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption("digital", elastic_transform, _ELASTIC),
    "pixelate": Corruption("digital", pixelate, _single(0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption("digital", jpeg_compression, _single(80, 65, 58, 50, 40)),
    "saturate": Corruption("digital", saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), extra=True),
}


def corrupt(images: Pixels, name: str, severity: int, rng: Rng) -> Pixels:
    """Apply the corruption ``name`` at ``severity`` 1 to 5 to ``images`` (N, H, W, 3) uint8."""
    corruption = CORRUPTIONS[name]
    floats = images.astype(np.float32) / 255
    return _to_pixels(corruption.apply(floats, *corruption.parameters[severity - 1], rng=rng))


def _to_pixels(images: Floats) -> Pixels:
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)


def _each(images: Floats, change: Callable[[Floats], Any]) -> Floats:
    return np.stack([change(image) for image in images]).astype(np.float32)


def _scale(images: Floats) -> float:
    """Factor for lengths. At least 1: on images smaller than published, shorter lengths would have no effect."""
    return max(1.0, float(min(images.shape[1:3])) / PUBLISHED_SIDE)


def _zoomed(image: Floats, factor: float) -> Floats:
    """The centre of ``image``, enlarged by ``factor`` to the full size."""
    height, width = image.shape[:2]
    about_centre = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 0, factor)
    return np.asarray(cv2.warpAffine(image, about_centre, (width, height)), np.float32)


def _streak(radius: float, sigma: float, degrees: float) -> Floats:
    """A kernel that smears along a line to one side, with decreasing weight."""
    steps = np.arange(0, radius + 0.5, 0.5)
    reach = int(np.ceil(radius))
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
    angle = np.deg2rad(degrees)
    rows, columns = (np.rint(reach + steps * f(angle)).astype(int) for f in (np.sin, np.cos))
    np.add.at(kernel, (rows, columns), np.exp(-(steps**2) / (2 * sigma**2)))
    return np.asarray(kernel / kernel.sum(), np.float32)


def _cloud(image: Floats, decay: float, rng: Rng) -> Floats:
    """(H, W) from 0 to 1: random hills, each octave twice as fine as the last and lower by a factor of ``decay``."""
    height, width = image.shape[:2]
    hills = np.zeros((height, width), np.float32)
    for octave in range(int(np.log2(min(height, width)))):
        cells = rng.uniform(-1, 1, (2 ** (octave + 1),) * 2).astype(np.float32)
        octave_hills = np.asarray(cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)
        hills += octave_hills / float(decay**octave)
    return np.asarray((hills - hills.min()) / np.ptp(hills), np.float32)


def _in_hsv(images: Floats, channel: int, factor: float, added: float) -> Floats:
    """``images`` with saturation (1) or value (2) scaled and shifted."""
    rows = images.reshape(-1, *images.shape[2:])
    hsv = cv2.cvtColor(rows, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = np.clip(hsv[..., channel] * factor + added, 0, 1)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.float32).reshape(images.shape)
