"""Which images are meant, and how they are read: never more than a few batches at once."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from client.errors import ClientError
from client.rows import Reply, failure

SUFFIXES = frozenset((".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
"""Of the files that are taken from a folder. A file that is named itself is taken whatever it is called.

They are Pillow's for the formats of the service; to ask it would take longer than to start without it.
"""
BATCH_BYTES = 16 * 2**20
"""A batch ends before it is larger: half of what the service takes by default in one request."""
FILE_BYTES = 64 * 2**20
"""A larger file is not read."""


def find(arguments: Iterable[str]) -> dict[str, Path]:
    """Every image of files, folders and globs by its name, in the order of the arguments, those of a folder by path.

    Each path comes once. Raises ``ClientError`` for an argument that gives none, and ``OSError`` for a folder that
    cannot be read, at any depth: its images would be missing in silence.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        paths = list(_expand(argument))
        if not paths:
            raise ClientError(f"{argument}: expected a file, a folder of images, or a pattern that some match")
        found.update((_name(path), path) for path in paths)
    return found


def _expand(argument: str) -> Iterator[Path]:
    path = Path(argument)
    if path.is_dir():
        yield from _walk(path)
    elif path.exists():
        yield path
    else:
        for match in sorted(glob.iglob(argument, recursive=True)):  # noqa: PTH207 # Path.glob takes no absolute pattern
            yield from _walk(Path(match)) if Path(match).is_dir() else (Path(match),)


def _walk(folder: Path) -> Iterator[Path]:
    for directory, folders, files in os.walk(folder, onerror=_refuse):
        folders.sort()
        yield from (Path(directory, name) for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES)


def _refuse(error: OSError) -> NoReturn:
    raise error


def _name(path: Path) -> str:
    """As it stands in the output: a path may hold bytes that are no text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def batches(images: dict[str, Path], most: int) -> Iterator[dict[str, Path]]:
    """``images`` in batches of at most ``most``, and of about ``BATCH_BYTES``."""
    batch: dict[str, Path] = {}
    size = 0
    for name, path in images.items():
        length = _size(path)
        if batch and (len(batch) == most or size + length > BATCH_BYTES):
            yield batch
            batch, size = {}, 0
        batch[name] = path
        size += length
    if batch:
        yield batch


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will tell


def read(path: Path) -> bytes | Reply:
    """The content of a file, or the error that stands for it."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES + 1)
    except OSError as error:
        return failure("unreadable", error.strerror or str(error))
    if len(content) > FILE_BYTES:
        return failure("too_large", f"the file has more than {FILE_BYTES} bytes")
    return content
