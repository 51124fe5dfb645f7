"""What is counted so that a change in what users send, or in what they are told, can be seen without labels."""

from __future__ import annotations

import math
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import requests

from model.artifact import Artifact
from model.statistics import BINS, STATISTICS, edges, histogram, measure
from serving.drift import GATHER_SECONDS
from tests import toy
from tests.live import Server, encode, picture, samples, total


def test_statistics_of_known_images() -> None:
    black, red = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::2] = 100
    measured = measure(np.stack([black, red, stripes]))
    expected = {"brightness": (0, 0, 50), "contrast": (0, 0, 50), "sharpness": (0, 0, 100), "colour": (0, 200, 0)}
    for index, name in enumerate(STATISTICS):
        assert measured[:, index] == pytest.approx(expected[name], abs=1e-4)


def test_images_like_the_reference_fill_every_bin_alike_and_others_do_not() -> None:
    rng = np.random.default_rng(0)

    def batch(scale: float) -> np.ndarray:
        return np.stack([toy.draw(str(rng.choice(toy.CLASSES)), rng) * scale for _ in range(600)]).astype(np.uint8)

    limits = edges(batch(1.0))
    same, darker = histogram(batch(1.0), limits), histogram(batch(0.3), limits)
    assert same.sum(axis=1).tolist() == darker.sum(axis=1).tolist() == [600] * 4
    assert (np.abs(same - 600 / BINS) < 50).all()
    assert darker[0, 0] > 300  # brightness: most lie in the lowest tenth


def stability_index(values: dict[str, float], feature: str) -> float:
    """The population stability index of a feature, from the metrics of a server."""
    expected = {
        k: v for k, v in values.items() if k.startswith("classifier_drift_expected_share{") and f'"{feature}"' in k
    }
    assert sum(expected.values()) == pytest.approx(1)
    seen = {k: values.get(k.replace("expected_share", "images_total"), 0.0) for k in expected}
    count = sum(seen.values())
    shares = [(expected[k], max(seen[k] / count, 1e-4)) for k in expected]
    return sum((p - q) * math.log(p / q) for q, p in shares)


def test_a_server_counts_what_it_sees_and_says(server: Server) -> None:
    before = samples(server.url)
    dark = [encode(picture(seed).point(lambda v: v // 6)) for seed in range(40)]
    requests.post(f"{server.url}/classify/batch", files=[("images", i) for i in dark], timeout=60).raise_for_status()
    time.sleep(10 * GATHER_SECONDS)
    after = samples(server.url)
    for feature in ("class", "confidence", *STATISTICS):
        grown = {k: after[k] - before.get(k, 0) for k in after if k.startswith("classifier_drift_images_total{")}
        assert total(grown, "classifier_drift_images_total", feature=feature) == 40
    assert grown['classifier_drift_images_total{bin="0",feature="brightness"}'] > 30
    assert stability_index({**after, **grown}, "brightness") > 1
    assert stability_index(after, "class") >= 0


def test_ordinary_images_do_not_look_drifted(toy_artifact: Artifact, toy_folder: Path) -> None:
    """The index of the training images against the validation images, by the same bins."""
    limits = toy_artifact.reference(quantised=True).edges
    images = np.stack([cv2.imread(str(p), cv2.IMREAD_COLOR_RGB) for p in sorted(toy_folder.glob("*/0[1-6]*.png"))])
    shares = histogram(images, limits) / len(images)
    assert shares.max() < 0.45  # twelve validation images tell ten bins only roughly
