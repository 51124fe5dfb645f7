"""Configuration and runtime together: images in, calibrated predictions out, and the proof that the engine is right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.artifact import Artifact, Logits
from model.config import ModelConfig
from model.runtimes import ONNX, ONNX_INT8, TORCH, Runtime

Probabilities = NDArray[np.float32]

TOLERANCE = {TORCH: 0.1, ONNX: 0.01, ONNX_INT8: 0.35}
"""Largest difference from a reference logit. FP32 differs by summation order alone; FP16 by its 11 bits; INT8 by one
rounding step a layer between processors. A wrong weight, layout or normalisation differs by whole units."""


class Prediction(NamedTuple):
    """What is said of one image; ``probabilities`` (K,) are calibrated and sum to 1."""

    class_index: int
    class_name: str
    probabilities: Probabilities

    @property
    def confidence(self) -> float:
        return float(self.probabilities[self.class_index])


class VerificationError(RuntimeError):
    """An engine that does not reproduce the reference logits of its artifact."""


def calibrated(logits: Logits, temperature: float) -> Probabilities:
    """Softmax of (N, K) ``logits`` over ``temperature``, row by row (Guo et al., 2017)."""
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), np.float32)


def predictions(logits: Logits, config: ModelConfig) -> list[Prediction]:
    """One ``Prediction`` for each row of (N, K) ``logits``."""
    probabilities = calibrated(logits, config.temperature)
    winners = probabilities.argmax(axis=1).tolist()
    return [Prediction(i, config.classes[i], row) for i, row in zip(winners, probabilities, strict=True)]


def check(logits: Logits, artifact: Artifact, runtime_name: str) -> None:
    """Compare ``logits`` of the reference images with the stored ones; raises ``VerificationError``."""
    reference = artifact.reference()
    expected = reference.logits_int8 if runtime_name == ONNX_INT8 else reference.logits
    if logits.shape != expected.shape:
        raise VerificationError(
            f"runtime {runtime_name!r} gave logits of shape {logits.shape}; expected {expected.shape}"
        )
    difference = float(np.abs(logits - expected).max())
    # Written so that NaN fails too.
    if not difference <= TOLERANCE[runtime_name]:
        raise VerificationError(
            f"runtime {runtime_name!r} differs from the reference logits of {artifact.path} by {difference:.3g}; "
            f"expected at most {TOLERANCE[runtime_name]}"
        )


def verify(runtime: Runtime, artifact: Artifact) -> None:
    """Run the reference images through ``runtime``, which also warms it up; raises ``VerificationError``."""
    check(runtime(artifact.reference().images), artifact, runtime.name)
