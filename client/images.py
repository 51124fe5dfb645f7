"""Which images the arguments mean, and how they are read: never more than a few batches at once."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from client.errors import ClientError
from client.rows import Reply, failure

SUFFIXES = frozenset((".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
"""Suffixes of the files taken from a folder. A file named on its own is always taken.

They are Pillow's for the service's formats; asking Pillow would take longer than starting without it."""
BATCH_BYTES = 16 * 2**20
"""A batch ends before it grows larger: half of what the service accepts in one request by default."""
FILE_BYTES = 64 * 2**20
"""A larger file is not read."""


def find(arguments: Iterable[str]) -> dict[str, Path]:
    """Every image that the files, folders and globs contain, by its name: in their order; within a folder, by path.

    Each path appears once. Raises ``ClientError`` for an argument that matches nothing and for two paths of the same
    name, and ``OSError`` for a folder that cannot be read, at any depth: images would silently be missing.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        paths = list(_expand(argument))
        if not paths:
            raise ClientError(f"{argument}: expected a file, a folder of images, or a pattern that some match")
        for path in paths:
            if found.setdefault(_name(path), path) != path:
                raise ClientError(f"{_name(path)}: expected one file with this name in the output, found two")
    return found


def _expand(argument: str) -> Iterator[Path]:
    path = Path(argument)
    if path.is_dir():
        yield from _walk(path)
    elif path.exists():
        yield path
    else:
        for match in sorted(_matches(argument)):
            yield from _walk(Path(match)) if Path(match).is_dir() else (Path(match),)


def _matches(pattern: str) -> Iterator[str]:
    """Like ``glob``, whose ``**`` would loop where a link leads back."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.iglob(pattern)  # noqa: PTH207 # Path.glob takes no absolute pattern
        return
    place = parts.index("**")
    rest = parts[place + 1 :]
    for root in _matches(str(Path(*parts[:place]))):
        if not rest:
            yield root  # if it is a folder, everything in it is taken anyway
        elif Path(root).is_dir():
            for folder, _ in _folders(Path(root), with_hidden=False):
                yield from _matches(str(Path(glob.escape(str(folder)), *rest)))


def _walk(folder: Path) -> Iterator[Path]:
    for directory, files in _folders(folder):
        yield from (Path(directory, name) for name in files if Path(name).suffix.lower() in SUFFIXES)


def _folders(root: Path, with_hidden: bool = True) -> Iterator[tuple[Path, list[str]]]:
    """``root`` and every folder in it with the names of its files, then the folders that links in them lead to.

    Each comes once, and the parents of ``root`` never: no link leads into a loop, or to a whole disk.
    """
    seen = {_identity(parent) for parent in root.resolve().parents}
    waiting = [root]
    for start in waiting:
        for directory, folders, files in os.walk(start, onerror=_refuse):
            if _identity(Path(directory)) in seen:
                folders.clear()
                continue
            seen.add(_identity(Path(directory)))
            folders[:] = sorted(name for name in folders if with_hidden or not name.startswith("."))
            waiting += [path for name in folders if (path := Path(directory, name)).is_symlink()]
            yield Path(directory), sorted(files)


def _identity(folder: Path) -> tuple[int, int]:
    """The same for a folder by whatever path."""
    about = folder.stat()
    return about.st_dev, about.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise error


def _name(path: Path) -> str:
    """A path as it appears in the output: it may hold bytes that are not text."""
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
        return 0  # reading it will report the error


def read(path: Path) -> bytes | Reply:
    """The content of a file, or the error that takes its place."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe waits for someone to write to it
            return failure("unreadable", "a pipe, a socket or a device; expected a file")
        with path.open("rb") as file:
            content = file.read(FILE_BYTES + 1)
    except OSError as error:
        return failure("unreadable", error.strerror or str(error))
    if len(content) > FILE_BYTES:
        return failure("too_large", f"the file has more than {FILE_BYTES} bytes")
    return content
