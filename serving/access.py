"""The file of API keys, and the command that edits it. The service rereads the file whenever it changes.

    python -m serving.access add NAME FILE [--images-per-second 20] [--images-per-day 100000] [--expires 2030-01-31]
                              [--path /classify]...
    python -m serving.access list FILE
    python -m serving.access remove NAME FILE

``add`` prints the new key, which is stored nowhere: FILE, named by the setting API_KEYS, holds only its SHA-256.

    [alice]
    sha256 = "..."
    images_per_second = 20     # beyond: 429 rate_limited. A batch of N images counts as N
    images_per_day = 100000    # by UTC; beyond: 429 quota_exceeded
    expires = 2030-01-31       # the first day, by UTC, on which it is refused
    paths = ["/classify"]      # 403 on any other; without it, no path is refused

A plain SHA-256 is right here, as it would not be for passwords: a key is 256 random bits, which nobody can guess, so a
salt or a slow hash would protect nothing; and a slow hash, computed for every request that anyone sends, would let
anyone keep the server busy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import secrets
import sys
import tempfile
import tomllib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Guarded = Literal["/classify", "/classify/batch", "/explain", "/model", "/docs.json", "/schema.json"]
GUARDED: tuple[str, ...] = get_args(Guarded)
"""Paths that require a key. The others are for probes and Prometheus, which have none: Nginx does not forward them, and
a NetworkPolicy keeps them inside the cluster."""


class AccessError(RuntimeError):
    """An unusable key file; the message names what is wrong but never quotes a value."""


class Key(BaseModel):
    """One key's entry in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    images_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    images_per_day: int | None = Field(default=None, ge=1)
    expires: date | None = None
    paths: list[Guarded] | None = None


NAME = re.compile("[A-Za-z0-9_-]{1,64}")
"""A bare key in TOML, harmless in a log and as a metric label."""
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
_FILE = TypeAdapter(dict[Name, Key])


def read(file: Path) -> dict[str, Key]:
    """The keys in ``file`` by name; raises ``AccessError``."""
    try:
        return _parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AccessError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise AccessError(f"{file}: {error}") from None


def _parse(text: str) -> dict[str, Key]:
    """The keys in ``text`` by name; raises ``ValueError``."""
    try:
        keys = _FILE.validate_python(tomllib.loads(text))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # the input may be a key, given in place of its hash
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if len({key.sha256 for key in keys.values()}) < len(keys):
        raise ValueError("two names have the same sha256")
    return keys


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def add(file: Path, name: str, **limits: Any) -> str:
    """Add a new key called ``name`` to ``file``, which is created if missing; returns the key."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r}; expected a name of 1 to 64 letters, digits, hyphens and underscores")
    if not file.resolve().parent.is_dir():
        raise ValueError(f"{file}: the folder is not there")
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if name in _parse(before):
        raise ValueError(f"there is a key {name!r} already")
    key = secrets.token_urlsafe(32)
    lines = [f"[{name}]", f'sha256 = "{sha256(key)}"']
    lines += [f"{limit} = {_toml(value)}" for limit, value in limits.items() if value is not None]
    after = before + "\n" * bool(before) + "\n".join(lines) + "\n"
    _parse(after)
    _replace(file, after)
    return key


def remove(file: Path, name: str) -> None:
    """Remove the key called ``name`` from ``file``."""
    before = file.read_text(encoding="utf-8")
    keys = _parse(before)
    if keys.pop(name, None) is None:
        raise ValueError(f"there is no key {name!r}; there are {', '.join(keys) or 'none'}")
    after = re.sub(rf"^\[{re.escape(name)}\].*?(?=^\[|\Z)", "", before, flags=re.MULTILINE | re.DOTALL)
    if _parse(after) != keys:
        raise ValueError(f"{name!r} is written in a way that this command cannot remove; edit the file")
    _replace(file, after)


def _toml(value: object) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def _replace(file: Path, text: str) -> None:
    """Replace the content of ``file`` with ``text`` atomically."""
    target = file.resolve()
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as output:
            output.write(text)
            output.flush()
            os.fsync(output.fileno())
        # Readable by whichever user runs the service: a hash does not reveal its key.
        if target.exists():
            before = target.stat()
            os.chown(temporary, before.st_uid, before.st_gid)
            temporary.chmod(before.st_mode)
        else:
            temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("add", "list", "remove"):
        chosen = commands.add_parser(command)
        if command != "list":
            chosen.add_argument("name", metavar="NAME")
        if command == "add":
            chosen.add_argument("--images-per-second", type=float)
            chosen.add_argument("--images-per-day", type=int)
            chosen.add_argument("--expires", type=date.fromisoformat, metavar="YYYY-MM-DD")
            chosen.add_argument("--path", action="append", dest="paths", choices=GUARDED, help="may be repeated")
        chosen.add_argument("file", metavar="FILE", type=Path)
    return parser.parse_args()


def main() -> None:
    options = vars(_arguments())
    command, file = options.pop("command"), options.pop("file")
    if command == "add":
        print(add(file, **options))
    elif command == "remove":
        remove(file, **options)
    else:
        for name, key in read(file).items():
            print(name, *(f"{limit}={value}" for limit, value in key if value is not None and limit != "sha256"))


if __name__ == "__main__":
    try:
        main()
    except (AccessError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
