"""Corruptions and photographs: their effect on images, and the figures computed from them."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.artifact import ONNX_INT8, Artifact, Outputs
from model.preprocess import Pixels
from model.runtimes import create
from tests import toy
from train.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from train.data import Split
from train.robustness import _mean, photographs, robustness, sample

GROWING = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    *("defocus_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    *("snow", "fog", "brightness", "contrast", "jpeg_compression"),
)
"""Corruptions whose published parameters change the pixels more at every severity."""


def draw(count: int) -> Split:
    rng = np.random.default_rng(5)
    labels = np.arange(count) % 3
    return Split(np.stack([toy.draw(toy.CLASSES[label], rng) for label in labels]), labels)


def change(images: Pixels, name: str, severity: int) -> float:
    corrupted = corrupt(images, name, severity, np.random.default_rng(0))
    assert corrupted.shape == images.shape
    assert corrupted.dtype == np.uint8
    return float(np.abs(corrupted.astype(int) - images).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_changes_images_of_any_shape(name: str) -> None:
    wide = np.stack([cv2.resize(image, (72, 48)) for image in draw(6).images])
    assert len(CORRUPTIONS[name].parameters) == len(SEVERITIES)
    assert all(0.3 < change(wide, name, severity) < 100 for severity in SEVERITIES)


@pytest.mark.parametrize("name", GROWING)
def test_corruptions_grow_with_severity_where_published_so(name: str) -> None:
    changes = [change(draw(60).images, name, severity) for severity in SEVERITIES]
    assert all(later > 0.97 * earlier for earlier, later in pairwise(changes))
    assert changes[-1] > 1.1 * changes[0]


class Remembers:
    """Returns the labels of images it has seen, and the first class for any other."""

    name = "remembers"

    def __init__(self, split: Split) -> None:
        self.known = {image.tobytes(): label for image, label in zip(split.images, split.labels, strict=True)}

    def __call__(self, images: Pixels) -> Outputs:
        verdicts = [self.known.get(image.tobytes(), 0) for image in images]
        return np.eye(4, dtype=np.float32)[verdicts]  # the last column is not a class

    def evidence(self, images: Pixels) -> Outputs:
        raise NotImplementedError


def test_figures_are_means_with_intervals_over_images() -> None:
    split = draw(12)
    figures = robustness(Remembers(split), split)
    assert (figures["runtime"], figures["images"]) == ("remembers", 12)
    # Wilson's interval: 12 of 12 do not prove that no error ever occurs.
    assert figures["clean"] == {"accuracy": 1.0, "accuracy_95": [round(12 / (12 + 1.959964**2), 4), 1.0]}
    # A third is right by chance. Each image is always right or always wrong, so its many corruptions count as a single
    # observation: the interval is that of 12.
    assert figures["corruptions"]["contrast"]["by_severity"] == [0.3333] * 5
    assert figures["families"]["noise"]["accuracy"] == pytest.approx(1 / 3, abs=1e-4)
    half = 1.96 * (1 / 3 * 2 / 3 / 11) ** 0.5
    assert figures["families"]["noise"]["accuracy_95"] == pytest.approx([1 / 3 - half, 1 / 3 + half], abs=1e-3)
    families = [family["accuracy"] for family in figures["families"].values()]
    assert figures["accuracy"] == pytest.approx(np.mean(families), abs=1e-4)
    assert {name for name, c in CORRUPTIONS.items() if c.extra} == {"speckle_noise", "gaussian_blur", "saturate"}


def test_all_right_still_gives_an_interval_below_one() -> None:
    assert _mean(np.ones((5, 18))) == {"accuracy": 1.0, "accuracy_95": [round(18 / (18 + 1.959964**2), 4), 1.0]}


def test_the_sample_is_stratified_and_reproducible() -> None:
    split = draw(60)
    assert np.bincount(sample(split, 15).labels).tolist() == [5, 5, 5]
    assert (sample(split, 15).images == sample(split, 15).images).all()
    assert sample(split, 100) is split


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Large pictures of two classes, pictures of another folder, and one broken file."""
    rng = np.random.default_rng(3)
    for name in ("disc", "frame", "foreign"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(4):
            picture = cv2.resize(toy.draw(name if name != "foreign" else "stripes", rng), (96, 96))
            cv2.imwrite(str(tmp_path / "photos" / name / f"{index}.png"), picture)
    (tmp_path / "photos" / "disc" / "broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_photographs_are_counted_by_class_and_other_folders_left_out(photos: Path, toy_artifact: Artifact) -> None:
    figures = photographs(create(ONNX_INT8, toy_artifact), toy_artifact, photos)
    assert (figures["images"], figures["unreadable"], figures["of_other_folders"]) == (8, 1, 4)
    assert {name: of_one["images"] for name, of_one in figures["per_class"].items()} == {"disc": 4, "frame": 4}
    assert figures["accuracy"] == np.mean([of_one["accuracy"] for of_one in figures["per_class"].values()])
    assert figures["accuracy"] >= 0.5


def test_the_command_stores_what_it_prints_beside_other_figures(
    photos: Path, toy_artifact: Artifact, tmp_path: Path
) -> None:
    path = shutil.copytree(toy_artifact.path, tmp_path / "artifact")
    folder = toy_artifact.path.parent / "folder"
    toy.run("train.evaluate", path, folder, "--runtime", ONNX_INT8)
    printed = toy.run("train.robustness", path, folder, "--images", 12, "--photos", photos)
    metrics = Artifact.load(path).card["metrics"]
    assert {ONNX_INT8, "robustness", "photographs"} <= set(metrics)
    assert metrics["robustness"]["images"] == 12
    assert f"mean over the families: {metrics['robustness']['accuracy']:.2%}" in printed
    assert f"photographs of photos: accuracy {metrics['photographs']['accuracy']:.2%}" in printed


@pytest.mark.parametrize("images", [0, -3])
def test_a_sample_of_no_images_is_one_clear_line(images: int, tmp_path: Path) -> None:
    printed = toy.run("train.robustness", tmp_path, tmp_path, "--images", images, code=1)
    assert printed == f"error: --images {images}; expected at least 1\n"


def test_a_folder_without_the_classes_is_one_clear_line(toy_artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "photos" / "zebra").mkdir(parents=True)
    folder = toy_artifact.path.parent / "folder"
    arguments = (toy_artifact.path, folder, "--images", 3, "--photos", tmp_path / "photos")
    printed = toy.run("train.robustness", *arguments, code=1)
    assert "no readable image in a folder named after a class, disc, frame, stripes" in printed
    assert "Traceback" not in printed
