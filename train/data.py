"""Load labelled images into memory, from CIFAR-10 or from any folder or archive of images.

The SOURCE of every command is ``cifar10`` (downloaded and verified by torchvision), a folder, or a tar archive. A
folder or archive holds ``train/<class>/*``, ``test/<class>/*`` and optionally ``val/<class>/*``; or only ``<class>/*``,
of which about a tenth becomes the test split.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import statistics
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model.headers import Header, ImageError, read_header
from model.preprocess import Pixels, decode, inspect, preprocess, reduction, render, resize
from train.command import CommandError
from train.sources import Files, Folder, read_files
from train.splits import VALIDATION_SHARE, Arrangement, arrange, class_of, digest, stratified

CIFAR10 = "cifar10"
DOWNLOADS = Path("data")
PEAK_COPIES = 2
"""Peak memory as a multiple of the decoded pixels, while the images of a split become one array."""
MIN_SIDE, MAX_SIDE, SIDE_STEP = 16, 224, 8
MIN_STD = 1.0
"""Minimum standard deviation of a channel, in units of 0..255, so that dividing by it stays finite."""
BATCH_PIXELS = 512 * 64 * 64
"""Most pixels in a batch whose size was not specified: the default network needs about 3 GB to train on them."""


def batch_of(size: tuple[int, int], most: int) -> int:
    """Batch size for images of ``size`` (height, width): ``most``, or fewer of large images, to save memory."""
    return max(1, min(most, BATCH_PIXELS // (size[0] * size[1])))


def in_batches(images: Pixels, most: int) -> list[slice]:
    """Slices that together cover ``images``: ``most`` at a time, or fewer of large ones."""
    size = batch_of(images.shape[1:3], most)
    return [slice(start, start + size) for start in range(0, len(images), size)]


@dataclass(frozen=True)
class Split:
    """``images`` (N, H, W, 3) uint8 RGB and their ``labels`` (N,) int64."""

    images: Pixels
    labels: NDArray[np.int64]
    names: tuple[str, ...] = ()
    """The file of each image, or its index in CIFAR-10."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Original width and height of each image, before resizing but after EXIF rotation."""
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
    skipped: tuple[str, ...] = ()
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


def test_files(source: str) -> list[tuple[str, bytes]]:
    """Class name and content of every test image of a folder or archive, as a client would send it."""
    if source == CIFAR10:
        raise CommandError(f"{CIFAR10!r} has no files to send; expected a folder or a tar archive")
    files = read_files(Path(source))
    found = ((class_of(name), files[name]) for name in arrange(source, files).test)
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
    arranged = arrange(source, files)
    classes = _classes(source, arranged)
    if not arranged.train:
        raise CommandError(
            f"{source}: validation and test take all {len(files)} files; expected 3 and more of each class"
        )
    size = size or _choose_size(files[name] for name in arranged.train)
    _require_memory(source, size, sum(map(len, arranged.splits.values())))
    skipped = [f"{name}: in a folder that is no class of a split" for name in sorted(arranged.unused)]
    skipped += [f"{name}: an empty folder" for name in sorted(files.empty)] if isinstance(files, Folder) else []
    splits = {
        split: _decode_split(split, names, files, classes, size, skipped) for split, names in arranged.splits.items()
    }
    data = Data(source, classes, **splits, skipped=tuple(skipped), by_content=arranged.by_content)
    _require_every_class(data)
    return data


def _classes(source: str, arranged: Arrangement) -> tuple[str, ...]:
    classes = sorted({class_of(name) for names in arranged.splits.values() for name in names})
    if len(classes) < 2:
        raise CommandError(f"{source}: found classes {classes}; expected at least two folders of images")
    for name in classes:
        if name != name.encode(errors="replace").decode():
            raise CommandError(f"{source}: the folder {name!r}; expected a name in UTF-8")
    return tuple(classes)


def _require_every_class(data: Data) -> None:
    for kind, split in (("training", data.train), ("validation", data.val), ("test", data.test)):
        without = [name for index, name in enumerate(data.classes) if not (split.labels == index).any()]
        if without:
            raise CommandError(f"{data.source}: no {kind} image of {', '.join(without)}; expected some of every class")


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
        folder = class_of(name)
        if not is_wanted(folder):
            of_other_folders += 1
            continue
        try:
            images.append(preprocess(files[name], size))
            folders.append(folder)
        except ImageError:
            unreadable += 1
    return Photos(images, folders, unreadable, of_other_folders)


def _choose_size(contents: Iterable[bytes]) -> tuple[int, int]:
    """A square with the median shorter side of the training images, in steps of 8 between 16 and 224 pixels."""
    sides = []
    for content in contents:
        with suppress(ImageError):
            header = read_header(content)
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
            decoded = decode(content, header, reduction(header, size))
        except ImageError as error:
            skipped.append(f"{name}: {error}")
            continue
        images.append(resize(decoded, size))
        sizes.append(_upright(header, decoded))
        digests.append(digest(content))
        read.append(name)
    if not images:
        raise CommandError(f"split {split!r} has no readable image among {len(names)} files")
    labels = [classes.index(class_of(name)) for name in read]
    return Split(np.stack(images), np.asarray(labels, np.int64), tuple(read), tuple(sizes), tuple(digests))


def _upright(header: Header, decoded: Pixels) -> tuple[int, int]:
    """Width and height before resizing, swapped if the decoder turned the image on its side as its EXIF says.

    The header has the exact sizes; those of ``decoded`` may have been reduced.
    """
    height, width = decoded.shape[:2]
    is_turned = (header.width - header.height) * (width - height) < 0
    return (header.height, header.width) if is_turned else (header.width, header.height)
