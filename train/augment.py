"""Shuffled and augmented training batches: flip, translation, zoom, cutout, corruption and lower resolution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.command import CommandError
from train.data import Split
from train.parallel import ALONE, Group
from train.recipe import Recipe


@dataclass(frozen=True)
class Draw:
    """Random numbers for a batch of ``count`` images: every process draws them all and keeps those of its share."""

    generator: torch.Generator
    count: int
    share: slice

    def integers(self, low: int, high: int) -> Tensor:
        """An integer from ``low`` to ``high - 1`` for each image of the share: (B, 1)."""
        return torch.randint(low, high, (self.count, 1), generator=self.generator)[self.share]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (B, *shape) for the share."""
        return torch.randn((self.count, *shape), generator=self.generator)[self.share]

    def uniform(self, reach: float, *shape: int) -> Tensor:
        """Uniform numbers (B, *shape) between ``-reach`` and ``reach`` for the share."""
        return (torch.rand((self.count, *shape), generator=self.generator)[self.share] * 2 - 1) * reach

    def batch_uniform(self, low: float, high: float) -> float:
        """One uniform number between ``low`` and ``high`` for the whole batch."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))


class Batch(NamedTuple):
    """A process's share of a batch of ``size`` images."""

    images: Tensor
    """(B, H, W, 3) uint8: augmented, as a teacher sees them."""
    views: Tensor
    """The same images as the network sees them, corrupted or at a lower resolution."""
    labels: Tensor
    size: int
    number: int
    """Index of the batch, counted over all epochs."""


class Augmented:
    """A process's share of the shuffled, augmented batches of a training split, on a device.

    The order and augmentation of a batch do not depend on the number of processes: together they see what one would.

    Flip and translation are a single gather by row and column indices, without interpolation. The flip alternates: an
    image flipped in one epoch is not flipped in the next (Jordan, 2024).
    """

    def __init__(self, split: Split, recipe: Recipe, device: torch.device, group: Group = ALONE) -> None:
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.recipe, self.device, self.group = recipe, device, group
        if len(split) // len(self) < 2 * group.size:
            raise CommandError(
                f"--batch-size {recipe.batch_size} of {len(split)} training images for {group.size} processes; "
                f"expected at least {2 * group.size} of both, two for each process"
            )
        self.flip_parity = torch.randint(0, 2, (len(split),), generator=self._generator(-1))

    def __len__(self) -> int:
        """Number of batches in an epoch, all of nearly the same size."""
        return math.ceil(len(self.labels) / self.recipe.batch_size)

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch + 1)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        generator = self._generator(epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        for number, batch in enumerate(order.tensor_split(len(self)), epoch * len(self)):
            share = self.group.share(len(batch))
            draw, index = Draw(generator, len(batch), share), batch[share]
            flip = (self.flip_parity[index] + epoch) % 2 * self.recipe.flip == 1
            images = self._shift(index.to(self.device), flip, draw)
            if self.recipe.zoom > 1:
                self._zoom(images, draw)
            images = self._cutout(images, draw)
            views = self._corrupt(images, draw) if self.recipe.corrupt > 0 else images
            if epoch < int(self.recipe.low_res * self.recipe.epochs):
                views = self._shrink(views)
            yield Batch(images, views, self.labels[index.to(self.device)], len(batch), number)

    def _shift(self, index: Tensor, flip: Tensor, draw: Draw) -> Tensor:
        height, width = self.images.shape[1:3]
        rows = self._shifted(height, draw)
        columns = self._shifted(width, draw)
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
        rows, columns = rows.to(self.device), columns.to(self.device)
        return self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _shifted(self, side: int, draw: Draw) -> Tensor:
        reach = int(self.recipe.translate * side)
        index = (torch.arange(side) + draw.integers(-reach, reach + 1)).abs()
        return torch.where(index >= side, 2 * (side - 1) - index, index)

    def _zoom(self, images: Tensor, draw: Draw) -> None:
        """Scale and stretch half of ``images``, in place."""
        scale, stretch = (draw.uniform(math.log(self.recipe.zoom)) for _ in range(2))
        # In groups of four, so that every kind of corruption meets zoomed images and others.
        chosen = torch.arange(draw.share.start, draw.share.stop) // 4 % 2 == 0
        if not chosen.any():  # a share of at most four images may have none
            return
        pixels = images[chosen].permute(0, 3, 1, 2).float()
        theta = torch.zeros(len(pixels), 2, 3)
        theta[:, 0, 0] = torch.exp(scale + stretch / 4)[chosen]
        theta[:, 1, 1] = torch.exp(scale - stretch / 4)[chosen]
        grid = F.affine_grid(theta.to(self.device), list(pixels.shape), align_corners=False)
        images[chosen] = _to_images(F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False))

    def _shrink(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float()
        return _to_images(F.interpolate(pixels, scale_factor=0.75, mode="bilinear", antialias=True))

    def _corrupt(self, images: Tensor, draw: Draw) -> Tensor:
        """Of every four images one stays clean, one gets noise, one loses detail, and one changes its colours."""
        pixels = images.permute(0, 3, 1, 2).float()
        kinds = (slice((kind - draw.share.start) % 4, None, 4) for kind in (1, 2, 3))
        for kind, change in zip(kinds, (self._add_noise, self._lose_detail, self._recolour), strict=True):
            change(pixels, kind, draw)
        return _to_images(pixels)

    def _add_noise(self, pixels: Tensor, kind: slice, draw: Draw) -> None:
        """Gaussian noise on all pixels of an image, or on a random share of them, where it is stronger the fewer."""
        noise = draw.normal(*pixels.shape[1:])[kind].to(self.device)
        amount, density, where = (
            draw.uniform(1.0, *shape)[kind].abs().to(self.device)
            for shape in ((1, 1, 1), (1, 1, 1), (1, *pixels.shape[2:]))
        )
        density = density.clamp(min=0.05)
        pixels[kind] += 30 * self.recipe.corrupt * amount * noise * (where < density) / density.sqrt()

    def _lose_detail(self, pixels: Tensor, kind: slice, draw: Draw) -> None:
        """Blur, or in every other batch on average pixelate."""
        amount = draw.uniform(self.recipe.corrupt, 1, 1, 1)[kind].abs().to(self.device)
        coarse = draw.batch_uniform(0.45, 1.55)
        if coarse > 1:
            pixels[kind] = torch.lerp(pixels[kind], _blurred(pixels[kind]), amount.clamp(max=1))
        else:
            small = F.interpolate(pixels[kind], scale_factor=coarse, mode="area")
            pixels[kind] = F.interpolate(small, size=pixels.shape[2:], mode="nearest")

    def _recolour(self, pixels: Tensor, kind: slice, draw: Draw) -> None:
        """Change saturation, brightness and contrast, which is more often lost than gained, as in fog or bad light."""
        strength = self.recipe.corrupt
        brightness, contrast, saturation = (draw.uniform(strength, 1, 1, 1)[kind].to(self.device) for _ in range(3))
        gray = pixels[kind].mean(dim=1, keepdim=True)
        coloured = gray + (1 + saturation) * (pixels[kind] - gray)
        mean = coloured.mean(dim=(1, 2, 3), keepdim=True)
        pixels[kind] = mean + torch.exp(1.2 * contrast - 0.5 * strength) * (coloured - mean) + 50 * brightness

    def _cutout(self, images: Tensor, draw: Draw) -> Tensor:
        height, width = images.shape[1:3]

        def band(side: int) -> Tensor:
            size = int(self.recipe.cutout * side)
            position = torch.arange(side) - draw.integers(-size // 2, side - size // 2 + 1)
            return ((position >= 0) & (position < size)).to(self.device)

        hole = band(height)[:, :, None] & band(width)[:, None, :]
        mean = images.float().mean(dim=(1, 2), keepdim=True).to(torch.uint8)
        return torch.where(hole[..., None], mean, images)


def _to_images(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) floats to (B, H, W, 3) uint8."""
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _blurred(pixels: Tensor) -> Tensor:
    """A Gaussian of about 1.4 pixels, by four passes of a binomial filter."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=pixels.device) / 4
    weight = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    for _ in range(4):
        pixels = F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), weight, groups=3)
    return pixels
