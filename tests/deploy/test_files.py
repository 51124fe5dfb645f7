"""The files of deploy/, checked by the programs that read them: `make check-deploy`. Needs no Docker engine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from http.client import HTTPSConnection
from pathlib import Path

import pytest
import requests
import yaml

from deploy import smoke
from serving import access
from tests import nginx
from tests.e2e.stack import program
from tests.live import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
# Tools of the virtual environment; and sbin, where Debian puts nginx but which is only on root's PATH.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"}


def run(*arguments: str | Path) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_secrets_sh_creates_every_secret(tmp_path: Path) -> None:
    script = shutil.copy(DEPLOY / "secrets.sh", tmp_path)
    run("sh", script)
    declared = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["secrets"].values()
    files = {Path(secret["file"]).name for secret in declared} | {"api_key", "api_keys"}
    assert {file.name for file in (tmp_path / "secrets").iterdir()} == files
    (key,) = access.read(tmp_path / "secrets/api_keys/keys.toml").values()
    assert access.sha256((tmp_path / "secrets/api_key").read_text()) == key.sha256
    assert oct((tmp_path / "secrets").stat().st_mode)[-3:] == "700"

    (tmp_path / "secrets/slack_url").unlink()
    (tmp_path / "secrets/slack_url").write_text("https://real")
    before = (tmp_path / "secrets/tls_key").read_bytes()
    run("sh", script)
    assert (tmp_path / "secrets/slack_url").read_text() == "https://real"
    assert (tmp_path / "secrets/tls_key").read_bytes() == before


@pytest.mark.parametrize("overlays", [(), ("replicas",), ("gpu",), ("gpu", "replicas", "logs"), ("mtls",)])
def test_compose_accepts_its_files(overlays: tuple[str, ...]) -> None:
    names = ("compose.yaml", *(f"compose.{overlay}.yaml" for overlay in overlays))
    read = run(*program(), *(part for name in names for part in ("--file", DEPLOY / name)), "config")
    assert "warn" not in read.lower()


@pytest.mark.parametrize("snippets", [(), ("mtls",)])
def test_nginx_accepts_its_configuration(snippets: tuple[str, ...], tmp_path: Path) -> None:
    config = configuration(tmp_path, snippets)
    printed = run("nginx", "-t", "-c", config)
    assert "[warn]" not in printed
    assert "test is successful" in printed


def configuration(folder: Path, snippets: tuple[str, ...] = ()) -> Path:
    """deploy/nginx for this machine's Nginx as a process, with files in ``folder`` and an overlay's ``snippets``."""
    config = nginx.configuration(folder / "nginx", nginx.version(run("nginx", "-v")))
    overlay = folder / "overlay"
    overlay.mkdir()
    for name in snippets:
        (overlay / f"{name}.conf").symlink_to(config / f"snippets/{name}.conf")
    nginx.write_into(folder, config)
    for file in config.rglob("*.conf"):
        text = file.read_text().replace("/run/secrets", str(folder / "secrets"))
        file.write_text(text.replace("/run/nginx/", f"{overlay}/"))
    (folder / "secrets.sh").write_bytes((DEPLOY / "secrets.sh").read_bytes())
    run("sh", folder / "secrets.sh")
    shutil.copy(folder / "secrets/tls_certificate", folder / "secrets/client_ca")
    # Docker's host name does not exist here; an address where nothing listens, even if a server runs on this machine.
    nginx.replace(config / "snippets/upstream.conf", "server classifier:3000", f"server localhost:{free_port()}")
    return config / "nginx.conf"


def test_with_mtls_only_our_own_certificates_are_admitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Admitted requests get a 502: no replica runs. The self-signed server certificate is also CA and a caller's."""
    config, port = configuration(tmp_path, ("mtls",)), free_port()
    nginx.replace(config, "listen 8443 ssl", f"listen 127.0.0.1:{port} ssl")
    for unused in ("8080", "8081"):
        nginx.replace(config, f"listen {unused}", f"listen 127.0.0.1:{free_port()}")
    mine = (tmp_path / "secrets/tls_certificate", tmp_path / "secrets/tls_key")
    foreign = make_certificate(tmp_path / "foreign")
    server = subprocess.Popen(("nginx", "-c", config, "-g", "daemon off;"), env=ENVIRONMENT)
    try:
        wait_for(port)
        for path, certificate, status in (
            ("/classify", None, 403),
            ("/nowhere", None, 403),
            ("/page/of%20mine/livez", None, 403),
            ("/classify", foreign, 400),
            ("/classify", mine, 502),
            ("/readyz", None, 502),
        ):
            method = "POST" if path == "/classify" else "GET"
            url = f"https://localhost:{port}{path}"
            reply = requests.request(method, url, cert=certificate, verify=str(mine[0]), timeout=20)
            assert reply.status_code == status, (path, certificate)
            assert reply.json()["error"]["code"] == reply.headers["X-Error-Code"]
        monkeypatch.setenv("CLIENT_CERTIFICATE", str(mine[0]))
        monkeypatch.setenv("CLIENT_KEY", str(mine[1]))
        context = smoke.tls(tmp_path / "secrets")
        with closing(HTTPSConnection("localhost", port, timeout=20, context=context)) as smoke_asks:
            assert smoke.ask(smoke_asks, "GET", "/metrics")[0] == 404
    finally:
        server.terminate()
        server.wait()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=stranger"
    run("openssl", *new.split(), "-keyout", key, "-out", certificate)
    return certificate, key


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(ConnectionError), socket.create_connection(("localhost", port)):
            return
        time.sleep(0.1)
    raise AssertionError("Nginx does not listen")


def test_gixy_finds_nothing(tmp_path: Path) -> None:
    run("gixy", configuration(tmp_path, ("mtls",)))
