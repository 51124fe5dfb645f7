"""How the detection of foreign images is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from model.artifact import Artifact
from tests import toy
from train.foreign import KINDS, auroc


def test_auroc_of_known_scores() -> None:
    ordinary = np.array([0.4, 0.6, 0.8, 1.0], np.float32)
    assert auroc(ordinary, np.array([0.1, 0.2], np.float32)) == 1
    assert auroc(ordinary, np.array([2.0], np.float32)) == 0
    assert auroc(ordinary, ordinary) == 0.5
    assert auroc(ordinary, np.array([0.7, 0.6], np.float32)) == pytest.approx((2 / 4 + 2.5 / 4) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_images_fit_any_input_size_and_differ(kind: str) -> None:
    rng = np.random.default_rng(0)
    images = [KINDS[kind](rng, (24, 40)) for _ in range(10)]
    assert all(image.shape == (24, 40, 3) and image.dtype == np.uint8 for image in images)
    assert len({image.tobytes() for image in images}) == 10
    assert all(image.std() > 0 for image in images)


def test_the_card_keeps_the_measured_figures(toy_artifact: Artifact, toy_folder: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(toy_artifact.path, tmp_path / "artifact")
    other = toy.make_folder(tmp_path / "other", seed=1)
    assert "not the data of the training" in toy.run("train.foreign", artifact, other, code=1)
    photos = toy.make_folder(tmp_path / "photos", per_class=10)
    (photos / "disc").rename(photos / "elsewhere")
    printed = toy.run("train.foreign", artifact, toy_folder, "--photos", photos)
    found = Artifact.load(artifact).card["metrics"]["foreign"]
    assert found["kinds"]["noise"]["images"] == 500
    assert found["kinds"]["photographs"]["images"] == 10  # those of known classes do not count
    assert found["auroc_mean"] == pytest.approx(np.mean([k["auroc"] for k in found["kinds"].values()]), abs=1e-3)
    assert f"mean AUROC {found['auroc_mean']:.3f}" in printed
    # Of 23 test images it depends on how a processor rounds in training: 0.93 with two threads, 0.88 with one.
    assert found["kinds"]["noise"]["auroc"] > 0.75
