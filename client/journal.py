"""Every row as soon as it arrives, in a JSON Lines file that survives a kill: what ``--resume`` continues from.

Its first line says what the rows hold; the rows follow in the order of arrival. At the end the output, in whatever
format, is made from it, in the order of the images.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from client.errors import ClientError
from client.rows import Row


class Journal:
    """The rows in ``file``, with only their positions in memory. ``asked`` is what all of them must agree on."""

    def __init__(self, file: IO[bytes], asked: dict[str, Any]) -> None:
        self._file = file
        self._places: dict[str, int] = {}
        self._failed: set[str] = set()
        self._recover(asked)

    def _recover(self, asked: dict[str, Any]) -> None:
        """Read what is there, and drop a last line that was cut short."""
        end = self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            content = self._parse(line)
            if not end and content != asked:
                raise ClientError(f"{self._file.name} was begun with {content}, not {asked}: resume it with the same")
            if end:
                self._note(content, end)
            end += len(line)
        self._file.truncate(end)
        if not end:
            self._write([asked])

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(line)
        except ValueError:
            raise ClientError(f"{self._file.name} is no journal of this command: {line[:40]!r}") from None
        return content

    def add(self, rows: list[Row]) -> None:
        """Write ``rows``: once this returns, killing this process does not lose them."""
        for row, place in zip(rows, self._write(rows), strict=True):
            self._note(row, place)

    def _note(self, row: Row, place: int) -> None:
        self._places[row["path"]] = place
        if row["error_code"]:
            self._failed.add(row["path"])

    def _write(self, contents: list[dict[str, Any]]) -> list[int]:
        """Append one line for each of ``contents``; returns the position of each."""
        lines = [json.dumps(content).encode() + b"\n" for content in contents]
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(b"".join(lines))
        self._file.flush()
        return [place := place + length for length in (0, *map(len, lines[:-1]))]

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def failures(self, names: Iterable[str]) -> int:
        """How many of the images ``names`` have an error."""
        return sum(name in self._failed for name in names)

    def rows(self, names: Iterable[str]) -> Iterator[Row]:
        """The rows of the images ``names``, in that order."""
        for name in names:
            self._file.seek(self._places[name])
            row: Row = json.loads(self._file.readline())
            yield row


def beside(out: Path) -> Path:
    """The path of an output's journal."""
    return out.with_name(out.name + ".part")


@contextmanager
def opened(out: Path | None, resume: bool, asked: dict[str, Any]) -> Iterator[Journal]:
    """The journal of ``out``, or a temporary one if the output is a table. Raises ``ClientError`` or ``OSError``."""
    if out is None:
        with tempfile.TemporaryFile() as temporary:
            yield Journal(temporary, asked)
        return
    path = beside(out)
    if path.exists() and not resume:
        raise ClientError(f"{path} is of a run that did not end: expected --resume, or no such file")
    if out.exists() and not path.exists():
        raise ClientError(f"{out} is there already: remove it, or name another")
    with path.open("a+b") as file:
        _lock(file)
        kept = Journal(file, asked)
        try:
            yield kept
        finally:
            if not len(kept):
                path.unlink()


def _lock(file: IO[bytes]) -> None:
    """Lock the file until it is closed, even by a kill."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ClientError(f"{file.name}: another process is writing it") from None
