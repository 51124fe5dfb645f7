"""A folder or a tar archive: the files that are found in it, and what cannot be read."""

from __future__ import annotations

import io
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from model.preprocess import MAX_PIXELS, preprocess
from tests import toy
from train import data
from train.command import CommandError
from train.sources import read_files


def test_an_archive_with_splits_gives_the_same_images(toy_folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "toy.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(toy_folder.rglob("*.png")):
            split = "test" if path.stem.endswith("7") else "train"
            tar.add(path, f"{split}/{path.parent.name}/{path.name}")
    split = data.load(str(archive))
    assert (len(split.train), len(split.val), len(split.test)) == (204, 12, 24)
    first = preprocess((toy_folder / "disc" / "007.png").read_bytes(), split.input_size, MAX_PIXELS)
    assert any((image == first).all() for image in split.test.images)


def test_linked_folders_are_classes_and_cyclic_links_end(loaded: data.Data, toy_folder: Path, tmp_path: Path) -> None:
    for name in toy.CLASSES:
        (tmp_path / name).symlink_to(toy_folder / name)
    (tmp_path / "disc-and-more").mkdir()
    (tmp_path / "disc-and-more" / "back").symlink_to(tmp_path)
    (tmp_path / "disc-and-more" / "up").symlink_to(tmp_path.parent)
    assert data.load(str(tmp_path)).sha256() == loaded.sha256()


def test_links_between_sibling_folders_end(tmp_path: Path) -> None:
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


def test_a_folders_files_are_read_only_when_needed(tmp_path: Path) -> None:
    """A file rewritten after the folder was listed is read with its new content."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").write_bytes(b"first")
    files = read_files(tmp_path)
    (tmp_path / "a" / "1").write_bytes(b"second")
    assert dict(files) == {"a/1": b"second"}
    (tmp_path / "a" / "1").unlink()
    with pytest.raises(CommandError, match=r"a/1: No such file or directory; expected a file"):
        files["a/1"]


def test_an_empty_folder_is_reported(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "images")
    (tmp_path / "images" / "lost").mkdir()
    found = data.load(str(tmp_path / "images"))
    assert "lost: an empty folder" in found.skipped
    assert "lost" not in found.classes


@pytest.mark.parametrize(
    ("source", "expected"),
    [("nowhere", "expected a folder, a tar archive or 'cifar10'"), ("one", "expected at least two folders")],
)
def test_an_unusable_source_is_one_clear_line(source: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "one" / "only").mkdir(parents=True)
    (tmp_path / "one" / "only" / "a.png").write_bytes(b"")
    printed = toy.run("train.fit", tmp_path / source, "--name", "x", "--out", tmp_path / "run", code=1)
    assert expected in printed
    assert "Traceback" not in printed


def test_an_unreadable_file_is_one_clear_line(toy_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(toy_folder, tmp_path / "source")
    (source / "disc" / "more.png").symlink_to("/proc/self/mem")  # looks like a file, but cannot be read
    with pytest.raises(CommandError, match=r"disc/more.png: Input/output error; expected a file that can be"):
        data.load(str(source))


@pytest.mark.parametrize("link", ["disc", "disc/more.png"])
def test_a_link_to_nothing_is_one_clear_line(link: str, toy_folder: Path, tmp_path: Path) -> None:
    """As in an archive: the images of a class whose disk is not mounted would be missing silently."""
    source = shutil.copytree(toy_folder, tmp_path / "source")
    if link == "disc":
        shutil.rmtree(source / link)
    (source / link).symlink_to("nowhere")
    with pytest.raises(CommandError, match=rf"No such file or directory: '.*/{link}'; expected a folder"):
        data.load(str(source))


def test_a_damaged_archive_is_one_clear_line(tmp_path: Path) -> None:
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
