"""deploy/nginx for whichever Nginx runs the tests."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "deploy/nginx"
RESOLVES = (1, 27, 3)
"""The first version that asks again for the addresses of an upstream."""


def version(printed: str) -> tuple[int, ...]:
    """(1, 31, 2) from what ``nginx -v`` prints."""
    found = re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", printed)
    assert found, printed
    return tuple(int(part) for part in found.groups())


def configuration(target: Path, version: tuple[int, ...]) -> Path:
    """A copy of deploy/nginx, less what an older Nginx, such as Debian 12's 1.22, does not know.

    That one keeps the replicas' addresses of its start until it is told to reload, and speaks HTTP/1.1 only.
    """
    shutil.copytree(SOURCE, target)
    if version < RESOLVES:
        replace(target / "snippets/upstream.conf", "classifier:3000 resolve ", "classifier:3000 ")
        replace(target / "nginx.conf", "http2 on;", "")
    return target


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, f"{old!r} is not in {file}"
    file.write_text(text.replace(old, new))
