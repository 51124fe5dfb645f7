"""The configuration that makes an artifact self-describing: ``config.json`` beside the weights."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

CHANNELS = 3
"""Every image is RGB by the time a network sees it; ``preprocess.decode`` guarantees that."""

Triple = tuple[float, float, float]


class ConfigError(ValueError):
    """A ``config.json`` that cannot describe a classifier."""


class ModelConfig(BaseModel):
    """Everything about a classifier except its weights.

    Derived from the training data and the training command, so that the same code trains and serves any folder of
    labelled images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?$")
    """Name in the model store."""
    classes: tuple[str, ...] = Field(min_length=2)
    """Class names in the order of the logits."""
    input_size: tuple[int, int]
    """Height and width of the network's input, in pixels."""
    mean: Triple
    """Per-channel (RGB) mean of the training pixels, in units of 0..255."""
    std: Triple
    """Per-channel (RGB) standard deviation of the training pixels, in units of 0..255."""
    widths: tuple[int, ...] = ()
    """Channels of each stage of the network; every stage halves height and width. None for a network that was trained
    elsewhere, of which there is only a graph for ONNX Runtime."""
    depth: int = Field(default=3, ge=2)
    """Convolutions per stage."""
    temperature: float = Field(default=1.0, gt=0)
    """Divisor of the logits before softmax, fitted on validation images (Guo et al., 2017, arXiv:1706.04599)."""

    bank: int = Field(default=0, ge=0)
    """Number of training images whose features the artifact keeps to detect foreign images."""

    cell: int | None = Field(default=None, ge=1)
    """Input pixels per cell of the evidence, along each side, unless the stages determine it."""

    @property
    def stride(self) -> int:
        """Input pixels per cell of the evidence, along each side."""
        return self.cell or int(2 ** len(self.widths))

    @property
    def has_evidence(self) -> bool:
        """Whether the evidence tells places apart: that of some networks trained elsewhere is one cell."""
        return self.stride < max(self.input_size)

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Read ``path``; raises ``ConfigError`` naming the file and the first field that is wrong."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error
