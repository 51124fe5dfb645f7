"""The figures of an artifact: how they are computed, measured and recorded."""

from __future__ import annotations

import math
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.artifact import Artifact
from model.store import SHIPPED
from tests import toy
from tests.live import Server
from train.evaluate import cpu_name, print_report
from train.metrics import (
    ECE_BINS,
    Reliability,
    accuracy_interval,
    calibration_error_by_chance,
    confusion_matrix,
    expected_calibration_error,
    reliability,
)


def test_every_runtime_is_measured_and_recorded_in_the_card(
    toy_artifact: Artifact, toy_folder: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(toy_artifact.path, tmp_path / "artifact")
    printed = toy.run("train.evaluate", path, toy_folder)
    metrics = Artifact.load(path).card["metrics"]
    count = toy_artifact.card["training"]["images"]["test"]
    assert set(metrics) == {"torch", "onnx", "onnx-int8"}
    for name, figures in metrics.items():
        assert figures["images"] == count
        assert np.sum(figures["confusion"]) == count
        assert figures["accuracy"] >= 0.9
        assert figures["speed"]["images_per_s"] > 0
        images, confidence, right = (np.array(values) for values in figures["reliability"].values())
        assert images.sum() == count
        assert (images * right).sum() == pytest.approx(figures["accuracy"] * count, abs=0.01)
        assert (images * abs(confidence - right)).sum() / count == pytest.approx(figures["ece"], abs=1e-3)
        assert f"{name}: accuracy {figures['accuracy']:.2%}" in printed


def test_a_thousand_classes_are_printed_in_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    classes = tuple(f"kind {number}" for number in range(1000))
    shipped = Artifact.load(SHIPPED)
    many = replace(shipped, config=shipped.config.model_copy(update={"classes": classes}))
    recall = {name: 0.25 if name == "kind 7" else 1.0 for name in classes}
    figures = {**shipped.metrics["onnx-int8"], "per_class": recall, "confusion": np.eye(1000, dtype=int).tolist()}
    print_report("onnx-int8", figures, many)
    printed = capsys.readouterr().out
    assert len(printed) < 2_000
    assert printed.index("the 20 lowest of 1000 classes") < printed.index("kind 7    25.00%") < printed.index("100.00%")


def test_figures_of_known_answers() -> None:
    # Wilson's interval for 81 of 263, as worked in Newcombe, 1998, Statistics in Medicine 17:857.
    assert accuracy_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    labels, verdicts = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert confusion_matrix(verdicts, labels, 2).tolist() == [[1, 1], [0, 2]]
    sure = np.array([[0.8, 0.2]] * 10, np.float32)
    assert expected_calibration_error(sure, np.array([0] * 8 + [1] * 2)) == pytest.approx(0, abs=1e-6)
    assert expected_calibration_error(sure, np.array([0] * 5 + [1] * 5)) == pytest.approx(0.3, abs=1e-6)
    certain = reliability(np.array([[1, 0]], np.float32), np.array([0]))
    assert certain.images.tolist() == certain.accuracy.tolist() == [0] * (ECE_BINS - 1) + [1]


def test_intervals_stay_between_0_and_1() -> None:
    """Despite floating point."""
    assert accuracy_interval(0, 37)[0] == 0
    assert accuracy_interval(37, 37)[1] == 1
    for count in range(1, 100):
        assert accuracy_interval(0, count)[0] >= 0
        assert accuracy_interval(count, count)[1] <= 1


def test_the_calibration_error_by_chance_averages_over_all_outcomes() -> None:
    images, confidence = np.array([1, 0, 7, 20, 3]), np.array([0.25, 0.0, 0.6, 0.8, 1.0])
    deviation = sum(
        math.comb(n, hits) * p**hits * (1 - p) ** (n - hits) * abs(hits - n * p)
        for n, p in zip(images.tolist(), confidence.tolist(), strict=True)
        for hits in range(n + 1)
    )
    found = Reliability(images, confidence, confidence)
    assert calibration_error_by_chance(found) == pytest.approx(deviation / images.sum())


def test_the_cpu_is_named_with_the_features_that_speed_up_int8() -> None:
    x86 = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_vnni sse\nbugs\t\t: amx_int8\n"
    assert cpu_name(x86) == "Some CPU @ 2 GHz (avx512_vnni)"
    assert cpu_name(x86.replace("avx512_vnni", "")) == "Some CPU @ 2 GHz (avx2)"
    assert cpu_name("processor\t: 0\nFeatures\t: fp asimddp\n") == f"{platform.machine()} (asimddp)"


def test_a_service_with_other_classes_is_one_clear_line(toy_artifact: Artifact, embedded: Server) -> None:
    folder = toy_artifact.path.parent / "folder"
    printed = toy.run("train.evaluate", toy_artifact.path, folder, "--url", embedded.url, code=1)
    assert printed.startswith(f"error: {embedded.url}: serves classes ['airplane', ")
    assert printed.endswith("; expected ['disc', 'frame', 'stripes']\n")


def test_an_unreachable_service_is_one_clear_line(toy_artifact: Artifact) -> None:
    folder = toy_artifact.path.parent / "folder"
    printed = toy.run("train.evaluate", toy_artifact.path, folder, "--url", "http://127.0.0.1:9", code=1)
    assert "error: http://127.0.0.1:9: " in printed
    assert "Traceback" not in printed


def test_cifar10_cannot_be_sent_to_a_service(toy_artifact: Artifact) -> None:
    printed = toy.run("train.evaluate", toy_artifact.path, "cifar10", "--url", "http://127.0.0.1:9", code=1)
    assert printed == "error: 'cifar10' has no files to send; expected a folder or a tar archive\n"
