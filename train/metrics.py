"""The formulas behind the figures in a card, each with its source: counts, probabilities and labels in, figures out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.artifact import Labels
from model.classifier import Probabilities
from model.tables import between

ECE_BINS = 15
Z_95 = 1.959964
MAX_INT8_LOSS = 0.003
"""Largest loss of accuracy allowed for INT8 against FP32."""


def tolerance(loss: float, images: int) -> float:
    """Loss of accuracy allowed on ``images`` images: ``loss``, or one and a half images if more, since one is noise."""
    return max(loss, 1.5 / images)


def int8_tolerance(images: int) -> float:
    """Loss of accuracy allowed for INT8 on ``images`` images."""
    return tolerance(MAX_INT8_LOSS, images)


def within(found: float, limit: float) -> bool:
    """Whether ``found``, a difference of floats, is at most ``limit`` up to rounding: 0.914 - 0.909 exceeds 0.005."""
    return round(found - limit, 6) <= 0


def accuracy_interval(hits: float, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927, JASA 22:209)."""
    share = hits / count
    centre = share + Z_95**2 / (2 * count)
    spread = Z_95 * math.sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    scale = 1 + Z_95**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def proportion(hits: int, count: int) -> dict[str, Any]:
    """``hits`` of ``count`` images, as an accuracy is stored in the card."""
    return {
        "accuracy": round(hits / count, 4),
        "accuracy_95": [round(bound, 4) for bound in accuracy_interval(hits, count)],
    }


def accuracy_line(figures: Mapping[str, Any]) -> str:
    """One line about the accuracy in ``figures`` from a card."""
    interval = between(figures["accuracy_95"])
    return f"accuracy {figures['accuracy']:.2%} (95 % interval {interval}, n={figures['images']})"


class Reliability(NamedTuple):
    """A reliability diagram: figures of each equal-width bin of confidence from 0 to 1; each (bins,)."""

    images: Labels
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Reliability:
        """Read it from the figures in a card."""
        return cls(*(np.asarray(figures["reliability"][name]) for name in cls._fields))


def reliability(probabilities: Probabilities, labels: Labels, bins: int = ECE_BINS) -> Reliability:
    confidence = probabilities.max(axis=1)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    images, sure, right = (
        np.bincount(index, weights, bins) for weights in (None, confidence, probabilities.argmax(axis=1) == labels)
    )
    return Reliability(images, sure / np.maximum(1, images), right / np.maximum(1, images))


def expected_calibration_error(probabilities: Probabilities, labels: Labels, bins: int = ECE_BINS) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Naeini et al., 2015; Guo et al., 2017)."""
    images, confidence, accuracy = reliability(probabilities, labels, bins)
    return float(images @ np.abs(confidence - accuracy)) / len(labels)


def calibration_error_by_chance(found: Reliability) -> float:
    """The calibration error expected of the same number of images per bin if their confidence were exactly right.

    For each bin it is the mean absolute deviation of a binomial, in De Moivre's closed form (Diaconis & Zabell, 1991,
    Statistical Science 6:284).
    """
    deviation = 0.0
    for images, p in zip(map(round, found.images), found.confidence, strict=True):
        if images and 0 < p < 1:
            k = math.floor(images * p) + 1
            ways = math.lgamma(images + 1) - math.lgamma(k + 1) - math.lgamma(images - k + 1)
            deviation += 2 * k * math.exp(ways + k * math.log(p) + (images - k + 1) * math.log1p(-p))
    return deviation / float(np.sum(found.images))


def confusion_matrix(verdicts: Labels, labels: Labels, classes: int) -> NDArray[np.int64]:
    """(K, K) counts; rows are the true classes, columns the verdicts."""
    return np.bincount(labels * classes + verdicts, minlength=classes**2).reshape(classes, classes)
