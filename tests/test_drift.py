"""Counts that reveal, without labels, a change in what users send or in what they are answered."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import requests

from model.artifact import ONNX_INT8, SHIPPED, Artifact, Reference
from model.classifier import Classifier
from model.preprocess import Pixels
from model.statistics import BINS, STATISTICS, edges, histogram, measure
from serving import metrics
from serving.drift import GATHER_SECONDS, Drift, expectations
from tests import toy
from tests.live import Server, encode, picture, samples, total
from tests.snippets import of_the_example
from train import data


def test_statistics_of_known_images() -> None:
    black, red = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::2] = 100
    measured = measure(np.stack([black, red, stripes]))
    expected = {"brightness": (0, 0, 50), "contrast": (0, 0, 50), "sharpness": (0, 0, 100), "colour": (0, 200, 0)}
    for index, name in enumerate(STATISTICS):
        assert measured[:, index] == pytest.approx(expected[name], abs=1e-4)


def draw(count: int, seed: int) -> Pixels:
    rng = np.random.default_rng(seed)
    return np.stack([toy.draw(str(rng.choice(toy.CLASSES)), rng) for _ in range(count)])


def test_images_like_the_reference_fill_all_bins_evenly_and_others_do_not() -> None:
    limits = edges(draw(600, seed=0))
    same, darker = histogram(draw(600, seed=1), limits), histogram((draw(600, seed=2) * 0.3).astype(np.uint8), limits)
    assert same.sum(axis=1).tolist() == darker.sum(axis=1).tolist() == [600] * 4
    assert (np.abs(same - 600 / BINS) < 50).all()
    assert darker[0, 0] > 300  # brightness: most are in the lowest tenth


def stability_index(values: dict[str, float], feature: str) -> float:
    """The population stability index of a feature, computed from a server's metrics."""
    expected = {
        k: v for k, v in values.items() if k.startswith("classifier_drift_expected_share{") and f'"{feature}"' in k
    }
    assert sum(expected.values()) == pytest.approx(1)
    seen = {k: values.get(k.replace("expected_share", "images_total"), 0.0) for k in expected}
    count = sum(seen.values())
    shares = [(expected[k], max(seen[k] / count, 1e-4)) for k in expected]
    return sum((p - q) * math.log(p / q) for q, p in shares)


@of_the_example
def test_a_server_counts_what_it_sees_and_answers(server: Server) -> None:
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
    """The bins come from the training images: with only twelve validation images, they would be left to chance."""
    limits = toy_artifact.reference(ONNX_INT8).edges
    assert np.array_equal(limits, edges(data.load(str(toy_folder)).train.images))
    shares = histogram(draw(600, seed=1), limits) / 600
    indices = ((shares - 1 / BINS) * np.log(shares * BINS)).sum(axis=1)
    assert indices.max() < 0.25  # the alert's threshold


def expected_of(reference: Reference) -> set[str]:
    metrics.EXPECTED_SHARE.clear()
    Drift(Artifact.load(SHIPPED).config, reference)
    (family,) = metrics.EXPECTED_SHARE.collect()
    return {sample.labels["feature"] for sample in family.samples}


def reference_of(images: int) -> Reference:
    """The shipped model's reference, resized to ``images`` validation images."""
    whole = Artifact.load(SHIPPED).reference(ONNX_INT8)
    outputs = np.resize(whole.validation, (images, whole.validation.shape[1]))
    return whole._replace(labels=np.resize(whole.labels, images), validation=outputs)


def test_few_validation_images_give_no_expectation_left_to_chance() -> None:
    for count, expected in ((9, {"class"}), (99, {"class", *STATISTICS}), (100, {"class", "confidence", *STATISTICS})):
        assert expected_of(reference_of(count)) == expected


def test_a_feature_with_many_ties_has_no_expected_share() -> None:
    """18 % of the training images are gray: the lowest bin of colour expects a tenth, but 18 % would fall into it."""
    gray = draw(600, seed=0)
    gray[:108] = gray[:108, ..., :1]
    assert (np.diff(edges(gray)) > 0).all()
    assert expected_of(reference_of(100)._replace(edges=edges(gray))) == {"class", "confidence", *STATISTICS[:-1]}


def counted() -> Counter[tuple[str, str]]:
    """Images counted so far, by feature and bin."""
    (family,) = metrics.DRIFT_IMAGES.collect()
    labelled = [(sample.labels, sample.value) for sample in family.samples if sample.name.endswith("_total")]
    return Counter({(labels["feature"], labels["bin"]): int(value) for labels, value in labelled})


def count(drift: Drift, *batches: Pixels) -> dict[str, int]:
    """How many of the images in ``batches`` are counted for each statistic."""

    async def see() -> None:
        for images in batches:
            drift.count_images(images)
        await asyncio.sleep(5 * GATHER_SECONDS)

    before = counted()
    asyncio.run(see())
    grown = counted() - before
    return {name: sum(count for (feature, _), count in grown.items() if feature == name) for name in STATISTICS}


def test_verdicts_on_the_validation_images_are_counted_as_expected() -> None:
    config = Artifact.load(SHIPPED).config
    for images in (99, 1000):  # too few to expect anything of confidences, and enough
        reference = reference_of(images)
        drift, before = Drift(config, reference), counted()
        for prediction in Classifier(config, reference)(reference.validation):
            drift.count_verdict(prediction)
        expected = {
            (feature, name): count
            for feature, counts in expectations(config, reference).items()
            for name, count in counts.items()
            if feature not in STATISTICS and count
        }
        assert dict(counted() - before) == expected


def test_a_constant_feature_is_neither_expected_nor_counted() -> None:
    """The colour of gray images is 0: nine edges tie, and every image would land in a bin meant for a tenth of them."""
    gray = np.repeat(draw(100, seed=0)[..., :1], 3, axis=-1)
    metrics.EXPECTED_SHARE.clear()
    drift = Drift(Artifact.load(SHIPPED).config, reference_of(100)._replace(edges=edges(gray)))
    (family,) = metrics.EXPECTED_SHARE.collect()
    assert {sample.labels["feature"] for sample in family.samples} == {"class", "confidence", *STATISTICS[:-1]}
    assert count(drift, gray) == {**dict.fromkeys(STATISTICS, 100), "colour": 0}


def test_batches_that_come_together_and_images_of_any_size_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    drift = Drift(Artifact.load(SHIPPED).config, reference_of(100))
    assert count(drift, draw(3, seed=0), draw(2, seed=1), draw(1, seed=2)) == dict.fromkeys(STATISTICS, 6)
    assert count(drift, np.zeros((2, 600, 600, 3), np.uint8)) == dict.fromkeys(STATISTICS, 2)
    assert not caplog.records
