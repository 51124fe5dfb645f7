"""The batches of an epoch: how images are moved, mirrored, zoomed and corrupted."""

from __future__ import annotations

import math

import numpy as np
import torch

from tests import toy
from train import data
from train.augment import Augmented
from train.recipe import Recipe


def test_flips_alternate_and_epochs_repeat_exactly(loaded: data.Data) -> None:
    recipe = Recipe(batch_size=16, translate=0, cutout=0, zoom=1, low_res=0)
    batches = Augmented(loaded.train, recipe, torch.device("cpu"))

    def by_image(epoch: int) -> dict[bytes, bool]:
        plain = {image.tobytes(): False for image in loaded.train.images}
        plain.update({image[:, ::-1].tobytes(): True for image in loaded.train.images})
        flips: dict[bytes, bool] = {}
        for batch in batches.epoch(epoch):
            for image in batch.views.numpy():
                flipped = plain[image.tobytes()]
                flips[(image[:, ::-1] if flipped else image).tobytes()] = flipped
        return flips

    even, odd = by_image(0), by_image(1)
    assert len(even) == len(loaded.train)
    assert all(odd[image] is not flipped for image, flipped in even.items())
    assert by_image(0) == even
    batches = Augmented(loaded.train, recipe.model_copy(update={"flip": 0}), torch.device("cpu"))
    assert not any(flipped for epoch in (0, 1) for flipped in by_image(epoch).values())


def test_translation_reflects_at_the_border_and_cutout_blanks_a_square(loaded: data.Data) -> None:
    recipe = Recipe(batch_size=len(loaded.train), translate=0.25, cutout=0.25, zoom=1, low_res=0)
    (batch,) = Augmented(loaded.train, recipe, torch.device("cpu")).epoch(0)
    originals = {pixel.tobytes() for pixel in loaded.train.images.reshape(-1, 3)}
    blanked = [sum(p.tobytes() not in originals for p in image.reshape(-1, 3)) for image in batch.views.numpy()]
    assert 0 < np.mean(blanked) <= 36
    assert max(blanked) <= 36


def test_zoom_scales_half_of_the_images_about_their_centre(loaded: data.Data) -> None:
    recipe = Recipe(batch_size=len(loaded.train), translate=0, cutout=0, zoom=1.5, low_res=0)
    plain, zoomed = (
        next(iter(Augmented(loaded.train, r, torch.device("cpu")).epoch(0))).views.numpy()
        for r in (recipe.model_copy(update={"zoom": 1.0}), recipe)
    )
    chosen = np.arange(len(plain)) // 4 % 2 == 0  # by fours, so that each kind of corruption meets both
    assert (plain[~chosen] == zoomed[~chosen]).all()
    assert (plain[chosen] != zoomed[chosen]).any(axis=(1, 2, 3)).all()
    centre = slice(toy.SIDE // 2 - 1, toy.SIDE // 2 + 1)
    moved = np.abs(plain[chosen].astype(int) - zoomed[chosen])
    assert moved[:, centre, centre].mean() < moved.mean() / 2


def test_corruption_changes_three_of_four_views_but_no_clean_image(loaded: data.Data) -> None:
    count = 204  # excludes an image for which hardly any noise is drawn
    split = data.Split(loaded.train.images[:count], loaded.train.labels[:count])
    recipe = Recipe(batch_size=count, translate=0, cutout=0, zoom=1, low_res=0)
    plain, corrupted = (
        next(iter(Augmented(split, r, torch.device("cpu")).epoch(0)))
        for r in (recipe, recipe.model_copy(update={"corrupt": 1.0}))
    )
    assert (corrupted.images == plain.images).all()
    changed = (corrupted.views != plain.images).flatten(1).any(dim=1)
    assert not changed[::4].any()
    assert changed[1::4].all()
    assert min(changed[2::4].float().mean(), changed[3::4].float().mean()) >= 0.9

    def roughness(images: torch.Tensor) -> torch.Tensor:
        return images.float().diff(dim=2).abs().mean(dim=(1, 2, 3))

    ratio = roughness(corrupted.views) / roughness(plain.images)
    assert ratio[1::4].mean() > 1.2  # noise
    assert ratio[2::4].mean() < 0.8  # blur, or larger pixels


def test_the_first_epochs_use_smaller_images(loaded: data.Data) -> None:
    batches = Augmented(loaded.train, Recipe(epochs=4, low_res=0.5), torch.device("cpu"))
    sides = [next(iter(batches.epoch(epoch))).views.shape[1:] for epoch in range(4)]
    assert sides == [(18, 18, 3)] * 2 + [(24, 24, 3)] * 2


def test_batches_are_no_larger_than_requested(loaded: data.Data) -> None:
    count = len(loaded.train)
    batches = Augmented(loaded.train, Recipe(batch_size=120), torch.device("cpu"))
    assert [batch.size for batch in batches.epoch(0)] == [math.ceil(count / 2), count // 2]
