"""The hyperparameters of a training."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Recipe(BaseModel):
    """The hyperparameters; each is a flag of the same name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    epochs: int = Field(default=25, ge=1)
    """How often every training image is seen."""
    batch_size: int = Field(default=512, ge=1)
    """Images in a batch of all processes together. Without the flag it is smaller for large images, and for few."""
    lr: float = Field(default=0.25, ge=0)
    """Learning rate of BatchNorm and the head."""
    momentum: float = Field(default=0.9, gt=0, lt=1)
    """SGD momentum of BatchNorm and the head."""
    muon_lr: float = Field(default=0.1, ge=0)
    """Learning rate of the filters: the length of a step relative to the weights'."""
    muon_momentum: float = Field(default=0.6, ge=0, lt=1)
    """Muon momentum of the filters."""
    low_res: float = Field(default=0.6, ge=0, le=1)
    """Share of the epochs, from the first, at 3/4 of the resolution: each costs little more than half."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay of the head."""
    warmup: float = Field(default=0.08, ge=0, le=1)
    """Share of the steps in which the learning rate rises, before it falls to zero; both linearly."""
    label_smoothing: float = Field(default=0.1, ge=0, le=1)
    """Share of a label that is spread over all classes."""
    flip: int = Field(default=1, ge=0, le=1)
    """1 mirrors each image in every other epoch; 0 is for classes that left and right tell apart."""
    translate: float = Field(default=0.125, ge=0, le=0.5)
    """Largest shift, as a share of the image's side; the border is reflected."""
    cutout: float = Field(default=0.375, ge=0, le=1)
    """Side of the square that is blanked, as a share of the image's side."""
    zoom: float = Field(default=1.3, ge=1)
    """Every other image is scaled by up to this factor, up or down, and stretched by up to its square root."""
    corrupt: float = Field(default=0.0, ge=0)
    """Strength of noise, of lost detail and of changed colours, each on a quarter of the images; 1 is strong."""
    distill: float = Field(default=0.9, ge=0, le=1)
    """Weight of the teachers' verdicts against the labels, where there are teachers."""
    distill_temperature: float = Field(default=2.0, gt=0)
    """Divisor of the logits of teachers and network before their verdicts are compared."""
    widths: str = "96,256,384"
    """Channels of the stages; the last number holds for all further ones."""
    depth: int = 3
    """Convolutions in a stage."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first weights, of the order of the images and of their augmentation."""


DEFAULTS = Recipe()
