"""The evidence map, for an engine whose evidence is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from model import explain
from model.artifact import ONNX_INT8, Artifact
from model.preprocess import preprocess
from model.runtimes import create
from model.store import SHIPPED
from tests.golden import IMAGES
from tests.snippets import of_the_example


def brightness(images: np.ndarray) -> np.ndarray:
    """Evidence (N, 3, 3, 2): the brightness of each 8-pixel cell for class "bright", and none for the other class.

    As in a network that pools an odd number of pixels, the last rows and columns belong to no cell.
    """
    cells = [cv2.resize(i[:24, :24], (3, 3), interpolation=cv2.INTER_AREA) for i in images]
    means = np.stack(cells).mean(axis=-1)
    return np.stack([means, np.zeros_like(means)], axis=-1).astype(np.float32)


@pytest.mark.parametrize(("row", "column"), [(3, 4), (16, 16), (28, 2), (20, 30)])
def test_evidence_peaks_where_the_object_is(row: int, column: int) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    cv2.circle(image, (column, row), 3, (255, 255, 255), -1)
    heat = explain.evidence_map(brightness(explain.views(image)), 0, (32, 32), stride=8)
    assert heat.shape == (32, 32)
    assert heat.sum() == pytest.approx(1, abs=1e-4)
    peak = np.unravel_index(heat.argmax(), heat.shape)
    assert np.hypot(peak[0] - row, peak[1] - column) <= 4  # finer than the grid of 8 pixels
    assert heat[np.hypot(*(np.indices(heat.shape) - [[[row]], [[column]]])) <= 11].sum() > 0.5


def test_no_evidence_gives_an_empty_map() -> None:
    evidence = np.zeros((explain.VIEWS, 3, 3, 2), np.float32)
    assert explain.evidence_map(evidence, 0, (16, 24), stride=8).sum() == 0


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
    assert cold[0] > 2 * cold[1:].max()  # the image remains visible
    assert np.abs(hot - cold).sum() > 100


@of_the_example
def test_the_shipped_networks_evidence_lies_on_the_picture() -> None:
    """Shrunk to half and placed left or right of the middle: by chance, half of the heat would fall on that side."""
    artifact = Artifact.load(SHIPPED)
    engine = create(ONNX_INT8, artifact)
    height, width = size = artifact.config.input_size
    shares = []
    for path in IMAGES:
        index = artifact.config.classes.index(path.stem)
        small = preprocess(path.read_bytes(), (height // 2, width // 2))
        for half in (slice(None, width // 2), slice(width // 2, None)):
            image = np.full((height, width, 3), 128, np.uint8)
            image[height // 4 : height // 4 + height // 2, half] = small
            evidence = engine.evidence(explain.views(image))
            heat = explain.evidence_map(evidence, index, size, artifact.config.stride).clip(0)
            shares.append(heat[:, half].sum() / heat.sum())
    assert np.mean(shares) > 0.7
