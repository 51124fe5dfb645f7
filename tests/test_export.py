"""From a finished run to an artifact, and what stops an export."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from model.artifact import ONNX, TORCH, Artifact
from tests import toy
from train import data
from train.export import BANK_IMAGES, ParityError, evenly_spaced, parity
from train.runs import RUN


def test_the_artifact_is_small_and_complete_and_has_learned(toy_artifact: Artifact) -> None:
    card = toy_artifact.card
    assert card["validation"]["fp32_accuracy"] >= 0.9
    assert toy_artifact.file(ONNX).stat().st_size < toy_artifact.file(TORCH).stat().st_size, "it refers to them"
    assert card["training"]["command"].startswith("python -m train.fit ")
    assert card["training"]["data_sha256"] == data.load(str(toy_artifact.path.parent / "folder")).sha256()
    assert set(card["versions"]) == {"torch", "onnx", "onnxruntime", "bentoml"}


def test_an_export_that_loses_accuracy_is_refused(loaded: data.Data) -> None:
    right = np.eye(4, dtype=np.float32)[loaded.val.labels]  # the last column is the familiarity
    wrong = right.copy()
    wrong[:2, :3] = np.roll(wrong[:2, :3], 1, axis=1)
    assert parity(right, right, loaded.val)["agreement"] == 1
    with pytest.raises(ParityError, match=f"INT8 accuracy {1 - 2 / len(loaded.val):.4f}"):
        parity(right, wrong, loaded.val)


def test_an_export_that_loses_exactly_the_limit_is_accepted() -> None:
    split = data.Split(np.zeros((1000, 1, 1, 3), np.uint8), np.zeros(1000, np.int64))
    right = np.eye(3, dtype=np.float32)[split.labels]
    wrong = right.copy()
    right[:1, :2] = right[:1, 1::-1]
    wrong[:4, :2] = wrong[:4, 1::-1]
    assert parity(right, wrong, split)["int8_accuracy"] == 0.996
    wrong[4, :2] = wrong[4, 1::-1]
    with pytest.raises(ParityError):
        parity(right, wrong, split)


def test_a_sample_of_images_sorted_by_class_covers_all_classes() -> None:
    sorted_images = np.repeat(np.arange(10, dtype=np.uint8), 100)[:, None, None, None]
    for count in (16, BANK_IMAGES, 1000, 2000):
        chosen = evenly_spaced(sorted_images, count)
        assert len(chosen) == min(count, 1000)
        assert set(np.bincount(chosen.ravel(), minlength=10)) <= {count // 10, count // 10 + 1, 100}


def test_data_with_other_classes_is_refused(toy_run: Path, tmp_path: Path) -> None:
    other = toy.make_folder(tmp_path / "other", per_class=12)
    (other / "disc").rename(other / "zebra")
    printed = toy.run("train.export", toy_run, other, "--out", tmp_path / "out", code=1)
    assert "classes ['frame', 'stripes', 'zebra']; expected ['disc', 'frame', 'stripes']" in printed


def test_changed_files_that_would_mix_the_splits_are_refused(
    toy_folder: Path, toy_run: Path, toy_artifact: Artifact, tmp_path: Path
) -> None:
    grown = shutil.copytree(toy_folder, tmp_path / "grown")
    shutil.copyfile(grown / "disc" / "000.png", grown / "disc" / "more.png")
    out = tmp_path / "out"
    assert "not the data of the training, folder: " in toy.run("train.export", toy_run, grown, "--out", out, code=1)
    assert not out.exists()
    assert "not the data of the training" in toy.run("train.evaluate", toy_artifact.path, grown, code=1)


def test_an_unfinished_run_is_refused(toy_folder: Path, toy_run: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(toy_run, tmp_path / "run")
    (unfinished / RUN).unlink()
    assert "not a finished run" in toy.run("train.export", unfinished, toy_folder, "--out", tmp_path / "a", code=1)
