"""Training on a folder with other classes, from data to artifact, through the commands that users type."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from model.artifact import CONFIG, ONNX, TORCH, Artifact, Outputs
from model.classifier import fit_temperature
from model.network import ConvNet, ServedNet
from model.preprocess import MAX_PIXELS, Pixels, preprocess
from tests import toy
from tests.live import Server, encode
from train import command, data, precision
from train.augment import Augmented
from train.command import CommandError
from train.evaluate import cpu_name
from train.export import BANK_IMAGES, ParityError, evenly_spaced, load_run, parity
from train.fit import Fit
from train.measure import run_runtime
from train.metrics import (
    Reliability,
    accuracy_interval,
    calibration_error_by_chance,
    confusion_matrix,
    expected_calibration_error,
)
from train.muon import Muon, orthogonalize
from train.options import build_config, choose_batch_size, parse
from train.parallel import ALONE
from train.recipe import Recipe
from train.robustness import corrupted
from train.runs import CHECKPOINT, RUN, Trained, read_record, read_weights, write_weights
from train.sources import read_files
from train.splits import SPLITS, arrange
from train.strips import WIDEST_MAP, StripConv2d, use_strips
from train.to_onnx import Calibration

DOT = encode(Image.new("RGB", (1, 1)))
"""The smallest image; bytes appended to it make it a different file."""


@pytest.fixture(scope="module")
def loaded(toy_folder: Path) -> data.Data:
    return data.load(str(toy_folder))


def begin(source: data.Data, out: Path, **recipe: Any) -> Fit:
    """A run of a small network that has not trained yet."""
    chosen = Recipe(**{"batch_size": 32, "widths": "8,32", "depth": 2, **recipe})
    return Fit(build_config("toy", source, chosen), source, chosen, out, torch.device("cpu"), ALONE)


def train_on(source: Path, out: Path, *options: object, name: str = "toy", code: int = 0) -> str:
    """Run ``python -m train.fit`` with the recipe of ``toy_run``, unless ``options`` say otherwise."""
    return toy.run("train.fit", source, "--name", name, "--out", out, *toy.RECIPE, *options, code=code)


class TestData:
    def test_a_flat_folder_is_split_within_each_class_without_overlap(self, loaded: data.Data) -> None:
        assert loaded.classes == toy.CLASSES
        assert loaded.input_size == (toy.SIDE, toy.SIDE)
        # About a tenth of the 80 images, and about a twentieth of the rest.
        for split, least, most in ((loaded.test, 4, 14), (loaded.val, 1, 9), (loaded.train, 60, 74)):
            counts = np.bincount(split.labels)
            assert least <= counts.min() <= counts.max() <= most
        everything = np.concatenate([loaded.train.images, loaded.val.images, loaded.test.images])
        assert len({image.tobytes() for image in everything}) == 240

    def test_a_folder_that_grew_or_was_renamed_keeps_its_splits(
        self, loaded: data.Data, toy_folder: Path, tmp_path: Path
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

    def test_adding_files_moves_no_training_image_into_a_held_out_split(self) -> None:
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
    def test_a_class_with_few_images_has_one_in_each_split(self, count: int) -> None:
        for start in range(0, 60_000, count):
            files = {f"a/{i}": DOT + i.to_bytes(2) for i in range(start, start + count)}
            arranged = arrange("", files)
            assert all(arranged[:3])
            assert sorted(arranged.train + arranged.val + arranged.test) == sorted(files)

    def test_the_validation_images_of_the_shipped_models_never_change(self) -> None:
        """Drawn by position from 5,000 training images per class: the models were trained on all the others."""
        files = {
            f"{split}/{name}/{i:04}": b"" for split in ("train", "test") for name in range(10) for i in range(5000)
        }
        arranged = arrange("", files)
        assert len(arranged.val) == 2500
        drawn = hashlib.sha256("\n".join(arranged.val).encode()).hexdigest()
        assert drawn == "2985315fddb0e3c68a4ea6147a54a9117b9462dec8dc5dc4f6baefbe87b3fc21"

    def test_unreadable_files_are_counted_and_named(self, loaded: data.Data) -> None:
        assert len(loaded.skipped) == 1
        assert loaded.skipped[0].startswith("disc/broken.png: ")

    def test_an_archive_with_splits_gives_the_same_images(self, toy_folder: Path, tmp_path: Path) -> None:
        archive = tmp_path / "toy.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for path in sorted(toy_folder.rglob("*.png")):
                split = "test" if path.stem.endswith("7") else "train"
                tar.add(path, f"{split}/{path.parent.name}/{path.name}")
        split = data.load(str(archive))
        assert (len(split.train), len(split.val), len(split.test)) == (204, 12, 24)
        first = preprocess((toy_folder / "disc" / "007.png").read_bytes(), split.input_size, MAX_PIXELS)
        assert any((image == first).all() for image in split.test.images)

    def test_statistics_and_hash_depend_on_the_pixels(self, loaded: data.Data) -> None:
        mean, std = loaded.channel_statistics()
        pixels = loaded.train.images.reshape(-1, 3).astype(float)
        assert np.allclose(mean, pixels.mean(0), atol=0.001)
        assert np.allclose(std, pixels.std(0), atol=0.001)
        assert loaded.sha256() == data.load(loaded.source).sha256()
        images = loaded.train.images.copy()
        images[0, 0, 0, 0] ^= 1
        assert replace(loaded, train=replace(loaded.train, images=images)).sha256() != loaded.sha256()

    @pytest.mark.parametrize("names", [("Train", "Val", "Test"), ("TRAINING", "Valid", "Testing")])
    def test_split_names_are_recognised_in_any_case(
        self, toy_folder: Path, tmp_path: Path, names: tuple[str, ...]
    ) -> None:
        """Taken for a flat folder, most of the given test images would become training images."""
        for name in names:
            shutil.copytree(toy_folder, tmp_path / name)
        found = data.load(str(tmp_path))
        for name, split in zip(names, (found.train, found.val, found.test), strict=True):
            assert {path.split("/")[0] for path in split.names} == {name}

    def test_an_empty_folder_is_reported(self, toy_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(toy_folder, tmp_path / "images")
        (tmp_path / "images" / "lost").mkdir()
        found = data.load(str(tmp_path / "images"))
        assert "lost: an empty folder" in found.skipped
        assert "lost" not in found.classes

    def test_images_outside_the_splits_classes_are_reported(self, toy_folder: Path, tmp_path: Path) -> None:
        for name in ("train", "test", "dev"):
            shutil.copytree(toy_folder, tmp_path / name)
        shutil.copytree(toy_folder / "disc", tmp_path / "train" / "disc" / "from phone")
        found = data.load(str(tmp_path))
        told = {name.rpartition("/")[0] for name in found.skipped if "in a folder that is no class of a split" in name}
        assert told == {*(f"dev/{name}" for name in toy.CLASSES), "train/disc/from phone"}

    @pytest.mark.parametrize("name", ["test", "Validation"])
    def test_a_split_beside_images_outside_any_split_is_refused(
        self, toy_folder: Path, tmp_path: Path, name: str
    ) -> None:
        """Taken for one folder of classes, most of its images would become training images."""
        shutil.copytree(toy_folder, tmp_path / "training_set")
        shutil.copytree(toy_folder, tmp_path / name)
        with pytest.raises(CommandError, match=f"found {SPLITS[name.lower()]}/ but no train/; expected both"):
            data.load(str(tmp_path))

    def test_a_file_that_is_no_image_takes_no_images_place(self, tmp_path: Path) -> None:
        """By its digest, it could be the only test image of a small class."""
        toy.make_folder(tmp_path / "shapes", per_class=6)
        for number in range(20):
            (tmp_path / "shapes" / "disc" / "Thumbs.db").write_text(f"thumbs {number}")
            found = data.load(str(tmp_path / "shapes"))
            assert any(name.startswith("disc/Thumbs.db: ") for name in found.skipped)

    def test_a_folder_of_validation_images_is_the_validation_split(self, toy_folder: Path, tmp_path: Path) -> None:
        for split in ("train", "val", "test"):
            for name in toy.CLASSES:
                (tmp_path / split / name).mkdir(parents=True)
        for path in toy_folder.rglob("*.png"):
            split = {"7": "test", "3": "val"}.get(path.stem[-1], "train")
            shutil.copy(path, tmp_path / split / path.parent.name)
        found = data.load(str(tmp_path))
        assert (len(found.train), len(found.val), len(found.test)) == (192, 24, 24)
        assert {name.split("/")[0] for name in found.val.names} == {"val"}

    def test_linked_folders_are_classes_and_cyclic_links_end(
        self, loaded: data.Data, toy_folder: Path, tmp_path: Path
    ) -> None:
        for name in toy.CLASSES:
            (tmp_path / name).symlink_to(toy_folder / name)
        (tmp_path / "disc-and-more").mkdir()
        (tmp_path / "disc-and-more" / "back").symlink_to(tmp_path)
        assert data.load(str(tmp_path)).sha256() == loaded.sha256()

    def test_links_between_sibling_folders_end(self, tmp_path: Path) -> None:
        for name, other in (("rose", "tulip"), ("tulip", "rose")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "1.png").write_bytes(b"")
            (tmp_path / name / "related").symlink_to(tmp_path / other)
        assert sorted(read_files(tmp_path)) == [
            "rose/1.png",
            "rose/related/1.png",
            "tulip/1.png",
            "tulip/related/1.png",
        ]

    def test_a_folders_files_are_read_only_when_needed(self, tmp_path: Path) -> None:
        """A file rewritten after the folder was listed is read with its new content."""
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "1").write_bytes(b"first")
        files = read_files(tmp_path)
        (tmp_path / "a" / "1").write_bytes(b"second")
        assert dict(files) == {"a/1": b"second"}
        (tmp_path / "a" / "1").unlink()
        with pytest.raises(CommandError, match=r"a/1: No such file or directory; expected a file"):
            files["a/1"]

    def test_a_class_name_that_is_not_utf8_is_one_clear_line(self, toy_folder: Path, tmp_path: Path) -> None:
        source = shutil.copytree(toy_folder, tmp_path / "source")
        (source / "disc").rename(source / os.fsdecode(b"caf\xe9"))
        with pytest.raises(CommandError, match=r"the folder 'caf\\udce9'; expected a name in UTF-8"):
            data.load(str(source))

    def test_a_constant_channel_does_not_divide_by_zero(self) -> None:
        images = np.zeros((4, 8, 8, 3), np.uint8)
        images[..., 0] = np.arange(8) * 30
        split = data.Split(images, np.zeros(4, np.int64))
        _, std = data.Data("", ("a", "b"), split, split, split).channel_statistics()
        assert std[0] > 60
        assert std[1:] == (1, 1)

    @pytest.mark.parametrize(
        ("source", "expected"),
        [("nowhere", "expected a folder, a tar archive or 'cifar10'"), ("one", "expected at least two folders")],
    )
    def test_an_unusable_source_is_one_clear_line(self, source: str, expected: str, tmp_path: Path) -> None:
        (tmp_path / "one" / "only").mkdir(parents=True)
        (tmp_path / "one" / "only" / "a.png").write_bytes(b"")
        printed = toy.run("train.fit", tmp_path / source, "--name", "x", "--out", tmp_path / "run", code=1)
        assert expected in printed
        assert "Traceback" not in printed

    def test_cifar10_without_a_network_says_what_to_do(self, tmp_path: Path) -> None:
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

    def test_a_folder_without_images_inside_a_class_is_refused(self, tmp_path: Path) -> None:
        toy.make_folder(tmp_path / "flowers", per_class=12)
        (tmp_path / "flowers" / "disc" / "LICENSE").mkdir()
        (tmp_path / "flowers" / "disc" / "LICENSE" / "text.txt").write_text("free")
        with pytest.raises(CommandError, match="no training image of LICENSE"):
            data.load(str(tmp_path / "flowers"))

    @pytest.mark.parametrize(("split", "told"), [("test", "test"), ("val", "validation")])
    def test_a_class_without_test_or_validation_images_is_refused(self, tmp_path: Path, split: str, told: str) -> None:
        for name in ("train", "val", "test"):
            toy.make_folder(tmp_path / name, per_class=6)
        shutil.rmtree(tmp_path / split / "frame")
        with pytest.raises(CommandError, match=f"no {told} image of frame"):
            data.load(str(tmp_path))

    def test_a_damaged_archive_is_one_clear_line(self, tmp_path: Path) -> None:
        archive, noise = io.BytesIO(), np.random.default_rng(0).bytes(100_000)
        with tarfile.open(fileobj=archive, mode="w") as tar:
            file = tarfile.TarInfo("disc/000.png")
            file.size = len(noise)
            tar.addfile(file, io.BytesIO(noise))
        packer = zlib.compressobj(wbits=31)
        cut = packer.compress(archive.getvalue()[:60_000]) + packer.flush(zlib.Z_FULL_FLUSH)
        link = io.BytesIO()
        with tarfile.open(fileobj=link, mode="w") as tar:
            dangling = tarfile.TarInfo("disc/000.png")
            dangling.type, dangling.linkname = tarfile.SYMTYPE, "nowhere.png"
            tar.addfile(dangling)
        toy.make_folder(tmp_path / "flowers", per_class=12)
        whole = io.BytesIO()
        with tarfile.open(fileobj=whole, mode="w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(tmp_path / "flowers", "")
        headers = [i for i in range(0, len(whole.getvalue()), 512) if whole.getvalue()[i + 257 : i + 262] == b"ustar"]
        torn = bytearray(whole.getvalue())
        torn[headers[-3]] ^= 1
        for content, error in (
            (bytes(torn), f"damaged or cut off at byte {headers[-3]}"),
            (whole.getvalue()[: headers[-3]], f"damaged or cut off at byte {headers[-3]}"),
            (cut, "Compressed file ended"),
            (cut + b"\x07", "invalid block type"),
            (link.getvalue(), "linkname 'disc/nowhere.png' not found"),
        ):
            (tmp_path / "archive").write_bytes(content)
            with pytest.raises(CommandError, match=f"/archive: .*{error}.*; expected a folder, a tar archive"):
                data.load(str(tmp_path / "archive"))

    def test_an_unreadable_file_is_one_clear_line(self, toy_folder: Path, tmp_path: Path) -> None:
        source = shutil.copytree(toy_folder, tmp_path / "source")
        (source / "disc" / "more.png").symlink_to("/proc/self/mem")  # looks like a file, but cannot be read
        with pytest.raises(CommandError, match=r"disc/more.png: Input/output error; expected a file that can be"):
            data.load(str(source))


class TestAugmentation:
    def test_flips_alternate_and_epochs_repeat_exactly(self, loaded: data.Data) -> None:
        recipe = Recipe(batch_size=16, translate=0, cutout=0, zoom=1, low_res=0)
        batches = Augmented(loaded.train, recipe, torch.device("cpu"))

        def by_image(epoch: int) -> dict[bytes, bool]:
            plain = {image.tobytes(): False for image in loaded.train.images}
            plain.update({image[:, ::-1].tobytes(): True for image in loaded.train.images})
            flips: dict[bytes, bool] = {}
            for batch in batches.epoch(epoch):
                for image in batch.views.numpy():
                    flipped = plain[image.tobytes()]
                    flips[(image[:, ::-1] if flipped else image).tobytes()] = flipped
            return flips

        even, odd = by_image(0), by_image(1)
        assert len(even) == len(loaded.train)
        assert all(odd[image] is not flipped for image, flipped in even.items())
        assert by_image(0) == even
        batches = Augmented(loaded.train, recipe.model_copy(update={"flip": 0}), torch.device("cpu"))
        assert not any(by_image(epoch)[image] for epoch in (0, 1) for image in by_image(epoch))

    def test_translation_reflects_at_the_border_and_cutout_blanks_a_square(self, loaded: data.Data) -> None:
        recipe = Recipe(batch_size=len(loaded.train), translate=0.25, cutout=0.25, zoom=1, low_res=0)
        (batch,) = Augmented(loaded.train, recipe, torch.device("cpu")).epoch(0)
        originals = {pixel.tobytes() for pixel in loaded.train.images.reshape(-1, 3)}
        blanked = [sum(p.tobytes() not in originals for p in image.reshape(-1, 3)) for image in batch.views.numpy()]
        assert 0 < np.mean(blanked) <= 36
        assert max(blanked) <= 36

    def test_zoom_scales_half_of_the_images_about_their_centre(self, loaded: data.Data) -> None:
        recipe = Recipe(batch_size=len(loaded.train), translate=0, cutout=0, zoom=1.5, low_res=0)
        plain, zoomed = (
            next(iter(Augmented(loaded.train, r, torch.device("cpu")).epoch(0))).views.numpy()
            for r in (recipe.model_copy(update={"zoom": 1.0}), recipe)
        )
        chosen = np.arange(len(plain)) // 4 % 2 == 0  # by fours, so that each kind of corruption meets both
        assert (plain[~chosen] == zoomed[~chosen]).all()
        assert (plain[chosen] != zoomed[chosen]).any(axis=(1, 2, 3)).all()
        centre = slice(toy.SIDE // 2 - 1, toy.SIDE // 2 + 1)
        moved = np.abs(plain[chosen].astype(int) - zoomed[chosen])
        assert moved[:, centre, centre].mean() < moved.mean() / 2

    def test_the_first_epochs_use_smaller_images(self, loaded: data.Data) -> None:
        batches = Augmented(loaded.train, Recipe(epochs=4, low_res=0.5), torch.device("cpu"))
        sides = [next(iter(batches.epoch(epoch))).views.shape[1:] for epoch in range(4)]
        assert sides == [(18, 18, 3)] * 2 + [(24, 24, 3)] * 2

    def test_corruption_changes_three_of_four_views_but_no_clean_image(self, loaded: data.Data) -> None:
        count = 204  # excludes an image for which hardly any noise is drawn
        split = data.Split(loaded.train.images[:count], loaded.train.labels[:count])
        recipe = Recipe(batch_size=count, translate=0, cutout=0, zoom=1, low_res=0)
        plain, corrupted = (
            next(iter(Augmented(split, r, torch.device("cpu")).epoch(0)))
            for r in (recipe, recipe.model_copy(update={"corrupt": 1.0}))
        )
        assert (corrupted.images == plain.images).all()
        changed = (corrupted.views != plain.images).flatten(1).any(dim=1)
        assert not changed[::4].any()
        assert changed[1::4].all()
        assert min(changed[2::4].float().mean(), changed[3::4].float().mean()) >= 0.9

        def roughness(images: torch.Tensor) -> torch.Tensor:
            return images.float().diff(dim=2).abs().mean(dim=(1, 2, 3))

        ratio = roughness(corrupted.views) / roughness(plain.images)
        assert ratio[1::4].mean() > 1.2  # noise
        assert ratio[2::4].mean() < 0.8  # blur, or larger pixels


@pytest.mark.parametrize(
    ("images", "side", "size"),
    [(47_500, 32, 512), (47_500, 64, 512), (5_000, 64, 250), (50_000, 224, 41), (204, 32, 16), (30, 224, 16)],
)
def test_batches_shrink_with_few_or_large_images(images: int, side: int, size: int) -> None:
    assert choose_batch_size(images, (side, side)) == size


def test_batches_are_no_larger_than_requested(loaded: data.Data) -> None:
    count = len(loaded.train)
    batches = Augmented(loaded.train, Recipe(batch_size=120), torch.device("cpu"))
    assert [batch.size for batch in batches.epoch(0)] == [math.ceil(count / 2), count // 2]


def test_half_precision_is_used_only_where_the_cpu_supports_it() -> None:
    instructions = re.findall(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())
    assert precision.compute_dtype(torch.device("cpu")) is (torch.bfloat16 if instructions else torch.float32)
    assert precision.compute_dtype(torch.device("cuda")) is torch.float16


def test_muon_steps_are_orthogonal_and_preserve_weight_norms() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(8, 36)
    unchanged = matrix.clone()
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    assert torch.equal(matrix, unchanged)
    assert 0.5 < values.min() <= values.max() < 1.3
    assert torch.equal(orthogonalize(matrix.T), orthogonalize(matrix).T)
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer = Muon([weight], lr=0.1, momentum=0.6)
    target = torch.randn(8, 4, 3, 3)
    distances = []
    for _ in range(30):
        optimizer.zero_grad()
        distance = (torch.nn.functional.normalize(weight.flatten(), dim=0) * target.flatten()).sum().neg()
        distance.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        distances.append(float(distance.detach()))
    assert distances[-1] < distances[0] - 5
    assert float(weight.detach().norm()) == pytest.approx(8**0.5, rel=0.05)


@pytest.mark.parametrize("side", [2, 7, 8, 9])
@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
def test_convolving_small_maps_in_strips_gives_the_same_results_and_gradients(side: int, halves: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, 3, padding=1, bias=False)
    strips = nn.Sequential(plain)
    use_strips(strips)
    assert isinstance(strips[0], StripConv2d)
    maps, weighting = torch.randn(5, 6, side, side), torch.randn(5, 8, side, side)
    found = []
    for convolution in (plain, strips):
        images = maps.clone(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=halves):
            result = convolution(images)
        (result * weighting).sum().backward()
        if convolution is strips:
            assert ("_Convolve" in type(result.grad_fn).__name__) is (side <= WIDEST_MAP)
        assert images.grad is not None
        assert plain.weight.grad is not None
        found.append((result.detach(), images.grad, plain.weight.grad))
        plain.weight.grad = None
    for one, other in zip(*found, strict=True):
        assert one.dtype is other.dtype
        # bfloat16 has 8 bits of precision, and processors round to them at different points.
        assert float((one - other).norm() / one.norm()) < (0.02 if halves else 1e-5)


def test_strips_change_neither_a_networks_outputs_nor_its_weight_names(loaded: data.Data) -> None:
    network = ConvNet(build_config("net", loaded, Recipe(widths="4,8", depth=2))).eval()
    names, images = list(network.state_dict()), torch.from_numpy(loaded.val.images)
    before = network(images)
    use_strips(network)
    assert sum(isinstance(module, StripConv2d) for module in network.modules()) == 6
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(images), before)


def test_training_uses_strips_where_they_pay(loaded: data.Data, toy_run: Path, tmp_path: Path) -> None:
    fit = begin(loaded, tmp_path)
    fit.take_teacher(Trained.read(toy_run))
    has_amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    for network in (fit.network, *fit.teachers):
        assert any(isinstance(module, StripConv2d) for module in network.modules()) is has_amx


@pytest.mark.parametrize("widths", ["", "8,", "8,-1", "eight"])
def test_widths_that_are_not_numbers_are_one_clear_line(loaded: data.Data, widths: str) -> None:
    with pytest.raises(CommandError, match=f"--widths '{widths}'; expected numbers of channels"):
        build_config("toy", loaded, Recipe(widths=widths))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--name", "Flowers", "--name 'Flowers': String should match pattern"),
        ("--name", "flowers-", "--name 'flowers-': String should match pattern"),  # the store's own message
        ("--name", "f" * 64, f"--name '{'f' * 64}': String should match pattern"),
        ("--depth", 1, "--depth 1: Input should be greater than or equal to 2"),
        ("--size", 4, "--size 4; expected at least 6 pixels"),
    ],
)
def test_invalid_options_are_one_clear_line_before_the_data_is_read(
    option: str, value: object, expected: str, tmp_path: Path
) -> None:
    options = ("--name", "toy", "--out", tmp_path / "run", option, value)
    printed = toy.run("train.fit", tmp_path / "no-such-source", *options, code=1)
    assert printed.startswith(f"error: {expected}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", -1.0),
        ("momentum", 1.0),
        ("warmup", 2.0),
        ("label_smoothing", 2.0),
        ("translate", 2.0),
        ("cutout", 2.0),
        ("zoom", -1.0),
        ("corrupt", -1.0),
        ("distill", 5.0),
        ("distill_temperature", 0.0),
        ("lr", float("nan")),
    ],
)
def test_an_out_of_range_hyperparameter_is_one_clear_line(
    name: str, value: float, toy_run: Path, tmp_path: Path
) -> None:
    """Typed, or recorded in the run that --like names."""
    flag, typed = "--" + name.replace("_", "-"), ["photos", "--name", "it", "--out", "it"]
    with pytest.raises(CommandError, match=f"^{flag} {value}: Input should be"):
        parse("", [*typed, flag, str(value)])
    run = shutil.copytree(toy_run, tmp_path / "run")
    record = json.loads((run / RUN).read_text())
    (run / RUN).write_text(json.dumps({**record, "recipe": {**record["recipe"], name: value}}))
    with pytest.raises(CommandError, match=f"{run}: {flag} {value}: Input should be"):
        parse("", [*typed, "--like", str(run)])


def test_help_describes_each_hyperparameter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("", ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name, field in Recipe.model_fields.items():
        assert f"{field.description} (default: {field.default})" in told, name


def test_muon_updates_its_momentum_in_place() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 4, 3, 3))
    optimizer = Muon([weight], lr=0.1, momentum=0.6)
    places = set()
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        places.add(optimizer.state[weight]["momentum_buffer"].data_ptr())
    assert len(places) == 1


def test_the_network_shape_follows_from_the_data(loaded: data.Data) -> None:
    config = build_config("toy", loaded, Recipe(widths="8,32"))
    assert config.classes == toy.CLASSES
    assert config.widths == (8, 32, 32)  # 24 pixels become 12, 6, 3


def test_a_killed_run_resumes_with_the_same_result(toy_folder: Path, toy_run: Path, tmp_path: Path) -> None:
    arguments = [toy_folder, "--name", "toy", "--out", tmp_path, *toy.RECIPE]
    process = subprocess.Popen(
        [sys.executable, "-m", "train.fit", *map(str, arguments)], cwd=toy.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("epoch 2 "):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    printed = toy.run("train.fit", *arguments, "--resume")
    assert "epoch 2 " not in printed
    assert [epoch["epoch"] for epoch in json.loads((tmp_path / RUN).read_text())["history"]] == [1, 2, 3, 4, 5, 6]
    resumed, whole = (load_file(run / CHECKPOINT) for run in (tmp_path, toy_run))
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():  # weights and momentum, bit for bit
        assert torch.equal(resumed[name], tensor), name


def test_a_kill_during_validation_loses_no_epoch(
    loaded: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_memory(*_: object) -> None:
        raise MemoryError

    killed, resumed, whole = (begin(loaded, tmp_path, epochs=2) for _ in range(3))
    with monkeypatch.context() as patch:
        patch.setattr("train.fit.count_hits", run_out_of_memory)
        with pytest.raises(MemoryError):
            killed.run(tqdm(disable=True))
    resumed.resume()
    assert resumed.epochs_done == 1
    resumed.run(tqdm(disable=True))
    whole.run(tqdm(disable=True))
    for epoch, expected in zip(resumed.history, whole.history, strict=True):
        for figure in ("epoch", "loss", "train_accuracy", "val_accuracy"):
            assert epoch[figure] == pytest.approx(expected[figure], abs=0.05)


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


def test_interrupting_leaves_a_usable_checkpoint(toy_folder: Path, tmp_path: Path) -> None:
    arguments = [toy_folder, "--name", "toy", "--out", tmp_path, "--epochs", 500, "--widths", "8,32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train.fit", *map(str, arguments)],
        cwd=toy.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with SIGINT ignored; restore its default.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("epoch 1 "):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "go on with --resume" in errors
    assert "Traceback" not in errors
    config, network = load_run(tmp_path)
    assert config.classes == toy.CLASSES
    assert float(network.stages[0].reduce[-2].running_mean.abs().sum()) > 0  # the network has seen images


def test_resuming_with_a_different_recipe_is_refused(toy_folder: Path, toy_run: Path) -> None:
    printed = train_on(toy_folder, toy_run, "--epochs", 9, "--resume", code=1)
    assert printed.endswith("its recipe has {'epochs': 6}; expected {'epochs': 9}\n")


def test_resuming_under_a_different_name_is_refused(toy_folder: Path, toy_run: Path) -> None:
    before = (toy_run / CONFIG).read_bytes()
    printed = train_on(toy_folder, toy_run, "--resume", name="other", code=1)
    assert printed.endswith(f"error: {toy_run / CONFIG}: its --name is 'toy'; expected 'other'\n")
    assert (toy_run / CONFIG).read_bytes() == before


def test_a_student_can_learn_from_teachers_alone(toy_folder: Path, toy_run: Path, tmp_path: Path) -> None:
    """With no weight on the labels, only the teacher's verdicts can have taught it."""
    recipe = ("--epochs", 8, "--batch-size", 32, "--widths", "8,16", "--depth", 2, "--distill", 1)
    toy.run("train.fit", toy_folder, "--name", "student", "--out", tmp_path, *recipe, "--teacher", toy_run)
    run = json.loads((tmp_path / RUN).read_text())
    assert run["history"][-1]["train_accuracy"] > 0.7
    assert run["teachers"][0]["data_sha256"] == run["data_sha256"]
    assert run["parameters"] < run["teachers"][0]["parameters"]


def test_training_can_start_from_an_artifact(toy_folder: Path, toy_artifact: Artifact, tmp_path: Path) -> None:
    """One epoch at a tiny learning rate keeps what the artifact knew."""
    calm = ("--epochs", 1, "--lr", 1e-6, "--muon-lr", 1e-6, "--low-res", 0)
    train_on(toy_folder, tmp_path, *calm, "--start", toy_artifact.path)
    run = json.loads((tmp_path / RUN).read_text())
    assert run["history"][-1]["val_accuracy"] >= 0.9
    assert run["start"] == toy_artifact.card["training"]


def given_splits(flat: Path, root: Path) -> data.Data:
    """The images of ``flat`` in other splits: files whose names end in 7 become test images."""
    for path in flat.rglob("*.png"):
        folder = root / ("test" if path.stem.endswith("7") else "train") / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return data.load(str(root))


def begin_from(start: Trained, source: data.Data) -> Fit:
    fit = begin(source, Path("not-written"))
    fit.take_start(start)
    return fit


def test_a_start_trained_on_held_out_images_is_refused(
    loaded: data.Data, toy_folder: Path, toy_run: Path, tmp_path: Path
) -> None:
    other = given_splits(toy_folder, tmp_path)
    seen = {image.tobytes() for image in loaded.train.images}
    val, test = (sum(image.tobytes() in seen for image in split.images) for split in (other.val, other.test))
    assert min(val, test) > 5
    expected = f"{toy_run}: was trained on {val} of the 12 validation images and {test} of the 24 test images of "
    with pytest.raises(CommandError, match=f"{expected}{tmp_path}; expected none of either"):
        begin_from(Trained.read(toy_run), other)


def test_training_can_start_from_a_run_on_a_smaller_version_of_the_folder(
    toy_folder: Path, toy_run: Path, toy_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = shutil.copytree(toy_folder, tmp_path / "grown")
    toy.make_folder(tmp_path / "more", per_class=8, seed=1)
    for path in (tmp_path / "more").rglob("*.png"):
        path.rename(grown / path.parent.name / f"0-{path.name}")
    found = data.load(str(grown))
    run = Trained.read(toy_run)
    assert run.digests
    # A run that starts from this one records the images of both; artifacts keep no such record.
    assert begin_from(run, found).digests == run.digests.union(found.train.digests)
    assert begin_from(Trained.read(toy_artifact.path), found).digests is None
    assert not capsys.readouterr().out


@pytest.mark.parametrize("link", ["run", "start"])
def test_a_start_on_other_data_without_a_record_of_its_images_is_reported(
    link: str, loaded: data.Data, toy_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every run in its ancestry must have held images out by their content."""
    start = Trained.read(toy_artifact.path)
    older = {**start.record, "data_sha256": "0" * 64, "held_out_by_content": False}
    records = {"run": older, "start": {**older, "held_out_by_content": True, "start": older}}
    begin_from(start._replace(record=records[link]), loaded)
    told = capsys.readouterr().out
    assert told.startswith(
        f"--start {start.path}: was trained on other data, folder, and has no record of the images: "
    )


def test_a_start_keeps_its_normalisation(toy_run: Path, tmp_path: Path) -> None:
    """Its filters were learned with it, and the configuration must describe what the weights hold."""
    other = toy.make_folder(tmp_path / "other", per_class=24, seed=1)
    train_on(other, tmp_path / "run", "--epochs", 1, "--start", toy_run)
    before, after = (json.loads((run / CONFIG).read_text()) for run in (toy_run, tmp_path / "run"))
    assert (after["mean"], after["std"]) == (before["mean"], before["std"])
    held = load_file(tmp_path / "run" / CHECKPOINT)
    for name in ("mean", "std"):
        assert torch.allclose(held[f"network.normalize.{name}"].flatten(), torch.tensor(after[name]))


@pytest.mark.parametrize("option", ["--out=", "--out", ""])
def test_local_paths_stay_out_of_the_card(option: str) -> None:
    given, told = {
        "--out=": (["--out=/home/me/x=y/run"], ["--out=run"]),
        "--out": (["--out", "/home/me/run"], ["--out", "run"]),
        "": (["/home/me/a=b/photos"], ["photos"]),
    }[option]
    assert command.public("train.fit", [*given, "--widths", "8,32"]) == shlex.join(
        ["python", "-m", "train.fit", *told, "--widths", "8,32"]
    )


def test_like_copies_another_networks_recipe(toy_run: Path) -> None:
    typed = ["photos", "--name", "it", "--out", "it", "--like", str(toy_run)]
    like = parse("", typed)
    assert like.recipe == Recipe(**json.loads((toy_run / RUN).read_text())["recipe"]) != Recipe()
    assert (like.size, like.has_batch_size) == ((toy.SIDE, toy.SIDE), True)
    other = parse("", [*typed, "--epochs", "99", "--size", "64", "--batch-size", "7"])
    assert other.recipe == like.recipe.model_copy(update={"epochs": 99, "batch_size": 7})
    assert other.size == (64, 64)


def test_like_reports_what_it_does_not_take_over(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(toy_run, tmp_path / "run")
    record = json.loads((run / RUN).read_text())
    (run / RUN).write_text(json.dumps({**record, "start": record, "teachers": [record]}))
    typed = ["photos", "--name", "it", "--out", "it", "--like", str(run)]
    parse("", typed)
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in told] == [
        f"trained with --{option}, which is not taken over" for option in ("start", "teacher")
    ]
    parse("", [*typed, "--start", str(run), "--teacher", str(run)])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("option", "path"), [("--start", "."), ("--teacher", "typo")])
def test_what_is_no_run_and_no_artifact_is_refused_and_leaves_no_run_behind(
    option: str, path: str, toy_folder: Path, tmp_path: Path
) -> None:
    printed = train_on(toy_folder, tmp_path / "run", option, tmp_path / path, code=1)
    assert "expected a finished run, or an artifact trained here" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / CHECKPOINT).exists()


@pytest.mark.parametrize("option", ["--start", "--teacher"])
def test_an_unfinished_run_is_refused_before_the_first_epoch(
    option: str, toy_folder: Path, toy_run: Path, tmp_path: Path
) -> None:
    unfinished = shutil.copytree(toy_run, tmp_path / "unfinished")
    (unfinished / RUN).unlink()
    printed = train_on(toy_folder, tmp_path / "run", option, unfinished, code=1)
    assert f"error: {unfinished}: not finished, for it has neither run.json nor card.json" in printed
    assert "epoch" not in printed


def test_a_damaged_run_is_one_clear_line(toy_run: Path, tmp_path: Path) -> None:
    for name, read in ((RUN, read_record), (CHECKPOINT, read_weights)):
        damaged = shutil.copytree(toy_run, tmp_path / name)
        os.truncate(damaged / name, (damaged / name).stat().st_size // 2)
        with pytest.raises(CommandError, match=f"{damaged / name}: .*; expected whole .*, not a damaged file"):
            read(damaged)


def test_a_run_started_on_a_cpu_resumes_on_a_gpu(loaded: data.Data, tmp_path: Path) -> None:
    """A GPU has a loss scale, which the checkpoint lacks; here a CPU scaler stands in for it."""
    fit = begin(loaded, tmp_path)
    fit.save()
    fit.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit.resume()
    assert fit.scaler.get_scale() == 1024


def test_whitening_is_the_same_when_computed_in_parts(loaded: data.Data) -> None:
    """Each part needs a bounded amount of memory."""
    images = torch.from_numpy(loaded.train.images)
    whole, parts = (ConvNet(build_config("toy", loaded, Recipe())) for _ in range(2))
    whole.init_whitening(images, len(images))
    parts.init_whitening(images, 7)
    assert torch.allclose(whole.whiten.weight.abs(), parts.whiten.weight.abs(), rtol=1e-3, atol=1e-4)
    patches = F.unfold(whole.normalize(images), 2).transpose(1, 2).reshape(-1, 12)
    white = patches @ whole.whiten.weight[:12].reshape(12, -1).T
    assert torch.allclose(white.T @ white / len(white), torch.eye(12), atol=0.05)


@pytest.mark.parametrize("option", ["--start", "--teacher"])
def test_a_run_does_not_resume_without_its_start_or_teacher(
    option: str, toy_folder: Path, toy_run: Path, toy_artifact: Artifact, tmp_path: Path
) -> None:
    """Nor with another network at the same path: the artifact's weights are rounded."""
    common = (toy_folder, tmp_path, "--epochs", 1)
    train_on(*common, option, toy_run)
    train_on(*common, option, toy_run, "--resume")
    printed = train_on(*common, "--resume", code=1)
    assert f"{tmp_path / CHECKPOINT}: on record for {option} are weights " in printed
    assert "; expected none" in printed
    assert f"for {option} are" in train_on(*common, option, toy_artifact.path, "--resume", code=1)


def test_a_checkpoint_without_a_record_of_teachers_resumes_only_without_them(
    loaded: data.Data, toy_run: Path, tmp_path: Path
) -> None:
    fit = begin(loaded, tmp_path)
    tensors, position = fit.state()
    del position["learned_from"]
    save_file(tensors, tmp_path / CHECKPOINT, metadata={"position": json.dumps(position)})
    fit.resume()
    fit.take_teacher(Trained.read(toy_run))
    with pytest.raises(CommandError, match=r"on record for --teacher are weights none; expected [0-9a-f]{12}$"):
        fit.resume()


def test_a_run_older_than_a_hyperparameter_resumes_with_its_default(loaded: data.Data, tmp_path: Path) -> None:
    fit = begin(loaded, tmp_path)
    tensors, position = fit.state()
    del position["recipe"]["flip"]
    save_file(tensors, tmp_path / CHECKPOINT, metadata={"position": json.dumps(position)})
    fit.resume()
    fit.recipe = fit.recipe.model_copy(update={"flip": 0})
    with pytest.raises(CommandError, match=r"its recipe has {'flip': 1}; expected {'flip': 0}$"):
        fit.resume()


def test_teachers_are_asked_in_turn_and_on_mirrored_images_too(loaded: data.Data, tmp_path: Path) -> None:
    class Teacher(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            asked.append((self.number, "mirrored" if (images == batch.images.flip(2)).all() else "as it is"))
            return torch.zeros(len(images), 3)

    asked: list[tuple[int, str]] = []
    for flip in (1, 0):
        fit = begin(loaded, tmp_path, flip=flip)
        fit.teachers = [Teacher(0), Teacher(1)]  # type: ignore[list-item]  # stand-ins for networks
        for batch in itertools.islice(fit.batches.epoch(0), 4):
            fit.backward(batch)
    turns = [(0, "as it is"), (1, "as it is")]
    assert asked == [*turns, (0, "mirrored"), (1, "mirrored"), *turns, *turns]


def test_a_teacher_of_another_size_is_refused(toy_folder: Path, toy_run: Path, tmp_path: Path) -> None:
    printed = train_on(toy_folder, tmp_path, "--teacher", toy_run, "--size", 16, code=1)
    assert f"error: {toy_run}: a teacher of (24, 24) pixels; expected (16, 16)" in printed


def test_weights_that_cannot_be_written_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"no/weights: .*No such file or directory"):
        write_weights({"a": torch.zeros(1)}, tmp_path / "no" / "weights")


def test_a_bank_may_have_fewer_images_than_neighbours_requested(loaded: data.Data) -> None:
    config = build_config("net", loaded, Recipe(widths="4,8", depth=2)).model_copy(update={"bank": 2})
    network = ServedNet(config).eval()
    images = torch.from_numpy(loaded.train.images[:2])
    network.init_bank(images)
    assert network(images)[:, -1].max() < 1, "the farther of the two, which is not the image itself"


def test_a_teacher_trained_on_other_data_is_reported(toy_run: Path, tmp_path: Path) -> None:
    other = toy.make_folder(tmp_path / "other", seed=1)
    printed = train_on(other, tmp_path / "run", "--epochs", 1, "--teacher", toy_run)
    assert f"--teacher {toy_run}: was trained on other data, folder\n" in printed


def test_a_teacher_with_other_classes_is_refused(toy_run: Path, tmp_path: Path) -> None:
    other = toy.make_folder(tmp_path / "other", per_class=24)
    (other / "disc").rename(other / "zebra")
    printed = train_on(other, tmp_path / "run", "--teacher", toy_run, code=1)
    assert "a teacher of ['disc', 'frame', 'stripes']; expected ['frame', 'stripes', 'zebra']" in printed


class TestExport:
    def test_the_artifact_is_small_and_complete_and_has_learned(self, toy_artifact: Artifact) -> None:
        card = toy_artifact.card
        assert card["validation"]["fp32_accuracy"] >= 0.9
        assert toy_artifact.file(ONNX).stat().st_size < toy_artifact.file(TORCH).stat().st_size, "it refers to them"
        assert card["training"]["command"].startswith("python -m train.fit ")
        assert card["training"]["data_sha256"] == data.load(str(toy_artifact.path.parent / "folder")).sha256()
        assert set(card["versions"]) == {"torch", "onnx", "onnxruntime", "bentoml"}

    def test_an_export_that_loses_accuracy_is_refused(self, loaded: data.Data) -> None:
        right = np.eye(4, dtype=np.float32)[loaded.val.labels]  # the last column is the familiarity
        wrong = right.copy()
        wrong[:2, :3] = np.roll(wrong[:2, :3], 1, axis=1)
        assert parity(right, right, loaded.val)["agreement"] == 1
        with pytest.raises(ParityError, match=f"INT8 accuracy {1 - 2 / len(loaded.val):.4f}"):
            parity(right, wrong, loaded.val)

    def test_an_export_that_loses_exactly_the_limit_is_accepted(self) -> None:
        split = data.Split(np.zeros((1000, 1, 1, 3), np.uint8), np.zeros(1000, np.int64))
        right = np.eye(3, dtype=np.float32)[split.labels]
        wrong = right.copy()
        right[:1, :2] = right[:1, 1::-1]
        wrong[:4, :2] = wrong[:4, 1::-1]
        assert parity(right, wrong, split)["int8_accuracy"] == 0.996
        wrong[4, :2] = wrong[4, 1::-1]
        with pytest.raises(ParityError):
            parity(right, wrong, split)

    def test_the_temperature_of_a_perfect_network_stays_finite(self) -> None:
        labels = np.arange(2000) % 3
        outputs = np.append(4.0 * np.eye(3)[labels], np.zeros((2000, 1)), axis=1).astype(np.float32)
        few, many = (fit_temperature(outputs[:count], labels[:count]) for count in (20, 2000))
        # The loss is lowest where the right class has a probability of 21 / 22: 4 / T = log(2 * 21).
        assert few == pytest.approx(4 / np.log(42), rel=0.01)
        assert many == pytest.approx(4 / np.log(4002), rel=0.01)

    def test_the_temperature_undoes_a_scaling_of_the_logits(self) -> None:
        rng = np.random.default_rng(0)
        outputs = rng.normal(0, 2, (20_000, 4)).astype(np.float32)
        # A label drawn from the probabilities given by the outputs.
        labels = (outputs[:, :-1] + rng.gumbel(size=(20_000, 3))).argmax(axis=1)
        assert fit_temperature(outputs, labels) == pytest.approx(1, rel=0.05)
        assert fit_temperature(outputs * 3, labels) == pytest.approx(3, rel=0.05)

    def test_a_sample_of_images_sorted_by_class_covers_all_classes(self) -> None:
        sorted_images = np.repeat(np.arange(10, dtype=np.uint8), 100)[:, None, None, None]
        for count in (16, BANK_IMAGES, 1000, 2000):
            chosen = evenly_spaced(sorted_images, count)
            assert len(chosen) == min(count, 1000)
            assert set(np.bincount(chosen.ravel(), minlength=10)) <= {count // 10, count // 10 + 1, 100}

    def test_data_with_other_classes_is_refused(self, toy_run: Path, tmp_path: Path) -> None:
        other = toy.make_folder(tmp_path / "other", per_class=12)
        (other / "disc").rename(other / "zebra")
        printed = toy.run("train.export", toy_run, other, "--out", tmp_path / "out", code=1)
        assert "classes ['frame', 'stripes', 'zebra']; expected ['disc', 'frame', 'stripes']" in printed

    def test_changed_files_that_would_mix_the_splits_are_refused(
        self, toy_folder: Path, toy_run: Path, toy_artifact: Artifact, tmp_path: Path
    ) -> None:
        grown = shutil.copytree(toy_folder, tmp_path / "grown")
        shutil.copyfile(grown / "disc" / "000.png", grown / "disc" / "more.png")
        out = tmp_path / "out"
        assert "not the data of the training, folder: " in toy.run("train.export", toy_run, grown, "--out", out, code=1)
        assert not out.exists()
        assert "not the data of the training" in toy.run("train.evaluate", toy_artifact.path, grown, code=1)

    def test_an_unfinished_run_is_refused(self, toy_folder: Path, toy_run: Path, tmp_path: Path) -> None:
        unfinished = shutil.copytree(toy_run, tmp_path / "run")
        (unfinished / RUN).unlink()
        assert "not a finished run" in toy.run("train.export", unfinished, toy_folder, "--out", tmp_path / "a", code=1)


class TestEvaluate:
    def test_figures_of_known_answers(self) -> None:
        # Wilson's interval for 81 of 263, as worked in Newcombe, 1998, Statistics in Medicine 17:857.
        assert accuracy_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
        labels, verdicts = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
        assert confusion_matrix(verdicts, labels, 2).tolist() == [[1, 1], [0, 2]]
        sure = np.array([[0.8, 0.2]] * 10, np.float32)
        assert expected_calibration_error(sure, np.array([0] * 8 + [1] * 2)) == pytest.approx(0, abs=1e-6)
        assert expected_calibration_error(sure, np.array([0] * 5 + [1] * 5)) == pytest.approx(0.3, abs=1e-6)

    def test_the_calibration_error_by_chance_averages_over_all_outcomes(self) -> None:
        images, confidence = np.array([1, 0, 7, 20, 3]), np.array([0.25, 0.0, 0.6, 0.8, 1.0])
        deviation = sum(
            math.comb(n, hits) * p**hits * (1 - p) ** (n - hits) * abs(hits - n * p)
            for n, p in zip(images.tolist(), confidence.tolist(), strict=True)
            for hits in range(n + 1)
        )
        found = Reliability(images, confidence, confidence)
        assert calibration_error_by_chance(found) == pytest.approx(deviation / images.sum())

    def test_the_cpu_is_named_with_the_features_that_speed_up_int8(self) -> None:
        x86 = (
            "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_vnni sse\nbugs\t\t: amx_int8\n"
        )
        assert cpu_name(x86) == "Some CPU @ 2 GHz (avx512_vnni)"
        assert cpu_name(x86.replace("avx512_vnni", "")) == "Some CPU @ 2 GHz (avx2)"
        assert cpu_name("processor\t: 0\nFeatures\t: fp asimddp\n") == f"{platform.machine()} (asimddp)"

    def test_cifar10_cannot_be_sent_to_a_service(self, toy_artifact: Artifact) -> None:
        printed = toy.run("train.evaluate", toy_artifact.path, "cifar10", "--url", "http://127.0.0.1:9", code=1)
        assert printed == "error: 'cifar10' has no files to send; expected a folder or a tar archive\n"

    def test_a_service_with_other_classes_is_one_clear_line(self, toy_artifact: Artifact, embedded: Server) -> None:
        folder = toy_artifact.path.parent / "folder"
        printed = toy.run("train.evaluate", toy_artifact.path, folder, "--url", embedded.url, code=1)
        assert printed.startswith(f"error: {embedded.url}: serves classes ['airplane', ")
        assert printed.endswith("; expected ['disc', 'frame', 'stripes']\n")

    def test_an_unreachable_service_is_one_clear_line(self, toy_artifact: Artifact) -> None:
        folder = toy_artifact.path.parent / "folder"
        printed = toy.run("train.evaluate", toy_artifact.path, folder, "--url", "http://127.0.0.1:9", code=1)
        assert "error: http://127.0.0.1:9: " in printed
        assert "Traceback" not in printed

    def test_every_runtime_is_measured_and_recorded_in_the_card(
        self, toy_artifact: Artifact, toy_folder: Path, tmp_path: Path
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


def test_unwritable_output_is_one_clear_line(toy_folder: Path) -> None:
    printed = train_on(toy_folder, Path("/dev/null/run"), code=1)
    assert printed.endswith("error: [Errno 20] Not a directory: '/dev/null/run'\n")


def test_images_that_exceed_memory_are_one_clear_line(toy_folder: Path) -> None:
    printed = train_on(toy_folder, Path("run"), "--size", 40_000, code=1)
    assert re.search(r"images of 40000x40000 pixels take [\d.]+ GiB of memory; expected at most [\d.]+, which", printed)
    assert "Traceback" not in printed


def test_a_start_with_another_shape_is_one_clear_line(toy_folder: Path, toy_run: Path, tmp_path: Path) -> None:
    printed = train_on(toy_folder, tmp_path, "--widths", "8,16", "--start", toy_run, code=1)
    assert printed.endswith(
        f"error: {toy_run}: a network of widths [8, 32, 32] and depth 2; expected [8, 16, 16] and 2 "
        "(--like takes its recipe)\n"
    )


@pytest.mark.parametrize(("zoom", "fresh"), [(1, "head"), (2, "stages.3 and head")])
def test_a_start_of_other_classes_or_smaller_images_gives_the_layers_that_both_have(
    zoom: int, fresh: str, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = toy.make_folder(tmp_path / "other", seed=1, zoom=zoom)
    (other / "disc").rename(other / "circle")
    start = Trained.read(toy_run)
    fit = begin_from(start, data.load(str(other)))
    assert f"--start {toy_run}: has no weights for {fresh} of this network: they are random" in capsys.readouterr().out
    weights = fit.network.state_dict()
    taken = {name for name, tensor in start.weights.items() if torch.equal(tensor, weights[name])}
    assert taken == start.weights.keys() - {"head.weight"}
    fit._epoch(tqdm(disable=True))


def test_a_start_of_larger_images_gives_its_first_stages(toy_run: Path, tmp_path: Path) -> None:
    other = data.load(str(toy.make_folder(tmp_path / "other", seed=1)), (12, 12))
    fit = begin_from(Trained.read(toy_run), other)
    assert len(fit.config.widths) == 2
    assert torch.equal(
        fit.network.state_dict()["stages.1.reduce.0.weight"].cpu(),
        Trained.read(toy_run).weights["stages.1.reduce.0.weight"],
    )


def test_a_folder_too_small_for_three_splits_is_one_clear_line(toy_folder: Path, tmp_path: Path) -> None:
    for name in toy.CLASSES:
        (tmp_path / name).mkdir()
        for file in sorted((toy_folder / name).iterdir())[:2]:
            shutil.copy(file, tmp_path / name)
    with pytest.raises(CommandError, match="validation and test take all 6 files; expected 3 and more of each class"):
        data.load(str(tmp_path))


def test_intervals_stay_between_0_and_1() -> None:
    assert accuracy_interval(0, 37)[0] == 0
    assert accuracy_interval(37, 37)[1] == 1
