"""The map of evidence, on an engine whose evidence is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from model import explain
from model.artifact import Artifact
from model.classifier import Classifier
from model.runtimes import ONNX_INT8, create
from tests import toy


def brightness(images: np.ndarray) -> np.ndarray:
    """Evidence (N, 3, 3, 2) for "bright", how bright each ninth of the image is, and none for another class."""
    means = np.stack([cv2.resize(i, (3, 3), interpolation=cv2.INTER_AREA) for i in images]).mean(axis=-1)
    return np.stack([means, np.zeros_like(means)], axis=-1).astype(np.float32)


@pytest.mark.parametrize(("row", "column"), [(3, 4), (16, 16), (28, 2), (20, 30)])
def test_the_evidence_lies_where_the_object_is(row: int, column: int) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    cv2.circle(image, (column, row), 3, (255, 255, 255), -1)
    heat = explain.evidence_map(brightness(explain.views(image)), 0, (32, 32))
    assert heat.shape == (32, 32)
    assert heat.sum() == pytest.approx(1, abs=1e-4)
    peak = np.unravel_index(heat.argmax(), heat.shape)
    assert np.hypot(peak[0] - row, peak[1] - column) <= 6  # finer than the 11 pixels of the grid
    assert heat[np.hypot(*(np.indices(heat.shape) - [[[row]], [[column]]])) <= 11].sum() > 0.5


def test_no_evidence_is_an_empty_map_not_an_error() -> None:
    evidence = np.zeros((explain.VIEWS, 3, 3, 2), np.float32)
    assert explain.evidence_map(evidence, 0, (16, 24)).sum() == 0


@pytest.mark.parametrize(
    ("shape", "expected"), [((32, 32), (256, 256)), ((2000, 500), (1024, 256)), ((300, 1), (300, 1))]
)
def test_an_overlay_is_large_enough_to_see_and_small_enough_to_send(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    image = np.full((*shape, 3), (200, 20, 20), np.uint8)
    heat = np.zeros((32, 32), np.float32)
    heat[:8] = 1 / 256
    shown = cv2.imdecode(np.frombuffer(explain.overlay(image, heat), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert shown.shape[:2] == expected
    hot, cold = shown[0, 0].astype(int), shown[-1, -1].astype(int)
    assert cold[0] > 2 * cold[1:].max()  # the image is still seen
    assert np.abs(hot - cold).sum() > 100


def test_a_real_network_looks_at_the_object(toy_artifact: Artifact) -> None:
    """A disc on the left is explained by the left, on the right by the right."""
    engine = create(ONNX_INT8, toy_artifact)
    classifier = Classifier(toy_artifact.config, toy_artifact.reference(quantised=True))
    centres = []
    for x in (8, 15):
        image = np.full((toy.SIDE, toy.SIDE, 3), 40, np.uint8)
        cv2.circle(image, (x, 12), 7, (220, 220, 220), -1)
        verdict = classifier(engine(image[None]))[0]
        heat = explain.evidence_map(engine.evidence(explain.views(image)), verdict.class_index, image.shape[:2])
        centres.append(float((heat.sum(axis=0) * np.arange(toy.SIDE)).sum()))
    assert centres[0] < centres[1] - 1
