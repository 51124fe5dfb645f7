"""One artifact, or several that answer as an ensemble: the mean of their calibrated probabilities, calibrated again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from model import runtimes
from model.artifact import ONNX, RUNTIMES, Artifact, Evidence, Outputs, Reference
from model.classifier import calibrated, fit_temperature
from model.config import ModelConfig
from model.preprocess import Pixels
from model.runtimes import Runtime

LEAST_PROBABILITY = 1e-9
"""Keeps logarithms finite."""


class EnsembleError(ValueError):
    """Artifacts that cannot form an ensemble."""


class Ensemble:
    """Artifacts trained on the same data, and so with the same classes, input size and reference images.

    Raises ``EnsembleError`` naming the first that was not.
    """

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self.artifacts = tuple(artifacts)
        for other in self.artifacts[1:]:
            if other.card["training"]["data_sha256"] != self.artifacts[0].card["training"]["data_sha256"]:
                raise EnsembleError(
                    f"{other.config.name} was trained on other data than {self.artifacts[0].config.name}; "
                    "expected the members of an ensemble to share their data"
                )

    def expect_interchangeable(self, shadow: Ensemble) -> None:
        """Raise ``EnsembleError`` unless ``shadow`` has the same input size and classes."""
        ours, theirs = ((e.config.classes, e.config.input_size) for e in (self, shadow))
        if ours != theirs:
            raise EnsembleError(f"the shadow has classes and input size {theirs}; expected those of the model, {ours}")

    @cached_property
    def config(self) -> ModelConfig:
        """The configuration of the first member, with a temperature for the combined outputs, and the finest grid."""
        config = self.artifacts[0].config
        if len(self.artifacts) == 1:
            return config
        # The mean of calibrated probabilities is underconfident. As in an export, FP32 decides for every format.
        reference = self.reference(ONNX)
        temperature = fit_temperature(reference.validation, reference.labels)
        cell = min(artifact.config.stride for artifact in self.artifacts)
        return config.model_copy(update={"temperature": temperature, "cell": cell})

    @property
    def runtimes(self) -> list[str]:
        """The runtimes that every member has a file for."""
        return [name for name in RUNTIMES if all(name in artifact.runtimes for artifact in self.artifacts)]

    def reference(self, runtime_name: str) -> Reference:
        references = [a.reference(runtime_name) for a in self.artifacts]
        if len(references) == 1:
            return references[0]
        # A logit's error e moves a log-probability by up to 2 e / temperature: by itself and through the normaliser.
        tolerance = 2 / min(artifact.config.temperature for artifact in self.artifacts)
        return references[0]._replace(
            tolerance=max(1.0, tolerance),
            outputs=self.combine([reference.outputs for reference in references]),
            validation=self.combine([reference.validation for reference in references]),
        )

    def combine(self, outputs: Sequence[Outputs]) -> Outputs:
        """Combine the members' outputs for the same images: logarithms of mean probabilities, and mean familiarity."""
        members = zip(self.artifacts, outputs, strict=True)
        probabilities = np.mean([calibrated(o, a.config.temperature) for a, o in members], axis=0)
        familiarity = np.mean([o[:, -1:] for o in outputs], axis=0)
        logits = np.log(np.maximum(probabilities, LEAST_PROBABILITY))
        return np.concatenate([logits, familiarity], axis=1, dtype=np.float32)

    def engine(self, runtime_name: str, threads: int = 1, device_index: int = 0) -> Runtime:
        """Load every member into the runtime ``runtime_name``; raises ``RuntimeUnavailableError``."""
        members = [runtimes.create(runtime_name, a, threads, device_index) for a in self.artifacts]
        return members[0] if len(members) == 1 else _EnsembleEngine(self, members)


class _EnsembleEngine:
    def __init__(self, ensemble: Ensemble, members: Sequence[Runtime]) -> None:
        self._ensemble, self._members = ensemble, members
        self.name = members[0].name

    def __call__(self, images: Pixels) -> Outputs:
        return self._ensemble.combine([member(images) for member in self._members])

    def evidence(self, images: Pixels) -> Evidence:
        """The mean of the members' evidence, on the finest of their grids: networks trained elsewhere have others."""
        members = [member.evidence(images) for member in self._members]
        height, width = (max(evidence.shape[axis] for evidence in members) for axis in (1, 2))
        return np.asarray(np.mean([_on_grid(evidence, height, width) for evidence in members], axis=0), np.float32)


def _on_grid(evidence: Evidence, height: int, width: int) -> Evidence:
    """(N, h, w, K) to (N, height, width, K): each cell's evidence goes to the cells that it overlaps, by area."""
    if evidence.shape[1:3] == (height, width):
        return evidence
    rows, columns = _shares(height, evidence.shape[1]), _shares(width, evidence.shape[2])
    return np.asarray(np.einsum("ih,jw,nhwk->nijk", rows, columns, evidence, optimize=True), np.float32)


def _shares(cells: int, given: int) -> NDArray[np.float64]:
    """(cells, given): the share of each of ``given`` equal parts of a side that lies in each of ``cells``."""
    wanted, parts = np.arange(cells + 1) / cells, np.arange(given + 1) / given
    overlap = np.minimum(wanted[1:, None], parts[1:]) - np.maximum(wanted[:-1, None], parts[:-1])
    return np.asarray(given * np.maximum(overlap, 0))
