"""Sort the images that a service has kept for review into folders by verdict, for a person to correct.

    python -m train.review REVIEW OUT

REVIEW is the folder that the service's REVIEW_DIRECTORY names. Each image is copied to OUT/<predicted class>/, under
its name, the SHA-256. Move those in the wrong folder, delete those of no class, and train on the rest. Call it again
once more images are kept: none is copied twice, even if it has been moved, within OUT or out of it, or deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import orjson

from model.tables import aligned
from train import command
from train.command import CommandError

NAME = re.compile("[0-9a-f]{64}")
"""Stem of a kept image and of the JSON file beside it: the image's SHA-256."""
RECORD = ".copied"
"""File in OUT with the name of every image ever copied there, one a line."""
PARTIAL = ".partial"
"""File in OUT that becomes the next image: a copy that is interrupted must not pass for an image."""
PRIVATE = 0o700
"""Mode of OUT, as of REVIEW: the images are those of the service's callers."""


class Verdict(NamedTuple):
    """What the service said of an image."""

    class_name: str
    confidence: float
    is_foreign: bool


class Outcome(NamedTuple):
    """The verdicts on the images copied by a call, how many were copied before, and why others were skipped."""

    copied: list[Verdict]
    copied_before: int
    skipped: list[str]


def sort(review: Path, out: Path) -> Outcome:
    """Copy each image of ``review`` into the folder of its class in ``out``, unless it has ever been there."""
    if not review.is_dir():
        raise CommandError(f"{review}: not a folder; expected the one that REVIEW_DIRECTORY names")
    if review.resolve().is_relative_to(out.resolve()):
        raise CommandError(f"{out}: {review} is in it; expected another folder for the copies")
    images = sorted(file for file in review.iterdir() if NAME.fullmatch(file.stem) and file.suffix != ".json")
    out.mkdir(PRIVATE, parents=True, exist_ok=True)
    copied, skipped = [], []
    with (out / RECORD).open("a+") as record:
        record.seek(0)
        known = {*record.read().split(), *(file.stem for file in out.rglob("*"))}
        new = [image for image in images if image.stem not in known]
        for image in new:
            try:
                content, verdict = _read(image)
            except ValueError as error:
                skipped.append(f"{image.name}: {error}")
                continue
            folder = out / verdict.class_name
            folder.mkdir(exist_ok=True)
            (out / PARTIAL).write_bytes(content)
            (out / PARTIAL).rename(folder / image.name)
            record.write(f"{image.stem}\n")
            copied.append(verdict)
    return Outcome(copied, len(images) - len(new), skipped)


def _read(image: Path) -> tuple[bytes, Verdict]:
    """An image and the verdict in the JSON file beside it; raises ``ValueError`` if they are not whole."""
    line = image.with_suffix(".json")
    try:
        content, told = image.read_bytes(), line.read_bytes()
    except FileNotFoundError as error:  # the service may be writing it, or have removed both
        raise ValueError(f"no {Path(error.filename).name}") from None
    if hashlib.sha256(content).hexdigest() != image.stem:
        raise ValueError("damaged; expected content with the SHA-256 that its name is")
    try:
        about = orjson.loads(told)
        # Lines of earlier versions do not say whether the image is foreign.
        verdict = Verdict(about["class"], float(about["confidence"]), not about.get("in_distribution", True))
        if not _is_folder_name(verdict.class_name):
            raise ValueError(f"class {verdict.class_name!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{line.name} is broken ({error!r}); expected the line that the service wrote") from None
    return content, verdict


def _is_folder_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & set(name)


def table(verdicts: list[Verdict]) -> str:
    """Number, mean confidence and number of foreign images of each predicted class."""
    by_class: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_class[verdict.class_name].append(verdict)
    rows = [
        (
            name,
            str(len(members)),
            f"{statistics.fmean(member.confidence for member in members):.3f}",
            str(sum(member.is_foreign for member in members)),
        )
        for name, members in sorted(by_class.items())
    ]
    return aligned([("class", "images", "mean confidence", "foreign"), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("review", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    copied, copied_before, skipped = sort(options.review, options.out)
    print(f"{options.out}: {len(copied)} new images, {copied_before} copied before, {len(skipped)} skipped")
    print(*skipped, sep="\n", end="\n" if skipped else "")
    if copied:
        print(table(copied))


if __name__ == "__main__":
    command.run(main)
