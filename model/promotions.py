"""Which version of a model is served, and which were before: ``promotions.json`` beside the versions of a name.

BentoML's ``latest`` is whatever entered the store last; entering the store must not mean going into production.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, TypeAdapter

FILE = "promotions.json"


class Promotion(BaseModel):
    """One entry of the history: ``MODEL=name`` went from one version to another."""

    time: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    action: Literal["promote", "rollback"]
    before: str | None
    after: str


_HISTORY = TypeAdapter(list[Promotion])


def read(folder: Path) -> list[Promotion]:
    """The history in ``folder``, oldest first; empty if there is no file. Raises ``ValueError`` for a malformed one."""
    try:
        return _HISTORY.validate_json((folder / FILE).read_bytes())
    except FileNotFoundError:
        return []


def append(folder: Path, action: Literal["promote", "rollback"], version: str) -> None:
    """Add ``version`` to the history in ``folder``; a reader sees the file before or after, never half of it."""
    history = read(folder)
    standing = stack(history)
    history.append(Promotion(action=action, before=standing[-1] if standing else None, after=version))
    partial = folder / f".{FILE}.{os.getpid()}"
    partial.write_bytes(_HISTORY.dump_json(history, indent=2) + b"\n")
    partial.replace(folder / FILE)


def stack(history: list[Promotion]) -> list[str]:
    """The promoted versions that were not rolled back: the last is served, a rollback returns to the one before it."""
    versions: list[str] = []
    for entry in history:
        if entry.action == "promote":
            versions.append(entry.after)
        else:
            del versions[-1:]
    return versions
