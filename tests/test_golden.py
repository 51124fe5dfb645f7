"""The shipped artifact on real pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.artifact import ONNX, ONNX_INT8, RUNTIMES, SHIPPED, TORCH, Artifact
from tests import golden as pictures
from tests import toy
from tests.golden import GOLDEN, predict, size
from train import readme
from train.command import CommandError

MAX_DIFFERENCE = {ONNX: 0.001, TORCH: 0.02, ONNX_INT8: 0.1}
"""Maximum difference in probability from the stored FP32 predictions."""


@pytest.fixture(scope="module")
def shipped() -> Artifact:
    return Artifact.load(SHIPPED)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(GOLDEN.read_text())
    return document


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_shipped_models_predictions_have_not_changed(
    runtime: str, shipped: Artifact, golden: dict[str, Any]
) -> None:
    assert golden["version"] == shipped.version
    found = predict(shipped, runtime)
    assert found
    assert found.keys() == golden["probabilities"].keys()
    for name, prediction in found.items():
        assert prediction.class_name == name
        assert np.abs(prediction.probabilities - golden["probabilities"][name]).max() < MAX_DIFFERENCE[runtime]


def test_no_worse_model_is_shipped(shipped: Artifact, golden: dict[str, Any]) -> None:
    """The figures of its card, as measured by train.evaluate on the test images, within the limits set for its data."""
    limits = golden["limits"]
    fp32, int8 = (shipped.card["metrics"][name] for name in (ONNX, ONNX_INT8))
    assert fp32["images"] == int8["images"] >= limits["images"]
    assert fp32["accuracy"] >= limits["accuracy"]
    assert int8["accuracy"] >= fp32["accuracy"] - max(0.003, 1 / fp32["images"])
    assert fp32["ece"] <= limits["ece"]
    assert size(shipped) <= limits["bytes"]


def test_every_other_shipped_model_has_its_advantage(golden: dict[str, Any]) -> None:
    """More accurate or faster, as good in INT8, right on the same pictures; and all models together fit into Git."""
    first, *others = readme.shipped()
    for artifact in others:
        fp32, int8 = (artifact.card["metrics"][name] for name in (ONNX, ONNX_INT8))
        assert fp32["images"] >= golden["limits"]["images"]
        assert int8["accuracy"] >= fp32["accuracy"] - max(0.003, 1 / fp32["images"])
        default = first.card["metrics"][ONNX_INT8]
        faster = int8["speed"]["images_per_s"] > default["speed"]["images_per_s"]
        assert faster or int8["accuracy"] > default["accuracy"]
        assert [name for name, p in predict(artifact, ONNX_INT8).items() if p.class_name != name] == []
    assert sum(map(size, [first, *others])) <= 40e6


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Test pictures and samples of the page, left from a previous model."""
    images, samples = tmp_path / "images", tmp_path / "samples"
    for folder in (images, samples):
        folder.mkdir()
        (folder / "dog.jpg").write_bytes(b"of a model before")
    monkeypatch.setattr(pictures, "FOLDER", images)
    monkeypatch.setattr(pictures, "SAMPLES", samples)
    return images, samples


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pictures_of_new_data_replace_the_old_ones_and_the_samples(
    folders: tuple[Path, Path], toy_artifact: Artifact, toy_folder: Path
) -> None:
    images, samples = folders
    pictures.choose(toy_artifact, str(toy_folder))
    pictures.offer()
    assert contents(images).keys() <= {f"{name}.jpg" for name in toy.CLASSES}
    assert contents(images)
    assert contents(samples) == contents(images)


def test_only_a_few_of_many_pictures_become_samples(folders: tuple[Path, Path]) -> None:
    images, samples = folders
    for number in range(30):
        (images / f"class {number}.jpg").touch()
    pictures.offer()
    assert len(contents(samples)) == pictures.MOST_SAMPLES


def test_pictures_are_kept_if_the_model_recognises_none_of_the_new_ones(
    folders: tuple[Path, Path], toy_artifact: Artifact, toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = pictures.judge
    monkeypatch.setattr(pictures, "judge", lambda *told: [p._replace(in_distribution=False) for p in judge(*told)])
    with pytest.raises(CommandError, match="expected a model that tells some of the test images"):
        pictures.choose(toy_artifact, str(toy_folder))
    assert list(contents(folders[0])) == ["dog.jpg"]
