"""Check the labelled images before spending hours of training on them.

    python -m train.check SOURCE [--all]

Reports classes and their balance, sizes, broken files, images in two splits (with the same pixels, or nearly so by a
perceptual hash) and images with the same pixels but different classes. ``train.fit`` runs this check first and keeps
the findings in ``run.json``. Only what makes training meaningless is an error. A few examples of each finding are
named, or all of them with --all.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from model.preprocess import Pixels
from model.tables import NAMED_CLASSES
from train import command
from train.command import CommandError
from train.data import Data, Split, load

EXAMPLES = 5
"""How many examples of a finding are named, unless all are asked for."""
MEANINGLESS = 0.5
"""Training is refused if a larger share of test images is in training too, or of training images has two labels."""
HASH_SIDE, HASH_KEPT = 32, 8
NEAR_BITS, NEAR_LEVELS = 6, 32
"""Largest Hamming distance of 64-bit hashes, and mean pixel difference, of near duplicates. Of 8,000 test images of
CIFAR-10, 121 are this near to a training image, 120 of them to one of their class; at 10 bits and any pixel difference
only 58 % share the class."""
PAIRS_AT_ONCE = 2**22
"""Pairs of hashes compared at a time."""

Findings = dict[str, Any]
Hashes = NDArray[np.uint64]


class LabelledImage(NamedTuple):
    """An image of a split, as a finding names it."""

    split: str
    class_name: str
    name: str

    def __str__(self) -> str:
        return f"{self.split} {self.name} ({self.class_name})"


def check(data: Data, examples: int | None = EXAMPLES) -> Findings:
    """The findings about ``data``, as stored in ``run.json``, with up to ``examples`` of each, or all if None.

    Raises ``CommandError`` if training would be meaningless.
    """
    groups = exact_duplicates(data)
    leaked = [group for group in groups if len({image.split for image in group}) > 1]
    conflicting = [group for group in groups if len({image.class_name for image in group}) > 1]
    _refuse_meaningless(data, leaked, conflicting)

    def finding(lines: Iterable[str]) -> dict[str, Any]:
        every = list(lines)
        return {"count": len(every), "examples": every[:examples]}

    return {
        "images": {name: _counts(data, split) for name, split in data.splits.items()},
        "sizes": _sizes([size for split in data.splits.values() for size in split.sizes], data.input_size),
        "broken": finding(data.skipped),
        "same_pixels_in_two_splits": finding(" = ".join(map(str, group)) for group in leaked),
        "same_pixels_two_classes": finding(" = ".join(map(str, group)) for group in conflicting),
        "repeated_within_a_split": sum(len(group) - len({image.split for image in group}) for group in groups),
        "nearly_in_training": {name: finding(near_duplicates(data, name)) for name in ("val", "test")},
    }


def exact_duplicates(data: Data) -> list[list[LabelledImage]]:
    """Groups of two or more images with the same pixels, in any split."""
    groups: dict[bytes, list[LabelledImage]] = defaultdict(list)
    for name, split in data.splits.items():
        for index, image in enumerate(split.images):
            groups[hashlib.sha256(image).digest()].append(_labelled(data, name, index))
    return [group for group in groups.values() if len(group) > 1]


def near_duplicates(data: Data, split: str) -> list[str]:
    """The images of ``split`` whose nearest training image, by hash, has almost but not exactly the same pixels.

    Among equally near hashes, the image with the nearest pixels counts.
    """
    held = data.splits[split]
    ours, theirs = perceptual_hashes(held.images), perceptual_hashes(data.train.images)
    step = max(1, PAIRS_AT_ONCE // len(theirs))
    result = []
    for start in range(0, len(ours), step):
        bits = np.bitwise_count(ours[start : start + step, None] ^ theirs)
        least = bits.min(axis=1)
        for row in np.flatnonzero(least <= NEAR_BITS).tolist():
            index, alike = start + row, np.flatnonzero(bits[row] == least[row]).tolist()
            levels, nearest = min((_levels(held.images[index], data.train.images[i]), i) for i in alike)
            if 0 < levels <= NEAR_LEVELS:
                result.append(f"{_labelled(data, split, index)} ~ {_labelled(data, 'train', nearest)}")
    return result


def _levels(one: Pixels, other: Pixels) -> float:
    """Mean absolute difference of the pixels, in units of 0..255."""
    return float(cv2.norm(one, other, cv2.NORM_L1)) / one.size


def perceptual_hashes(images: Pixels) -> Hashes:
    """(N,) uint64: which of an image's 8x8 lowest frequencies (DCT of the gray image) are above their median.

    The hash hardly changes with compression, small shifts, brightness or contrast (Zauner, 2010, "pHash").
    """
    lowest = np.stack([_low_frequencies(image) for image in images])
    bits = lowest > np.median(lowest, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _low_frequencies(image: Pixels) -> NDArray[np.float32]:
    gray = cv2.resize(
        cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA
    ).astype(np.float32)
    return np.asarray(cv2.dct(gray)[:HASH_KEPT, :HASH_KEPT].ravel(), np.float32)


def _labelled(data: Data, split: str, index: int) -> LabelledImage:
    held = data.splits[split]
    return LabelledImage(split, data.classes[held.labels[index]], held.names[index])


def _counts(data: Data, split: Split) -> dict[str, int]:
    counts = Counter(split.labels.tolist())
    return {name: counts[index] for index, name in enumerate(data.classes)}


def _sizes(sizes: list[tuple[int, int]], input_size: tuple[int, int]) -> dict[str, Any]:
    """Smallest, median and largest width and height, and how many images have to be enlarged."""
    widths, heights = np.asarray(sizes).T
    height, width = input_size
    return {
        "width": [int(value) for value in np.quantile(widths, [0, 0.5, 1])],
        "height": [int(value) for value in np.quantile(heights, [0, 0.5, 1])],
        "enlarged": int(((widths < width) | (heights < height)).sum()),
    }


def _refuse_meaningless(data: Data, leaked: list[list[LabelledImage]], conflicting: list[list[LabelledImage]]) -> None:
    # A test image that is only in validation too is a finding, but was not trained on.
    trained = [group for group in leaked if any(image.split == "train" for image in group)]
    tested = sum(image.split == "test" for group in trained for image in group)
    if tested > MEANINGLESS * len(data.test):
        raise CommandError(f"{data.source}: {tested} of {len(data.test)} test images are training images as well")
    doubtful = sum(image.split == "train" for group in conflicting for image in group)
    if doubtful > MEANINGLESS * len(data.train):
        raise CommandError(f"{data.source}: {doubtful} of {len(data.train)} training images are in two classes")


def print_findings(findings: Findings) -> None:
    """Print the findings, zero counts included."""
    for split, counts in findings["images"].items():
        print(f"  {split:5} {sum(counts.values()):6}  {_by_class(counts)}")
    trained = findings["images"]["train"]
    print(f"  balance: the largest class has {max(trained.values()) / min(trained.values()):.2f} times the smallest")
    sizes = findings["sizes"]
    ranges = ", ".join(
        f"{side} {low} to {high} (median {middle})"
        for side, (low, middle, high) in ((side, sizes[side]) for side in ("width", "height"))
    )
    print(f"  sizes: {ranges}; {sizes['enlarged']} images are smaller than the input")
    _print_finding("broken files", findings["broken"])
    _print_finding("images in two splits (same pixels)", findings["same_pixels_in_two_splits"])
    _print_finding("images in two classes (same pixels)", findings["same_pixels_two_classes"])
    print(f"  further copies within a split: {findings['repeated_within_a_split']}")
    for split, finding in findings["nearly_in_training"].items():
        _print_finding(f"{split} images with a near duplicate in training", finding)


def _by_class(counts: dict[str, int]) -> str:
    if len(counts) > NAMED_CLASSES:
        return f"{len(counts)} classes of {min(counts.values())} to {max(counts.values())}"
    return " ".join(f"{name}={count}" for name, count in counts.items())


def _print_finding(title: str, finding: dict[str, Any]) -> None:
    print(f"  {title}: {finding['count']}", *finding["examples"], sep="\n    ")
    if unnamed := finding["count"] - len(finding["examples"]):
        print(f"    and {unnamed} more: python -m train.check --all names them")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--all", action="store_true", help="name every example of each finding")
    options = parser.parse_args()
    data = load(options.source)
    print(f"{data.source}: {len(data.classes)} classes, input {data.input_size}, sha256 {data.sha256()[:16]}")
    print_findings(check(data, None if options.all else EXAMPLES))


if __name__ == "__main__":
    command.run(main)
