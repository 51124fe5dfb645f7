"""Turn an engine's outputs into calibrated probabilities, prediction sets and out-of-distribution verdicts.

A foreign image is one unlike the training images (out of distribution).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.artifact import Labels, Outputs, Reference
from model.config import ModelConfig

Probabilities = NDArray[np.float32]
Scores = NDArray[np.float32]
"""(N, K + 1 + K): an engine's outputs, followed by the calibrated probabilities."""


DIGITS = 8
"""Decimal places of a probability: with fewer, those of an image would add up to visibly more or less than 1."""


class Prediction(NamedTuple):
    """The verdict on one image; ``probabilities`` (K,) are calibrated and sum to 1."""

    class_index: int
    class_name: str
    probabilities: Probabilities
    in_distribution: bool
    """Whether the image resembles the training images."""

    @property
    def confidence(self) -> float:
        """Probability of the class, to ``DIGITS`` decimal places."""
        return round(float(self.probabilities[self.class_index]), DIGITS)

    @property
    def rounded(self) -> list[float]:
        """``probabilities`` to ``DIGITS`` decimal places, which is how callers, files and logs are told them."""
        rounded: list[float] = self.probabilities.astype(np.float64).round(DIGITS).tolist()
        return rounded


def calibrated(outputs: Outputs, temperature: float) -> Probabilities:
    """(N, K) softmax of the logits in ``outputs`` (N, K + 1), divided by ``temperature`` (Guo et al., 2017)."""
    scaled = outputs[:, :-1].astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), np.float32)


def fit_temperature(outputs: Outputs, labels: Labels) -> float:
    """The temperature that minimises the negative log-likelihood, to within one per cent.

    As in Platt scaling (Platt, 1999, "Probabilistic outputs for support vector machines"), each of N labels counts as
    right with probability (N + 1) / (N + 2): a network that gets a few images all right does not become certain.
    """
    candidates = np.geomspace(0.1, 10, 464)
    count, classes = len(labels), outputs.shape[1] - 1
    targets = np.full((count, classes), 1 / (count + 2) / (classes - 1))
    targets[np.arange(count), labels] = (count + 1) / (count + 2)
    logits = outputs[:, :-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)

    def loss(index: int) -> float:
        scaled = logits / candidates[index]
        return float(np.log(np.exp(scaled).sum(axis=1)).sum() - (targets * scaled).sum())

    # Convex in 1 / temperature, so bisection finds the minimum, fast enough to fit an ensemble at service start-up.
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if loss(middle) <= loss(middle + 1) else (middle + 1, high)
    return round(float(candidates[low]), 4)


def verdicts(outputs: Outputs) -> Labels:
    """The likeliest class of each row."""
    return np.asarray(outputs[:, :-1].argmax(axis=1), np.int64)


class Classifier:
    """Turns outputs into predictions, calibrated on the outputs of the same format for the validation images.

    ``foreign_rate`` is the false-positive rate of ``in_distribution``: the share of images like the validation images
    that may be called foreign.
    """

    def __init__(self, config: ModelConfig, reference: Reference, foreign_rate: float = 0.05) -> None:
        self.config = config
        self._nonconformity = nonconformity(reference.validation, reference.labels, config.temperature)
        self._least_familiarity = least_familiarity(reference.validation, foreign_rate)
        self.foreign_warning = foreign_warning(len(reference.labels), foreign_rate)
        """A warning for the operator when there are too few validation images to detect foreign ones; else empty."""

    @property
    def prediction_set_warning(self) -> str:
        """A warning naming the level above which a ``prediction_set`` holds every class; empty from 99 % up."""
        images = len(self._nonconformity)
        if images >= 99:
            return ""
        return f"{images} validation images: above {images / (images + 1):.1%} a prediction set holds every class"

    def __call__(self, outputs: Outputs) -> list[Prediction]:
        """One ``Prediction`` for each row of ``outputs``."""
        return self.predict(self.score(outputs))

    def score(self, outputs: Outputs) -> Scores:
        """Append the probabilities to ``outputs``, for a whole batch at once: one row costs as much as fifty."""
        return np.concatenate([outputs, calibrated(outputs, self.config.temperature)], axis=1)

    def predict(self, scores: Scores) -> list[Prediction]:
        """One ``Prediction`` for each row of ``scores``."""
        familiarity = len(self.config.classes)
        probabilities = scores[:, familiarity + 1 :]
        winners = probabilities.argmax(axis=1).tolist()
        familiar = (scores[:, familiarity] >= self._least_familiarity).tolist()
        classes = self.config.classes
        return [Prediction(i, classes[i], row, f) for i, row, f in zip(winners, probabilities, familiar, strict=True)]

    def prediction_set(self, probabilities: Probabilities, level: float) -> list[int]:
        """Class indices that include the true one for a share of at least ``level`` of images like the validation ones.

        Split conformal prediction with least ambiguous sets (Sadinle et al., 2019, arXiv:1609.00451). The set always
        holds the likeliest class, and every class where there are too few validation images for ``level``.
        """
        rank = math.ceil((len(self._nonconformity) + 1) * level)
        if rank > len(self._nonconformity):
            return list(range(len(probabilities)))
        limit = max(self._nonconformity[rank - 1], 1 - probabilities.max())
        return np.flatnonzero(1 - probabilities <= limit).tolist()


def least_familiarity(outputs: Outputs, foreign_rate: float) -> float:
    """The familiarity below which an image is called foreign.

    A conformal p-value (Vovk et al., 2005, "Algorithmic Learning in a Random World"): at most a share ``foreign_rate``
    of images like those behind ``outputs`` falls below it, whatever their number. Minus infinity if they are too few.
    """
    rank = _foreign_rank(len(outputs), foreign_rate)
    return float(np.sort(outputs[:, -1])[rank - 1]) if rank else -math.inf


def _foreign_rank(images: int, foreign_rate: float) -> int:
    """Rank, from the lowest, of the familiarity among ``images`` that becomes the threshold; 0 for too few images."""
    return math.floor((images + 1) * foreign_rate)


def foreign_warning(images: int, foreign_rate: float) -> str:
    """A warning about what so few validation images make impossible; empty where they suffice."""
    if not _foreign_rank(images, foreign_rate):
        needed = math.ceil(1 / foreign_rate) - 1
        return f"{images} validation images: in_distribution is always true; expected at least {needed}"
    return ""


def nonconformity(outputs: Outputs, labels: Labels, temperature: float) -> Probabilities:
    """(N,): one minus the probability of the true class, in ascending order."""
    probabilities = calibrated(outputs, temperature)
    return np.sort(1 - probabilities[np.arange(len(labels)), labels])
