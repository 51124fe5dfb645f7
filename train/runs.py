"""What a training leaves behind, and another one, an export or a report reads: a finished run, or an artifact."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.artifact import CARD, CONFIG, WEIGHTS
from model.config import ModelConfig
from train.data import DataError

CHECKPOINT, RUN = "checkpoint.safetensors", "run.json"
DIGESTS = "trained_on"
"""Tensor of a checkpoint: the digests of all files that its network has learned from."""


class Trained(NamedTuple):
    """A finished run or an artifact, which another run starts from or has as a teacher."""

    path: Path
    weights: dict[str, Tensor]
    record: dict[str, Any]
    config: ModelConfig
    digests: set[int] | None
    """Digests of all files that it has learned from; an artifact, which is small, does not tell."""

    @classmethod
    def read(cls, path: Path) -> Trained:
        """Raises ``DataError`` unless ``path`` is a finished run or an artifact."""
        return cls(path, read_weights(path), read_record(path), ModelConfig.load(path / CONFIG), read_digests(path))

    def holds_out_by_content(self) -> bool:
        """Whether each of the runs that led to it did, so that none learned from what any other such run holds out."""
        return all(run.get("held_out_by_content", False) for run in runs(self.record))

    def sha256(self) -> str:
        """Hash of the weights: what is in a folder may be another network tomorrow."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def read_weights(trained: Path) -> dict[str, Tensor]:
    """The state of the network of a run or of an artifact, on the CPU."""
    path = trained / (CHECKPOINT if (trained / CHECKPOINT).exists() else WEIGHTS)
    if not path.exists():
        raise DataError(f"{trained}: has neither {CHECKPOINT} nor {WEIGHTS}; expected a finished run or an artifact")
    with open_weights(path) as checkpoint:
        names = [name for name in checkpoint.keys() if name.startswith("network.")]  # noqa: SIM118 (not a dict)
        return {name.removeprefix("network."): checkpoint.get_tensor(name) for name in names}


def read_digests(trained: Path) -> set[int] | None:
    """Those in the checkpoint of a run; None where there are none on record."""
    path = trained / CHECKPOINT
    if not path.exists():
        return None
    with open_weights(path) as checkpoint:
        if DIGESTS not in checkpoint.keys():  # noqa: SIM118 (not a dict)
            return None
        return set(checkpoint.get_tensor(DIGESTS).tolist())


def open_weights(path: Path) -> safe_open:
    """Raises ``DataError`` for a file that is damaged, such as one that is cut off."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise DataError(f"{path}: {error}; expected whole weights, not a damaged file") from error


def write_weights(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Raises ``DataError`` where ``path`` cannot be written, or the disk is full."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise DataError(f"{path}: {error}") from error


def read_record(trained: Path) -> dict[str, Any]:
    """What a finished run, or the card of an artifact, tells of its training."""
    path = trained / (RUN if (trained / RUN).exists() else CARD)
    if not path.exists():
        raise DataError(f"{trained}: not finished, for it has neither {RUN} nor {CARD}; --resume it first")
    try:
        told = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: {error}; expected whole JSON, not a damaged file") from error
    record: dict[str, Any] = told if path.name == RUN else told["training"]
    return record


def runs(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that led to the weights, the first one first."""
    return [*(runs(training["start"]) if "start" in training else []), training]
