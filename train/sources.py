"""The files of a source, which is a folder or a tar archive."""

from __future__ import annotations

import lzma
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NoReturn

from train.command import CommandError

Files = Mapping[str, bytes]
"""The content of each file, by path relative to the root of the source."""


class Folder(Files):
    """The files of a folder, each read on access, because photographs may exceed memory.

    Symbolic links to folders are followed, except in a cycle. Raises ``OSError`` for a folder that cannot be read and
    for a link to nothing, whose images would otherwise be missing silently.
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
        yield from (path for name in files if stat.S_ISREG((path := Path(directory, name)).stat().st_mode))


def _refuse(error: OSError) -> NoReturn:
    raise error


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
        raise CommandError(f"{root}: {error}; expected a folder, a tar archive or 'cifar10'") from error
    return content
