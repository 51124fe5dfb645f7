"""Counts images in the bins of the training images, and verdicts in the bins of the validation images.

The counters add up over workers and replicas. A Prometheus rule (monitoring/prometheus) computes how far they have
moved from what is expected, the population stability index, so that window and threshold do not concern the service.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from functools import cache

import numpy as np
from prometheus_client import Counter

from model.artifact import Reference
from model.classifier import Prediction, calibrated
from model.config import ModelConfig
from model.preprocess import Pixels
from model.statistics import BINS, STATISTICS, histogram
from serving import metrics
from serving.pacing import without_blocking

CLASS, CONFIDENCE = "class", "confidence"
GATHER_SECONDS = 0.02
LEAST_IMAGES, LEAST_CONFIDENCES = 10, 100
"""Fewest validation images for which statistics and confidences are compared. With fewer, which come with few training
images, the index exceeds its alert threshold by chance: for 20 confidences, in a fifth of all cases."""
PIXELS_AT_ONCE = 2**18
"""Pixels whose statistics take some 2 ms."""
CONFIDENCE_EDGES = (0.5, 0.7, 0.9, 0.95, 0.99)


class Drift:
    """Tells Prometheus what is expected, and what arrives."""

    def __init__(self, config: ModelConfig, reference: Reference) -> None:
        self._edges = reference.edges
        self._unseen: list[Pixels] = []
        # At 0 from the start, and not looked up again for every image.
        self._verdicts = [metrics.IMAGES.labels(name) for name in config.classes]
        expected = expectations(config, reference)
        self._compared = expected.keys()
        for feature, counts in expected.items():
            _expect(feature, counts)

    def count_images(self, images: Pixels) -> None:
        """Count a batch (N, H, W, 3) a little later: its replies need not wait, and many images at once cost less."""
        self._unseen.append(images)
        if len(self._unseen) == 1:
            self._counting = asyncio.get_running_loop().create_task(self._count())

    async def _count(self) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        images = np.concatenate(self._unseen)
        self._unseen.clear()
        _, height, width, _ = images.shape
        at_once = max(1, PIXELS_AT_ONCE // (height * width))
        async for some in without_blocking(images[i : i + at_once] for i in range(0, len(images), at_once)):
            for name, counts in zip(STATISTICS, histogram(some, self._edges), strict=True):
                if name in self._compared:
                    for index in np.flatnonzero(counts).tolist():
                        _images(name, str(index)).inc(int(counts[index]))

    def count_verdict(self, prediction: Prediction) -> None:
        self._verdicts[prediction.class_index].inc()
        metrics.CONFIDENCE.observe(prediction.confidence)
        if not prediction.in_distribution:
            metrics.FOREIGN_IMAGES.inc()
        _images(CLASS, prediction.class_name).inc()
        if CONFIDENCE in self._compared:
            _images(CONFIDENCE, str(bisect_right(CONFIDENCE_EDGES, prediction.confidence))).inc()


def expectations(config: ModelConfig, reference: Reference) -> dict[str, dict[str, int]]:
    """How many images to expect in each bin, relative to the others, by the feature that is compared.

    Leaves out a statistic whose edges tie, with each other or with 0, such as the colour of grey images: its bins do
    not hold a tenth each. Expectations from too few images are left out as well.
    """
    images = len(reference.labels)
    probabilities = calibrated(reference.validation, config.temperature)
    verdicts = np.bincount(probabilities.argmax(axis=1), minlength=len(config.classes))
    expected = {CLASS: dict(zip(config.classes, verdicts.tolist(), strict=True))}
    if images >= LEAST_CONFIDENCES:
        bins = np.searchsorted(CONFIDENCE_EDGES, probabilities.max(axis=1), side="right")
        confidences = np.bincount(bins, minlength=len(CONFIDENCE_EDGES) + 1)
        expected[CONFIDENCE] = {str(i): count for i, count in enumerate(confidences.tolist())}
    for name, edges in zip(STATISTICS, reference.edges, strict=True):
        if images >= LEAST_IMAGES and (np.diff(edges, prepend=0) > 0).all():
            expected[name] = {str(i): 1 for i in range(BINS)}
    return expected


@cache
def _images(feature: str, bin_name: str) -> Counter:
    """``DRIFT_IMAGES`` of one bin, cached to save a lookup by labels for every image."""
    return metrics.DRIFT_IMAGES.labels(feature, bin_name)


def _expect(feature: str, counts: dict[str, int]) -> None:
    """Expected shares of the bins, with one image added to each so that no share is 0."""
    total = sum(counts.values()) + len(counts)
    for name, count in counts.items():
        metrics.EXPECTED_SHARE.labels(feature, name).set((count + 1) / total)
        _images(feature, name)  # at 0 from the start
