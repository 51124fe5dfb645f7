"""Adapts deploy/nginx to the Nginx that runs the tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests import live

SOURCE = Path(__file__).parents[1] / "deploy/nginx"
RESOLVES = (1, 27, 3)
"""The first version that re-resolves the addresses of an upstream."""


def version(printed: str) -> tuple[int, ...]:
    """(1, 31, 2) from what ``nginx -v`` prints."""
    found = re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", printed)
    assert found, printed
    return tuple(int(part) for part in found.groups())


def configuration(target: Path, version: tuple[int, ...]) -> Path:
    """A copy of deploy/nginx without what an older Nginx, such as Debian 12's 1.22, does not know.

    Such a version keeps the replicas' addresses from its start until it is reloaded, and only speaks HTTP/1.1 to them.
    """
    shutil.copytree(SOURCE, target)
    if version < RESOLVES:
        replace(target / "snippets/upstream.conf", "classifier:3000 resolve ", "classifier:3000 ")
        replace(target / "nginx.conf", "http2 on;", "")
    return target


def write_into(folder: Path, config: Path) -> None:
    """Redirect into ``folder`` what a container's Nginx writes to a tmpfs or volume."""
    for file in config.rglob("*.conf"):
        text = file.read_text()
        for inside in (" /tmp/", " /var/tmp/"):
            text = text.replace(inside, f" {folder}/")
        file.write_text(text)


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, f"{old!r} is not in {file}"
    file.write_text(text.replace(old, new))


@contextmanager
def before(replicas: Sequence[int], port: int, scratch: Path) -> Iterator[str]:
    """Start an Nginx on ``port`` in front of local replicas on these ports; yields its URL once it answers.

    Configured as in production, except for TLS and the limits per address.
    """
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    printed = subprocess.run(["nginx", "-v"], capture_output=True, text=True, env=environment)
    folder = configuration(scratch / "nginx", version(printed.stderr))
    _localise(folder, scratch, port, replicas)
    # Started by root, workers would switch to a user who cannot enter the scratch folder. Others only get a warning.
    command = ["nginx", "-c", str(folder / "nginx.conf"), "-g", "daemon off; user root;"]
    url = f"http://127.0.0.1:{port}"
    log = scratch / "nginx.log"
    with live.running(command, environment, log, lambda: live.is_ready(url)):
        yield url


def _localise(folder: Path, scratch: Path, port: int, replicas: Sequence[int]) -> None:
    write_into(scratch, folder)
    main, upstream = folder / "nginx.conf", folder / "snippets/upstream.conf"
    replace(main, "listen 8443 ssl default_server", f"listen 127.0.0.1:{port} default_server")
    replace(main, "listen 8080", f"listen 127.0.0.1:{live.free_port()}")
    replace(main, "listen 8081", f"listen 127.0.0.1:{live.free_port()}")
    replace(main, "include snippets/tls.conf;", "")
    replace(folder / "snippets/limits.conf", "rate=100r/s", "rate=100000r/s")
    replace(main, "burst=200", "burst=100000")
    replace(main, "limit_conn connections 64", "limit_conn connections 10000")
    for line in [line for line in upstream.read_text().splitlines() if "server classifier:3000" in line]:
        servers = "".join(line.replace("classifier:3000", f"127.0.0.1:{port}") + "\n" for port in replicas)
        replace(upstream, line + "\n", servers)
