"""Labelled images in memory: their statistics and hash, and what cannot be loaded."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.artifact import Outputs
from model.preprocess import Pixels
from tests import toy
from tests.training import train_on
from train import data
from train.command import CommandError
from train.measure import run_runtime
from train.robustness import corrupted
from train.to_onnx import Calibration


def test_statistics_and_hash_follow_from_the_content(loaded: data.Data) -> None:
    mean, std = loaded.channel_statistics()
    pixels = loaded.train.images.reshape(-1, 3).astype(float)
    assert np.allclose(mean, pixels.mean(0), atol=0.001)
    assert np.allclose(std, pixels.std(0), atol=0.001)
    assert loaded.sha256() == data.load(loaded.source).sha256()
    images = loaded.train.images.copy()
    images[0, 0, 0, 0] ^= 1
    assert replace(loaded, train=replace(loaded.train, images=images)).sha256() != loaded.sha256()
    labels = loaded.train.labels[::-1]
    assert replace(loaded, train=replace(loaded.train, labels=labels)).sha256() != loaded.sha256()
    assert replace(loaded, classes=loaded.classes[::-1]).sha256() != loaded.sha256()


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(40, 90), (90, 45), (300, 300)], 48),
        ([(10, 10)], 16),
        ([(900, 600)], 224),
    ],
)
def test_the_input_is_a_square_with_the_median_shorter_side(
    sizes: list[tuple[int, int]], side: int, tmp_path: Path
) -> None:
    for split, name in itertools.product(("train", "val", "test"), ("a", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        for index, size in enumerate(sizes if split == "train" else [(80, 80)]):
            Image.new("RGB", size).save(tmp_path / split / name / f"{index}.png")
    assert data.load(str(tmp_path)).input_size == (side, side)


@pytest.mark.parametrize(
    ("size", "told"), [(None, "no training image could be read"), ((24, 24), "no readable image among 6 files")]
)
def test_a_folder_without_any_image_is_one_clear_line(size: tuple[int, int] | None, told: str, tmp_path: Path) -> None:
    for name, index in itertools.product(("a", "b"), range(3)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{index}.png").write_bytes(b"broken")
    with pytest.raises(CommandError, match=told):
        data.load(str(tmp_path), size)


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[..., 0] = np.arange(8) * 30
    split = data.Split(images, np.zeros(4, np.int64))
    _, std = data.Data("", ("a", "b"), split, split, split).channel_statistics()
    assert std[0] > 60
    assert std[1:] == (1, 1)


def test_unreadable_files_are_counted_and_named(loaded: data.Data) -> None:
    assert len(loaded.skipped) == 1
    assert loaded.skipped[0].startswith("disc/broken.png: ")


def test_a_class_name_that_is_not_utf8_is_one_clear_line(toy_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(toy_folder, tmp_path / "source")
    (source / "disc").rename(source / os.fsdecode(b"caf\xe9"))
    with pytest.raises(CommandError, match=r"the folder 'caf\\udce9'; expected a name in UTF-8"):
        data.load(str(source))


def test_cifar10_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    offline = {
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "PYTHONPATH": str(toy.ROOT),
    }
    command = [sys.executable, "-m", "train.check", "cifar10"]
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cifar10: cannot be downloaded")
    assert "Traceback" not in done.stderr


def test_images_that_exceed_memory_are_one_clear_line(toy_folder: Path) -> None:
    printed = train_on(toy_folder, Path("run"), "--size", 40_000, code=1)
    assert re.search(r"images of 40000x40000 pixels take [\d.]+ GiB of memory; expected at most [\d.]+, which", printed)
    assert "Traceback" not in printed


def test_large_images_are_evaluated_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [data.batch_of((side, side), 100) for side in (24, 224, 4000)] == [100, 41, 1]
    seen: list[int] = []
    images = np.zeros((50, 224, 224, 3), np.uint8)

    class Counts:
        name = "counts"

        def __call__(self, batch: Pixels) -> Outputs:
            seen.append(len(batch))
            return np.zeros((len(batch), 3), np.float32)

        def evidence(self, batch: Pixels) -> Outputs:
            raise NotImplementedError

    run_runtime(Counts(), images)
    calibration = Calibration(images)
    while batch := calibration.get_next():
        seen.append(len(batch["images"]))
    monkeypatch.setattr("train.robustness.corrupt", lambda batch, *_: (seen.append(len(batch)), batch)[1])
    corrupted(images, "fog", 1)
    assert seen == [41, 9, 25, 25, 41, 9]
