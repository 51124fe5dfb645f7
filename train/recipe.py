"""The hyperparameters of a training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters; each is a flag of the same name."""

    epochs: int = 25
    batch_size: int = 512
    """Largest, of all processes together. Without the flag fewer for large images, for memory, and for few of them."""
    lr: float = 0.25
    """Of BatchNorm and the head."""
    momentum: float = 0.9
    """Of BatchNorm and the head."""
    muon_lr: float = 0.1
    """Learning rate of the filters: the length of a step relative to the weights'."""
    muon_momentum: float = 0.6
    low_res: float = 0.6
    """Share of the epochs, the first ones, that see images of 3/4 of the size and cost little more than half."""
    weight_decay: float = 5e-4
    warmup: float = 0.08
    """Share of the steps in which the learning rate rises, before it falls to zero; both linearly."""
    label_smoothing: float = 0.1
    translate: float = 0.125
    """Largest shift, as a share of the image's side; the border is reflected."""
    cutout: float = 0.375
    """Side of the square that is blanked, as a share of the image's side."""
    zoom: float = 1.3
    """Every other image is scaled by up to this factor, up or down, and stretched by up to its square root."""
    corrupt: float = 0.0
    """Strength of noise, lost detail or changed colours, each on a quarter of the images; 1 is strong."""
    distill: float = 0.9
    """Weight of the teachers' verdicts against the labels, where there are teachers."""
    distill_temperature: float = 2.0
    widths: str = "96,256,384"
    """Channels of the stages; the last number holds for all further ones."""
    depth: int = 3
    seed: int = 0
