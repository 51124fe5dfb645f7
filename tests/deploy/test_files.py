"""The files of deploy/, judged by the programs that read them: `make check-deploy`. Needs no Docker engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import nginx
from tests.e2e.stack import program

DEPLOY = Path(__file__).parents[2] / "deploy"
# Tools of the virtual environment; and Debian's package puts nginx where only root's path leads.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"}


def run(*arguments: str | Path) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("overlays", [(), ("replicas",), ("gpu",), ("gpu", "replicas")])
def test_compose_reads_the_files(overlays: tuple[str, ...]) -> None:
    names = ("compose.yaml", *(f"compose.{overlay}.yaml" for overlay in overlays))
    read = run(*program(), *(part for name in names for part in ("--file", DEPLOY / name)), "config")
    assert "warn" not in read.lower()


def test_nginx_reads_its_configuration(tmp_path: Path) -> None:
    folder = nginx.configuration(tmp_path / "nginx", nginx.version(run("nginx", "-v")))
    for file in folder.rglob("*.conf"):
        file.write_text(file.read_text().replace(" /tmp/", f" {tmp_path}/"))
    secrets = tmp_path / "secrets.sh"
    secrets.write_bytes((DEPLOY / "secrets.sh").read_bytes())
    run("sh", secrets)
    nginx.replace(folder / "snippets/tls.conf", "/run/secrets", str(tmp_path / "secrets"))
    nginx.replace(
        folder / "snippets/upstream.conf", "server classifier:", "server localhost:"
    )  # no Docker, no such name
    printed = run("nginx", "-t", "-c", folder / "nginx.conf")
    assert "[warn]" not in printed
    assert "test is successful" in printed


def test_gixy_finds_nothing() -> None:
    run("gixy", DEPLOY / "nginx/nginx.conf")
