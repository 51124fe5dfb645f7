"""A trained classifier on disk: the only module that knows its file names, and that verifies the files are intact.

    config.json          classes, input size, normalisation, temperature
    model.safetensors    weights; convolutions and the head rounded to FP16, everything else FP32
    model.onnx           the graph for ONNX Runtime, uint8 NHWC in, FP32 out; refers to the weights in model.safetensors
    model.int8.onnx      the same, statically quantised
                         (a network trained elsewhere has no model.safetensors, and may have no model.int8.onnx)
    reference.npz        a few images with the outputs that each format must reproduce on any machine; the outputs for
                         the validation images, which calibrate predictions for new ones; and statistics of
                         training images
    card.json            metrics, provenance, and the SHA-256 of every file above

No file holds a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.config import ConfigError, ModelConfig
from model.preprocess import Pixels
from model.statistics import Edges

Outputs = NDArray[np.float32]
"""(N, K + 1): K uncalibrated logits, then the familiarity of the image (``model.network.ServedNet``)."""
Evidence = NDArray[np.float32]
"""(N, h, w, K): what each cell of a coarse grid adds to each logit."""
Labels = NDArray[np.int64]

TORCH, ONNX, ONNX_INT8 = RUNTIMES = "torch", "onnx", "onnx-int8"
"""Each computes the same network (``model.runtimes``)."""
FILES = {TORCH: "model.safetensors", ONNX: "model.onnx", ONNX_INT8: "model.int8.onnx"}
"""The file that each runtime loads."""
CONFIG, WEIGHTS, REFERENCE, CARD = "config.json", FILES[TORCH], "reference.npz", "card.json"
HASHED = (CONFIG, *FILES.values(), REFERENCE)
REQUIRED = {CONFIG, FILES[ONNX], REFERENCE}
"""Files that no artifact lacks."""
VERSION_LENGTH = 12
SHIPPED = Path(__file__).parent / "pretrained"
"""The artifact that the repository ships. In a built Bento only its CONFIG is here; the rest is the Bento's model."""
ALSO_SHIPPED = tuple(sorted(SHIPPED.parent.glob("pretrained_*")))
"""Other artifacts for the same classes, selected with ``MODEL``; a checkout made by ``make new`` has none."""
ACCURATE = SHIPPED.with_name("pretrained_accurate")
"""The larger one among them, if present; the default on a GPU."""
QUANTISED = "_int8"


class ArtifactError(ValueError):
    """An artifact with a missing, altered or unreadable file."""


class Reference(NamedTuple):
    """Outputs of one format of the network for ``images`` (N, H, W, 3) and for V validation images."""

    images: Pixels
    outputs: Outputs
    """(N, K + 1)."""
    validation: Outputs
    """(V, K + 1)."""
    labels: Labels
    """(V,): true classes of the validation images."""
    edges: Edges
    """(4, BINS - 1): quantiles of the statistics of training images."""
    tolerance: float = 1.0
    """Multiplies the error allowed in ``outputs``; may exceed 1 for an ensemble."""


@dataclass(frozen=True)
class Artifact:
    """A verified artifact directory."""

    path: Path
    config: ModelConfig
    card: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Read ``path`` and verify the hash of every file; raises ``ArtifactError`` naming the offending file."""
        try:
            card = json.loads((path / CARD).read_bytes())
            listed = [name for name in HASHED if name in REQUIRED or name in card["files"]]
            expected = {name: card["files"][name]["sha256"] for name in listed}
            actual = {name: _sha256(path / name) for name in listed}
        except OSError as error:
            raise ArtifactError(f"{path}: not a whole artifact: {error.filename}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path / CARD}: not that of a whole artifact: {error!r}") from error
        for name in listed:
            if actual[name] != expected[name]:
                raise ArtifactError(f"{path / name}: sha256 {actual[name]}; expected {expected[name]} of {CARD}")
        try:
            return cls(path, ModelConfig.load(path / CONFIG), card)
        except ConfigError as error:
            raise ArtifactError(str(error)) from error

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures measured into the card, by runtime or kind of test; empty if nothing was measured."""
        metrics: dict[str, Any] = self.card.get("metrics", {})
        return metrics

    @property
    def tag(self) -> str:
        """``name:version``, as in the model store."""
        return f"{self.config.name}:{self.version}"

    @cached_property
    def version(self) -> str:
        """Twelve hex digits derived from the content, so that the same files have the same version everywhere.

        Cached, because a model may be deleted from the store while it is served.
        """
        return _sha256(self.path / CARD)[:VERSION_LENGTH]

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The runtimes that it has a file for."""
        return tuple(runtime for runtime, name in FILES.items() if name in self.card["files"])

    @property
    def cpu_runtime(self) -> str:
        """The runtime that serves on a CPU unless another is asked for."""
        return self.runtimes[-1]

    def file(self, runtime: str) -> Path:
        """The file that ``runtime`` loads."""
        return self.path / FILES[runtime]

    def copy_to(self, directory: Path) -> None:
        """Copy every file, the card last: a copy cut short does not load."""
        for name in (*HASHED, CARD):
            if name == CARD or name in self.card["files"]:
                shutil.copyfile(self.path / name, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)  # that of another artifact

    def reference(self, runtime: str) -> Reference:
        """What ``runtime`` must reproduce; raises ``ArtifactError`` for an artifact exported by too old a version."""
        suffix = QUANTISED if runtime == ONNX_INT8 else ""
        with np.load(self.path / REFERENCE, allow_pickle=False) as arrays:
            try:
                return Reference(
                    arrays["images"],
                    arrays["outputs" + suffix],
                    arrays["validation" + suffix].astype(np.float32),  # FP16 in older artifacts
                    arrays["labels"].astype(np.int64),
                    arrays["edges"],
                )
            except KeyError as error:
                raise ArtifactError(f"{self.path / REFERENCE}: {error.args[0]}; expected it: export anew") from error


def save_reference(path: Path, full: Reference, quantised: Reference | None) -> None:
    """Write the outputs of both formats, if there is a quantised one, for the same images.

    In FP32: in FP16 the familiarities of nearly identical images, as from a fixed camera, would round to one number.
    """
    arrays: dict[str, NDArray[Any]] = {
        "images": full.images,
        "labels": full.labels.astype(np.int32),
        "edges": full.edges,
    }
    for reference, suffix in ((full, ""), (quantised, QUANTISED)):
        if reference:
            arrays["outputs" + suffix] = reference.outputs
            arrays["validation" + suffix] = reference.validation
    np.savez_compressed(path / REFERENCE, allow_pickle=False, **arrays)


def seal(path: Path, card: dict[str, Any]) -> Artifact:
    """Write ``card.json`` with the hash and size of every file; returns the artifact as loaded back."""
    present = [name for name in HASHED if name in REQUIRED or (path / name).exists()]
    files = {name: {"sha256": _sha256(path / name), "bytes": (path / name).stat().st_size} for name in present}
    text = json.dumps({**card, "files": files}, indent=2)
    # Numbers stay on the line of their list: of a thousand classes, the confusion matrices alone would be 39 MB.
    (path / CARD).write_text(re.sub(r"\n +(?=[-\d\]])", "", text) + "\n")
    return Artifact.load(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
