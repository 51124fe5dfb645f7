"""Divide the files of a source into training, validation and test images, the same way every time."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.headers import ImageError, read_header
from train.command import CommandError
from train.sources import Files

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
DIGEST_BITS = 63
"""Bits of a digest: as many as fit into an int64 tensor."""


class Arrangement(NamedTuple):
    """File names by split."""

    train: list[str]
    val: list[str]
    test: list[str]
    by_content: bool = False
    unused: tuple[str, ...] = ()
    """Files that belong to no split, though the source has folders of splits."""

    @property
    def splits(self) -> dict[str, list[str]]:
        return {"train": self.train, "val": self.val, "test": self.test}


def class_of(name: str) -> str:
    """The class of a file: the folder that it lies in."""
    return PurePosixPath(name).parent.name


def arrange(source: str, files: Files) -> Arrangement:
    """The split of each file, by the folders of ``source`` or, in a flat one, by the files' content."""
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
    held_out = stratified([class_of(name) for name in train], VALIDATION_SHARE).tolist()
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
            by_class.setdefault(class_of(name), []).append((digest(content) / 2**DIGEST_BITS, name))
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
