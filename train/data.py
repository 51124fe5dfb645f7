"""Load labelled images into memory, from CIFAR-10 or from any folder or archive of images.

The SOURCE of every command is ``cifar10`` (downloaded and verified by torchvision), a folder, or a tar archive. A
folder or archive holds ``train/<class>/*``, ``test/<class>/*`` and optionally ``val/<class>/*``; or only ``<class>/*``,
of which about a tenth becomes the test split.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import re
import statistics
import tarfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model.headers import ImageError, read_header
from model.preprocess import Pixels, inspect, preprocess, render, resize
from train.command import CommandError

CIFAR10 = "cifar10"
DOWNLOADS = Path("data")
VALIDATION_SHARE = 0.05
TEST_SHARE = 0.1
"""Share of a flat folder that becomes its test split."""
HELD_OUT_SHARE = TEST_SHARE + (1 - TEST_SHARE) * VALIDATION_SHARE
"""Share of a flat folder that becomes its test and validation splits."""
SPLIT_SEED = 0
"""Independent of the training seed, so that runs with different seeds are evaluated on the same images."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Folder names of each split, in any case."""
PEAK_COPIES = 2
"""Peak memory as a multiple of the decoded pixels, while the images of a split become one array."""
DIGEST_BITS = 63
"""Bits of a digest: as many as fit into an int64 tensor."""
MIN_SIDE, MAX_SIDE, SIDE_STEP = 16, 224, 8
MIN_STD = 1.0
"""Least standard deviation assumed of a channel, in units of 0..255, so that dividing by it stays finite."""
BATCH_PIXELS = 512 * 64 * 64
"""Most pixels in a batch whose size was not specified: the default network needs about 3 GB to train on them."""


def batch_of(size: tuple[int, int], most: int) -> int:
    """Batch size for images of ``size`` (height, width): ``most``, or fewer of large images, to save memory."""
    return max(1, min(most, BATCH_PIXELS // (size[0] * size[1])))


@dataclass(frozen=True)
class Split:
    """``images`` (N, H, W, 3) uint8 RGB and their ``labels`` (N,) int64."""

    images: Pixels
    labels: NDArray[np.int64]
    names: tuple[str, ...] = ()
    """The file of each image, or its index in CIFAR-10."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Original width and height of each image, before resizing."""
    digests: tuple[int, ...] = ()
    """``digest`` of the content of each file: the same whatever the size of ``images``."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """The splits of a source. ``test`` is only for measuring finished artifacts, never for training or export."""

    source: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    skipped: tuple[str, ...] = field(default=())
    """Files and folders that were not used, each with the reason."""
    by_content: bool = False
    """Whether a file's content decides its split, as in a flat source: it has the same split in every such source."""

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def input_size(self) -> tuple[int, int]:
        return self.train.images.shape[1], self.train.images.shape[2]

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each RGB channel of the training pixels, in units of 0..255."""
        counts = np.zeros((3, 256))
        for image in self.train.images:
            for channel in range(3):
                counts[channel] += cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel()
        values, histograms = np.arange(256), counts / counts[0].sum()
        means = [float(h @ values) for h in histograms]
        stds = [float((h @ (values - m) ** 2) ** 0.5) for h, m in zip(histograms, means, strict=True)]
        return tuple(round(m, 3) for m in means), tuple(round(max(s, MIN_STD), 3) for s in stds)

    def sha256(self) -> str:
        """Hash of all pixels and labels of all splits: the same data has the same hash whatever its container."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for split in self.splits.values():
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(split.labels.tobytes())
        return digest.hexdigest()


Files = Mapping[str, bytes]
"""The content of each file, by path relative to the root of the source."""


class Folder(Files):
    """The files of a folder, each read on access, because photographs may exceed memory.

    Symbolic links to folders are followed, except in a cycle. Raises ``OSError`` for a folder that cannot be read,
    whose images would otherwise be missing silently.
    """

    def __init__(self, root: Path) -> None:
        self.empty: list[str] = []
        """Empty folders: a class whose images were not copied would otherwise be missing silently."""
        self._paths = {path.relative_to(root).as_posix(): path for path in _walk(root, self.empty)}

    def __getitem__(self, name: str) -> bytes:
        """Raises ``CommandError`` for a file that cannot be read."""
        try:
            return self._paths[name].read_bytes()
        except OSError as error:
            raise CommandError(f"{self._paths[name]}: {error.strerror}; expected a file that can be read") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _walk(root: Path, empty: list[str]) -> Iterator[Path]:
    """Every file under ``root``, following links to folders except those that lead round in a cycle or up.

    Adds empty folders to ``empty``.
    """
    above: dict[Path, frozenset[Path]] = {}
    for directory, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        if not (folders or files):
            empty.append(Path(directory).relative_to(root).as_posix())
        here = Path(directory).resolve()
        passed = above.pop(Path(directory), frozenset()) | {here}
        targets = {name: (here / name).resolve() for name in folders}
        folders[:] = [name for name, to in targets.items() if to not in passed and not here.is_relative_to(to)]
        above.update((Path(directory, name), passed) for name in folders)
        yield from (path for name in files if (path := Path(directory, name)).is_file())


def _refuse(error: OSError) -> NoReturn:
    raise error


def test_files(source: str) -> list[tuple[str, bytes]]:
    """Class name and content of every test image of a folder or archive, as a client would send it."""
    if source == CIFAR10:
        raise CommandError(f"{CIFAR10!r} has no files to send; expected a folder or a tar archive")
    files = read_files(Path(source))
    names = _arrange(source, files).test
    found = ((PurePosixPath(name).parts[-2], files[name]) for name in names)
    return [(class_name, content) for class_name, content in found if _is_image(content)]


def _is_image(content: bytes) -> bool:
    try:
        render(content, inspect(content), (MIN_SIDE, MIN_SIDE))
    except ImageError:
        return False
    return True


def load(source: str, size: tuple[int, int] | None = None) -> Data:
    """Decode all of ``source`` into memory, at ``size`` (height, width) or at a size chosen from the training images.

    Raises ``CommandError`` if the source is missing or offline, has fewer than two classes or a class without images in
    some split, or needs more memory than there is.
    """
    if source == CIFAR10:
        return _load_cifar10(size)
    files = read_files(Path(source))
    arranged = _arrange(source, files)
    classes = tuple(sorted({PurePosixPath(n).parts[-2] for n in (*arranged.train, *arranged.val, *arranged.test)}))
    if len(classes) < 2:
        raise CommandError(f"{source}: found classes {list(classes)}; expected at least two folders of images")
    for name in classes:
        if name != name.encode(errors="replace").decode():
            raise CommandError(f"{source}: the folder {name!r}; expected a name in UTF-8")
    if not arranged.train:
        raise CommandError(
            f"{source}: validation and test take all {len(files)} files; expected 3 and more of each class"
        )
    size = size or _choose_size(files[name] for name in arranged.train)
    _require_memory(source, size, len(arranged.train) + len(arranged.val) + len(arranged.test))
    skipped = [f"{name}: in a folder that is no class of a split" for name in sorted(arranged.unused)]
    skipped += [f"{name}: an empty folder" for name in sorted(files.empty)] if isinstance(files, Folder) else []
    train, val, test = (
        _decode_split(name, getattr(arranged, name), files, classes, size, skipped) for name in ("train", "val", "test")
    )
    for kind, split in (("training", train), ("validation", val), ("test", test)):
        without = [name for index, name in enumerate(classes) if not (split.labels == index).any()]
        if without:
            raise CommandError(f"{source}: no {kind} image of {', '.join(without)}; expected some of every class")
    return Data(source, classes, train, val, test, tuple(skipped), arranged.by_content)


def _require_memory(source: str, size: tuple[int, int], images: int) -> None:
    """Raise ``CommandError`` if so many images need more memory than there is: the kernel would kill this process."""
    needed, available = PEAK_COPIES * images * size[0] * size[1] * 3, available_memory()
    if needed > available:
        raise CommandError(
            f"{source}: {images} images of {size[0]}x{size[1]} pixels take {needed / 2**30:.1f} GiB of memory; "
            f"expected at most {available / 2**30:.1f}, which a smaller --size takes"
        )


def available_memory() -> int:
    """Bytes of memory still available, by the kernel's own estimate (``MemAvailable``, proc(5))."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _load_cifar10(size: tuple[int, int] | None) -> Data:
    from torchvision import datasets

    try:
        DOWNLOADS.mkdir(exist_ok=True)
        # The first process on this machine downloads; the others wait, and find the files.
        with (DOWNLOADS / "cifar10.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            train, test = (datasets.CIFAR10(DOWNLOADS, train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError) as error:
        raise CommandError(
            f"cifar10: cannot be downloaded ({error}); expected a network connection, the extracted archive in "
            f"{DOWNLOADS}/, or a folder of images as the source"
        ) from error
    held_out = stratified(train.targets, VALIDATION_SHARE)
    return Data(
        CIFAR10,
        tuple(train.classes),
        _cifar10_split(train, "train", ~held_out, size),
        _cifar10_split(train, "train", held_out, size),
        _cifar10_split(test, "test", np.ones(len(test.targets), bool), size),
    )


def _cifar10_split(part: Any, name: str, chosen: NDArray[np.bool_], size: tuple[int, int] | None) -> Split:
    images = part.data[chosen]
    if size:
        images = np.stack([resize(image, size) for image in images])
    names = tuple(f"{name}[{index}]" for index in np.flatnonzero(chosen))
    digests = tuple(digest(image.tobytes()) for image in part.data[chosen])
    return Split(images, np.asarray(part.targets, np.int64)[chosen], names, ((32, 32),) * len(images), digests)


def is_part_of(source: str, origin: str) -> bool:
    """Whether a source is ``origin`` or a part of it, by its name: ``cifar10-jpeg.tar.gz`` is part of ``cifar10``."""
    return re.match(rf"{origin}(?!\d)", source) is not None


def read_files(root: Path) -> Files:
    """The files of a folder or, held in memory, of a tar archive; raises ``CommandError`` if it cannot be read."""
    content: dict[str, bytes] = {}
    try:
        if root.is_dir():
            return Folder(root)
        with tarfile.open(root) as archive:
            for member in archive:
                if file := archive.extractfile(member):
                    content[PurePosixPath(member.name).as_posix()] = file.read()
            # An archive ends with a block of zeros, but tarfile takes anything else there for the end, too.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset}")
    # Besides its own errors, tarfile lets decompression errors through, and a KeyError for a dangling link.
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise CommandError(f"{root}: {error}; expected a folder, a tar archive or {CIFAR10!r}") from error
    return content


class Photos(NamedTuple):
    """Images of any size in some folders of a source, preprocessed as in the service."""

    images: list[Pixels]
    folders: list[str]
    """The name of the folder of each image."""
    unreadable: int
    of_other_folders: int


def read_photos(source: Path, size: tuple[int, int], is_wanted: Callable[[str], bool]) -> Photos:
    """The images of ``source``, at ``size``, in folders of a name that ``is_wanted``."""
    images: list[Pixels] = []
    folders: list[str] = []
    unreadable = of_other_folders = 0
    files = read_files(source)
    for name in sorted(files):
        folder = PurePosixPath(name).parent.name
        if not is_wanted(folder):
            of_other_folders += 1
            continue
        try:
            images.append(preprocess(files[name], size))
        except ImageError:
            unreadable += 1
            continue
        folders.append(folder)
    return Photos(images, folders, unreadable, of_other_folders)


class Arrangement(NamedTuple):
    """File names by split; the class of a file is the folder it lies in."""

    train: list[str]
    val: list[str]
    test: list[str]
    by_content: bool = False
    unused: tuple[str, ...] = ()
    """Files that belong to no split, though the source has folders of splits."""


def _arrange(source: str, files: Files) -> Arrangement:
    by_folder: dict[str, list[str]] = {}
    for name in sorted(files):
        parts = PurePosixPath(name).parts
        if len(parts) >= 2 and not any(part.startswith(".") for part in parts):
            folder = parts[-3] if len(parts) >= 3 else ""
            by_folder.setdefault(SPLITS.get(folder.lower(), folder), []).append(name)
    if "train" not in by_folder:
        if split := next((name for name in ("test", "val") if name in by_folder), None):
            raise CommandError(f"{source}: found {split}/ but no train/; expected both, or just folders of classes")
        return _hold_out(files, sorted(name for group in by_folder.values() for name in group))
    if "test" not in by_folder:
        raise CommandError(f"{source}: found train/ but no test/; expected both, or just folders of classes")
    train, test = by_folder["train"], by_folder["test"]
    unused = tuple(name for folder in by_folder.keys() - set(SPLITS.values()) for name in by_folder[folder])
    if val := by_folder.get("val"):
        return Arrangement(train, val, test, unused=unused)
    # By position, not by content: the shipped models were trained on all but these validation images; a different draw
    # would put some of their training images into the validation split.
    held_out = stratified([PurePosixPath(name).parts[-2] for name in train], VALIDATION_SHARE).tolist()
    train, val = (
        [name for name, held in zip(train, held_out, strict=True) if held is wanted] for wanted in (False, True)
    )
    return Arrangement(train, val, test, unused=unused)


def _hold_out(files: Files, names: list[str]) -> Arrangement:
    """Hold out about TEST_SHARE of each class for test and VALIDATION_SHARE of the rest for validation, at least one.

    A file's content decides, not its position or name: it is held out if its digest is below a limit, or the lowest of
    its class. So a training image stays one when files are added or the folder is renamed; otherwise a model that
    continues from one of the smaller folder would be evaluated on images it has seen. Only in a class so small that
    none would be left for training does the number of images matter too. Files that are no images are put into
    training, where decoding reports them.
    """
    by_class: dict[str, list[tuple[float, str]]] = {}
    train: list[str] = []
    for name in names:
        content = files[name]
        if _has_header(content):
            by_class.setdefault(PurePosixPath(name).parts[-2], []).append((digest(content) / 2**DIGEST_BITS, name))
        else:
            train.append(name)
    val: list[str] = []
    test: list[str] = []
    for members in by_class.values():
        members.sort()
        places, ordered = zip(*members, strict=True)
        # At least one image for test and one for validation, and one left for training, if there are so many.
        test_end = max(1, min(bisect_left(places, TEST_SHARE), len(members) - 2))
        val_end = max(test_end + 1, min(bisect_left(places, HELD_OUT_SHARE), len(members) - 1))
        test += ordered[:test_end]
        val += ordered[test_end:val_end]
        train += ordered[val_end:]
    return Arrangement(sorted(train), sorted(val), sorted(test), by_content=True)


def _has_header(content: bytes) -> bool:
    try:
        read_header(content)
    except ImageError:
        return False
    return True


def digest(content: bytes) -> int:
    """The first ``DIGEST_BITS`` bits of the SHA-256 of ``content``."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) >> (64 - DIGEST_BITS)


def stratified(labels: list[str] | list[int], share: float) -> NDArray[np.bool_]:
    """A mask over ``labels`` (N,) that holds out ``share`` of each class, at least one image, by a fixed seed."""
    rng = np.random.default_rng(SPLIT_SEED)
    values = np.asarray(labels)
    mask = np.zeros(len(values), bool)
    for value in np.unique(values):
        members = np.flatnonzero(values == value)
        mask[rng.choice(members, max(1, round(share * len(members))), replace=False)] = True
    return mask


def _choose_size(contents: Iterable[bytes]) -> tuple[int, int]:
    """A square with the median shorter side of the training images, in steps of 8 between 16 and 224 pixels."""
    sides = []
    for content in contents:
        try:
            header = read_header(content)
        except ImageError:
            continue
        sides.append(min(header.width, header.height))
    if not sides:
        raise CommandError("no training image could be read")
    side = round(statistics.median(sides) / SIDE_STEP) * SIDE_STEP
    return (min(max(side, MIN_SIDE), MAX_SIDE),) * 2


def _decode_split(
    split: str,
    names: list[str],
    files: Files,
    classes: tuple[str, ...],
    size: tuple[int, int],
    skipped: list[str],
) -> Split:
    images: list[Pixels] = []
    sizes: list[tuple[int, int]] = []
    digests: list[int] = []
    read: list[str] = []
    for name in tqdm(names, desc=f"decode {split}", unit="img", leave=False, disable=None):
        try:
            content = files[name]
            header = inspect(content)
            images.append(render(content, header, size))
        except ImageError as error:
            skipped.append(f"{name}: {error}")
            continue
        sizes.append((header.width, header.height))
        digests.append(digest(content))
        read.append(name)
    if not images:
        raise CommandError(f"split {split!r} has no readable image among {len(names)} files")
    labels = [classes.index(PurePosixPath(name).parts[-2]) for name in read]
    return Split(np.stack(images), np.asarray(labels, np.int64), tuple(read), tuple(sizes), tuple(digests))
