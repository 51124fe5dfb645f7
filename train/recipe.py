"""The hyperparameters of a training run."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Recipe(BaseModel):
    """The hyperparameters; each is a flag of ``train.fit`` of the same name, and its docstring that flag's help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    epochs: int = Field(default=25, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=512, ge=1)
    """Images per batch, over all processes. Without this flag, smaller for large images and for small data sets."""
    lr: float = Field(default=0.25, ge=0)
    """Peak learning rate of SGD, which trains BatchNorm and the head."""
    momentum: float = Field(default=0.9, gt=0, lt=1)
    """Momentum of SGD."""
    muon_lr: float = Field(default=0.1, ge=0)
    """Peak learning rate of Muon, which trains the filters: the norm of a step relative to that of the weights."""
    muon_momentum: float = Field(default=0.6, ge=0, lt=1)
    """Momentum of Muon."""
    low_res: float = Field(default=0.6, ge=0, le=1)
    """Share of the epochs, from the first, at 3/4 of the resolution; each takes little more than half the time."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay of the head."""
    warmup: float = Field(default=0.08, ge=0, le=1)
    """Share of the steps in which the learning rates rise linearly, before they fall linearly to zero."""
    label_smoothing: float = Field(default=0.1, ge=0, le=1)
    """Share of each label's probability that is spread over all classes."""
    flip: int = Field(default=1, ge=0, le=1)
    """1 mirrors each image in every other epoch; use 0 if mirrored images could belong to another class."""
    translate: float = Field(default=0.125, ge=0, le=0.5)
    """Largest shift, as a share of the image's side; the border is reflected."""
    cutout: float = Field(default=0.375, ge=0, le=1)
    """Side of the square that is blanked, as a share of the image's side."""
    zoom: float = Field(default=1.3, ge=1)
    """Half of the images are scaled by up to this factor, up or down, and stretched by up to its square root."""
    corrupt: float = Field(default=0.0, ge=0)
    """Strength of noise, loss of detail and colour changes, each on a quarter of the images; 1 is strong."""
    distill: float = Field(default=0.9, ge=0, le=1)
    """Weight of the teachers' predictions against the labels, if there are teachers."""
    distill_temperature: float = Field(default=2.0, gt=0)
    """Temperature by which the logits of teachers and network are divided for distillation."""
    widths: str = "96,256,384"
    """Channels of each stage; the last number is repeated for further stages."""
    depth: int = 3
    """Convolutions per stage."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the order of the images and their augmentation."""


DEFAULTS = Recipe()
