"""Problems with labelled images are found before training on them."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from tests import toy
from tests.live import picture
from train.check import PAIRS_AT_ONCE, check, near_duplicates, perceptual_hashes, print_findings
from train.command import CommandError
from train.data import Data, Split, load
from train.runs import RUN


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train/`` and ``test/``, each with one file that is no image."""
    root = tmp_path_factory.mktemp("clean")
    toy.make_folder(root / "train", per_class=30, seed=1)
    toy.make_folder(root / "test", per_class=8, seed=2)
    return root


def test_clean_data_has_no_findings_but_its_broken_files(clean: Path) -> None:
    findings = check(load(str(clean)))
    assert findings["images"]["test"] == {"disc": 8, "frame": 8, "stripes": 8}
    assert findings["broken"]["count"] == 2
    assert findings["broken"]["examples"][0].startswith("train/disc/broken.png: ")
    assert findings["same_pixels_in_two_splits"]["count"] == 0
    assert findings["same_pixels_two_classes"]["count"] == 0
    assert findings["repeated_within_a_split"] == 0
    assert findings["nearly_in_training"]["test"]["count"] == 0
    assert findings["sizes"] == {"width": [24, 24, 24], "height": [24, 24, 24], "enlarged": 0}


def test_the_counts_of_many_classes_are_one_short_line(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {f"kind {number}": 3 + number % 2 for number in range(1000)}
    print_findings({**check(load(str(clean))), "images": {"train": counts}})
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "  train   3500  1000 classes of 3 to 4"
    assert second == "  balance: the largest class has 1.33 times the smallest"


@pytest.fixture
def flawed(clean: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clean, tmp_path / "flawed")


def test_a_test_image_that_is_also_a_training_image_is_named_with_its_copy(flawed: Path) -> None:
    trained = load(str(flawed)).train.names[0]
    image = cv2.imread(str(flawed / trained))
    cv2.imwrite(str(flawed / "test" / "disc" / "copy.bmp"), image)  # different bytes, same pixels
    findings = check(load(str(flawed)))
    (finding,) = findings["same_pixels_in_two_splits"]["examples"]
    assert finding == f"train {trained} (disc) = test test/disc/copy.bmp (disc)"
    assert findings["repeated_within_a_split"] == findings["nearly_in_training"]["test"]["count"] == 0, "told once"


def test_a_recompressed_brighter_copy_is_reported_as_a_near_duplicate(flawed: Path) -> None:
    trained = load(str(flawed)).train.names[0]
    image = np.clip(cv2.imread(str(flawed / trained)).astype(int) + 6, 0, 255).astype(np.uint8)
    cv2.imwrite(str(flawed / "test" / "disc" / "near.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 80])
    data = load(str(flawed))
    assert near_duplicates(data, "test") == [f"test test/disc/near.jpg (disc) ~ train {trained} (disc)"]
    assert check(data)["same_pixels_in_two_splits"]["count"] == 0


def test_an_image_in_two_classes_is_named(flawed: Path) -> None:
    shutil.copyfile(flawed / "train" / "frame" / "000.png", flawed / "train" / "stripes" / "wrong.png")
    (finding,) = check(load(str(flawed)))["same_pixels_two_classes"]["examples"]
    assert "train/frame/000.png (frame)" in finding
    assert "train/stripes/wrong.png (stripes)" in finding


def test_copies_sizes_and_imbalance_are_reported(flawed: Path) -> None:
    for index in range(3):
        shutil.copyfile(flawed / "test" / "disc" / "000.png", flawed / "test" / "disc" / f"copy{index}.png")
    cv2.imwrite(str(flawed / "train" / "disc" / "small.png"), np.full((9, 50, 3), 7, np.uint8))
    findings = check(load(str(flawed)))
    assert findings["repeated_within_a_split"] == 3
    assert findings["images"]["test"]["disc"] == 11
    assert findings["sizes"] == {"width": [24, 24, 50], "height": [9, 24, 24], "enlarged": 1}


@pytest.mark.parametrize(("kind", "zoom"), [("JPEG", 1), ("JPEG", 8), ("PNG", 1)])
def test_sizes_are_those_after_exif_rotation(kind: str, zoom: int, tmp_path: Path) -> None:
    """Upright photographs, stored on their side. Those of 768 pixels are decoded at half the size."""
    seeds = itertools.count()
    for split, name, orientation in itertools.product(("train", "test"), toy.CLASSES, (6, 8, 6, 8)):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        folder = tmp_path / split / name
        folder.mkdir(parents=True, exist_ok=True)
        stored = picture(seed := next(seeds), 80 * zoom, 96 * zoom)
        stored.save(folder / f"{seed}.{kind.lower()}", exif=exif)
    sizes = check(load(str(tmp_path), (90, 76)))["sizes"]
    assert sizes == {"width": [80 * zoom] * 3, "height": [96 * zoom] * 3, "enlarged": 0}


def test_only_data_that_makes_results_meaningless_is_refused(clean: Path) -> None:
    data = load(str(clean))
    with pytest.raises(CommandError, match="24 of 24 test images are training images as well"):
        check(replace(data, test=replace(data.train, **{k: v[:24] for k, v in vars(data.train).items()})))
    half = {name: [*value[:12], *vars(data.test)[name][:12]] for name, value in vars(data.train).items()}
    arrays = {name: np.asarray(half[name]) for name in ("images", "labels")}
    assert check(replace(data, test=Split(**{**half, **arrays})))["same_pixels_in_two_splits"]["count"] == 12
    doubled = {name: np.concatenate([value, value]) for name, value in vars(data.train).items() if name != "labels"}
    labels = np.concatenate([data.train.labels, (data.train.labels + 1) % 3])
    with pytest.raises(CommandError, match="training images are in two classes"):
        check(replace(data, train=replace(data.train, **doubled, labels=labels)))


def test_test_images_that_repeat_only_validation_images_are_just_a_finding(clean: Path) -> None:
    data = load(str(clean))
    findings = check(replace(data, test=data.val))
    assert findings["same_pixels_in_two_splits"]["count"] == len(data.val)


def test_among_equal_hashes_the_nearest_pixels_win() -> None:
    """The hash ignores brightness: the first training image has very different pixels."""
    image = np.random.default_rng(0).integers(0, 150, (32, 32, 3), np.uint8)
    images = np.stack([image + 100, image + 2])
    train = Split(images, np.array([0, 1]), ("far", "near"), ((32, 32),) * 2)
    test = Split(image[None], np.array([1]), ("test",), ((32, 32),))
    assert len(set(perceptual_hashes(np.stack([image, *images])).tolist())) == 1
    data = Data("", ("a", "b"), train, test, test)
    assert near_duplicates(data, "test") == ["test test (b) ~ train near (b)"]


def test_of_many_images_those_that_are_near_duplicates_are_named() -> None:
    """Of so many that their hashes are compared in parts."""
    count = math.isqrt(PAIRS_AT_ONCE) + 10
    images = np.random.default_rng(0).integers(0, 250, (count, 8, 8, 3), np.uint8)
    names, sizes = tuple(map(str, range(count))), ((8, 8),) * count
    train = Split(images, np.zeros(count, np.int64), names, sizes)
    changed = images.copy()
    changed[-1] += 2
    data = Data("", ("a", "b"), train, train, replace(train, images=changed))
    assert near_duplicates(data, "test") == [f"test {count - 1} (a) ~ train {count - 1} (a)"]


def test_training_records_the_findings_that_the_command_prints(toy_folder: Path, toy_run: Path) -> None:
    printed = toy.run("train.check", toy_folder)
    assert "broken files: 1\n    disc/broken.png: " in printed
    assert json.loads((toy_run / RUN).read_text())["check"] == check(load(str(toy_folder)))


def test_every_broken_file_is_named_on_request(flawed: Path) -> None:
    for index in range(7):
        (flawed / "test" / "disc" / f"broken{index}.jpg").write_bytes(b"broken")
    few, every = toy.run("train.check", flawed), toy.run("train.check", flawed, "--all")
    assert "broken files: 9\n" in few
    assert few.count("/broken") == 5
    assert "    and 4 more: python -m train.check --all names them\n" in few
    assert every.count("/broken") == 9
    assert "more:" not in every
