"""Which images are held out from training: drawn by their content, or those in folders named after a split."""

from __future__ import annotations

import hashlib
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import toy
from tests.live import encode
from train import data
from train.command import CommandError
from train.splits import SPLITS, arrange

DOT = encode(Image.new("RGB", (1, 1)))
"""The smallest image; bytes appended to it make it a different file."""


def test_a_flat_folder_is_split_within_each_class_without_overlap(loaded: data.Data) -> None:
    assert loaded.classes == toy.CLASSES
    assert loaded.input_size == (toy.SIDE, toy.SIDE)
    # About a tenth of the 80 images, and about a twentieth of the rest.
    for split, least, most in ((loaded.test, 4, 14), (loaded.val, 1, 9), (loaded.train, 60, 74)):
        counts = np.bincount(split.labels)
        assert least <= counts.min() <= counts.max() <= most
    everything = np.concatenate([loaded.train.images, loaded.val.images, loaded.test.images])
    assert len({image.tobytes() for image in everything}) == 240


def test_a_folder_that_grew_or_was_renamed_keeps_its_splits(
    loaded: data.Data, toy_folder: Path, tmp_path: Path
) -> None:
    grown = shutil.copytree(toy_folder, tmp_path / "flowers")
    toy.make_folder(tmp_path / "more", per_class=60, seed=1)
    for path in (tmp_path / "more").rglob("*.png"):
        path.rename(grown / path.parent.name / f"0-{path.name}")  # sorts before all others of its class
    (grown / "disc").rename(grown / "zebra")
    (grown / "zebra" / "007.png").rename(grown / "zebra" / "another.png")
    found = data.load(str(grown))
    assert len(found.train) + len(found.val) + len(found.test) == 3 * 140
    for name in ("train", "val", "test"):
        assert set(getattr(loaded, name).digests) <= set(getattr(found, name).digests), name


def test_adding_files_moves_no_training_image_into_a_held_out_split() -> None:
    """Not even in a class without any low digest, of which the image with the lowest is held out."""
    lone = 0
    for start in range(0, 2000, 50):
        names = [f"a/{i}" for i in range(start, start + 50)]
        splits = [arrange("", {name: DOT + name.encode() for name in names[:count]}) for count in range(10, 51)]
        for smaller, larger in pairwise(splits):
            assert set(smaller.train) <= set(larger.train)
        lone += len(splits[0].test) == len(splits[0].val) == 1
    assert lone


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_class_with_few_images_has_one_in_each_split(count: int) -> None:
    for start in range(0, 60_000, count):
        files = {f"a/{i}": DOT + i.to_bytes(2) for i in range(start, start + count)}
        arranged = arrange("", files)
        assert all(arranged[:3])
        assert sorted(arranged.train + arranged.val + arranged.test) == sorted(files)


def test_a_file_that_is_no_image_takes_no_images_place(tmp_path: Path) -> None:
    """By its digest, it could be the only test image of a small class."""
    toy.make_folder(tmp_path / "shapes", per_class=6)
    for number in range(20):
        (tmp_path / "shapes" / "disc" / "Thumbs.db").write_text(f"thumbs {number}")
        found = data.load(str(tmp_path / "shapes"))
        assert any(name.startswith("disc/Thumbs.db: ") for name in found.skipped)


def test_a_folder_too_small_for_three_splits_is_one_clear_line(toy_folder: Path, tmp_path: Path) -> None:
    for name in toy.CLASSES:
        (tmp_path / name).mkdir()
        for file in sorted((toy_folder / name).iterdir())[:2]:
            shutil.copy(file, tmp_path / name)
    with pytest.raises(CommandError, match="validation and test take all 6 files; expected 3 and more of each class"):
        data.load(str(tmp_path))


def test_a_folder_of_validation_images_is_the_validation_split(toy_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in toy.CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
    for path in toy_folder.rglob("*.png"):
        split = {"7": "test", "3": "val"}.get(path.stem[-1], "train")
        shutil.copy(path, tmp_path / split / path.parent.name)
    found = data.load(str(tmp_path))
    assert (len(found.train), len(found.val), len(found.test)) == (192, 24, 24)
    assert {name.split("/")[0] for name in found.val.names} == {"val"}


def test_the_validation_images_of_the_shipped_models_never_change() -> None:
    """Drawn by position from 5,000 training images per class: the models were trained on all the others."""
    files = {f"{split}/{name}/{i:04}": b"" for split in ("train", "test") for name in range(10) for i in range(5000)}
    arranged = arrange("", files)
    assert len(arranged.val) == 2500
    drawn = hashlib.sha256("\n".join(arranged.val).encode()).hexdigest()
    assert drawn == "2985315fddb0e3c68a4ea6147a54a9117b9462dec8dc5dc4f6baefbe87b3fc21"


def test_the_images_held_out_of_a_flat_folder_never_change() -> None:
    """A training may continue from a network that an earlier version trained on all the others."""
    arranged = arrange("", {f"a/{i:04}": DOT + i.to_bytes(2) for i in range(5000)})
    assert (len(arranged.val), len(arranged.test)) == (229, 526)
    drawn = hashlib.sha256("\n".join([*arranged.val, *arranged.test]).encode()).hexdigest()
    assert drawn == "d788575b573f23fad91711dfc84d75597b5be745685651b5729768fe49ce1d19"


@pytest.mark.parametrize("names", [("Train", "Val", "Test"), ("TRAINING", "Valid", "Testing")])
def test_split_names_are_recognised_in_any_case(toy_folder: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    """Taken for a flat folder, most of the given test images would become training images."""
    for name in names:
        shutil.copytree(toy_folder, tmp_path / name)
    found = data.load(str(tmp_path))
    for name, split in zip(names, (found.train, found.val, found.test), strict=True):
        assert {path.split("/")[0] for path in split.names} == {name}


@pytest.mark.parametrize("name", ["test", "Validation"])
def test_a_split_beside_images_outside_any_split_is_refused(toy_folder: Path, tmp_path: Path, name: str) -> None:
    """Taken for one folder of classes, most of its images would become training images."""
    shutil.copytree(toy_folder, tmp_path / "training_set")
    shutil.copytree(toy_folder, tmp_path / name)
    with pytest.raises(CommandError, match=f"found {SPLITS[name.lower()]}/ but no train/; expected both"):
        data.load(str(tmp_path))


def test_images_outside_the_splits_classes_are_reported(toy_folder: Path, tmp_path: Path) -> None:
    for name in ("train", "test", "dev"):
        shutil.copytree(toy_folder, tmp_path / name)
    shutil.copytree(toy_folder / "disc", tmp_path / "train" / "disc" / "from phone")
    found = data.load(str(tmp_path))
    told = {name.rpartition("/")[0] for name in found.skipped if "in a folder that is no class of a split" in name}
    assert told == {*(f"dev/{name}" for name in toy.CLASSES), "train/disc/from phone"}


def test_a_folder_without_images_inside_a_class_is_refused(tmp_path: Path) -> None:
    toy.make_folder(tmp_path / "flowers", per_class=12)
    (tmp_path / "flowers" / "disc" / "LICENSE").mkdir()
    (tmp_path / "flowers" / "disc" / "LICENSE" / "text.txt").write_text("free")
    with pytest.raises(CommandError, match="no training image of LICENSE"):
        data.load(str(tmp_path / "flowers"))


@pytest.mark.parametrize(("split", "told"), [("test", "test"), ("val", "validation")])
def test_a_class_without_test_or_validation_images_is_refused(tmp_path: Path, split: str, told: str) -> None:
    for name in ("train", "val", "test"):
        toy.make_folder(tmp_path / name, per_class=6)
    shutil.rmtree(tmp_path / split / "frame")
    with pytest.raises(CommandError, match=f"no {told} image of frame"):
        data.load(str(tmp_path))
