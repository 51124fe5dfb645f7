"""Read and write what a training run leaves behind: a finished run, or an artifact, as other commands need it."""

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
from train.command import CommandError
from train.data import Data, load

CHECKPOINT, RUN = "checkpoint.safetensors", "run.json"
NETWORK = "network."
"""Prefix of the network's weights among the tensors of a checkpoint or an artifact."""
DIGESTS = "trained_on"
"""Tensor of a checkpoint: the digests of all files that its network was trained on."""


class Trained(NamedTuple):
    """A finished run or an artifact that another run starts from or uses as a teacher."""

    path: Path
    weights: dict[str, Tensor]
    record: dict[str, Any]
    config: ModelConfig
    digests: set[int] | None
    """Digests of all files that it was trained on; None for an artifact, which omits them to stay small."""

    @classmethod
    def read(cls, path: Path) -> Trained:
        """Raises ``CommandError`` unless ``path`` is a finished run or an artifact."""
        return cls(path, read_weights(path), read_record(path), ModelConfig.load(path / CONFIG), read_digests(path))

    def require_unseen(self, data: Data) -> None:
        """Raise ``CommandError`` if it was trained on images that ``data`` holds out; say so if that is not on record.

        Needs no record if all runs that led to it held images out by their content, as ``data`` does: none of them was
        trained on what any other such run holds out.
        """
        if self.digests is not None:
            val, test = (sum(digest in self.digests for digest in split.digests) for split in (data.val, data.test))
            if val or test:
                raise CommandError(
                    f"{self.path}: was trained on {val} of the {len(data.val)} validation images and {test} of the "
                    f"{len(data.test)} test images of {data.source}; expected none of either"
                )
        elif not (data.by_content and all(run.get("held_out_by_content", False) for run in runs(self.record))):
            print(
                f"--start {self.path}: was trained on other data, {self.record['source']}, and has no record of the "
                "images: figures are too good if some are validation or test images here"
            )

    def sha256(self) -> str:
        """Hash of the weights: the folder may hold another network later."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def read_weights(trained: Path) -> dict[str, Tensor]:
    """The weights of the network of a run or an artifact, on the CPU."""
    path = trained / (CHECKPOINT if (trained / CHECKPOINT).exists() else WEIGHTS)
    if not path.exists():
        raise CommandError(
            f"{trained}: has neither {CHECKPOINT} nor {WEIGHTS}; expected a finished run, or an artifact trained here"
        )
    with open_weights(path) as checkpoint:
        names = [name for name in checkpoint.keys() if name.startswith(NETWORK)]  # noqa: SIM118 (not a dict)
        return {name.removeprefix(NETWORK): checkpoint.get_tensor(name) for name in names}


def read_digests(trained: Path) -> set[int] | None:
    """The digests in the checkpoint of a run; None if none are on record."""
    path = trained / CHECKPOINT
    if not path.exists():
        return None
    with open_weights(path) as checkpoint:
        if DIGESTS not in checkpoint.keys():  # noqa: SIM118 (not a dict)
            return None
        return set(checkpoint.get_tensor(DIGESTS).tolist())


def read_checkpoint(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the position in the schedule that ``write_checkpoint`` wrote."""
    path = run / CHECKPOINT
    if not path.exists():
        raise CommandError(f"{run}: has no {CHECKPOINT} to resume from")
    with open_weights(path) as checkpoint:
        tensors = {name: checkpoint.get_tensor(name) for name in checkpoint.keys()}  # noqa: SIM118 (not a dict)
        return tensors, json.loads(checkpoint.metadata()["position"])


def write_checkpoint(run: Path, tensors: dict[str, Tensor], position: dict[str, Any]) -> None:
    """Replace the checkpoint; a kill in mid-write leaves the previous one intact."""
    partial = run / (CHECKPOINT + ".partial")
    write_weights(tensors, partial, {"position": json.dumps(position)})
    partial.replace(run / CHECKPOINT)


def open_weights(path: Path) -> safe_open:
    """Open a safetensors file; raises ``CommandError`` if it is damaged, such as cut off."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise CommandError(f"{path}: {error}; expected whole weights, not a damaged file") from error


def write_weights(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; raises ``CommandError`` if ``path`` cannot be written or the disk is full."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise CommandError(f"{path}: {error}") from error


def read_record(trained: Path) -> dict[str, Any]:
    """The record of the training, from a finished run or from the card of an artifact."""
    path = trained / (RUN if (trained / RUN).exists() else CARD)
    if not path.exists():
        raise CommandError(f"{trained}: not finished, for it has neither {RUN} nor {CARD}; --resume it first")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CommandError(f"{path}: {error}; expected whole JSON, not a damaged file") from error
    record: dict[str, Any] = content if path.name == RUN else content["training"]
    return record


def load_data_of(config: ModelConfig, record: dict[str, Any], source: str) -> Data:
    """The data of a training, from ``source``; raises ``CommandError`` if that holds other data.

    Images held out from other data may have been trained on: every figure of them would be too good.
    """
    data = load(source, config.input_size)
    if data.classes != config.classes:
        raise CommandError(f"{source}: classes {list(data.classes)}; expected {list(config.classes)}")
    if data.sha256() != record["data_sha256"]:
        raise CommandError(
            f"{source}: not the data of the training, {record['source']}: images held out here may have been trained on"
        )
    return data


def runs(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that led to the weights, oldest first."""
    return [*(runs(training["start"]) if "start" in training else []), training]
