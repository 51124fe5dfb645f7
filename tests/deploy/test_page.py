"""The page at ``/`` through a real Nginx with the real gateway behind it: `make check-deploy`."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import uvicorn

from serving.bodies import Bodies
from serving.gateway import Gateway
from serving.static import FOLDER, HEADERS, Page
from tests import nginx
from tests.deploy.test_files import DEPLOY, ENVIRONMENT, run
from tests.live import free_port

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
SAMPLE = "/page/" + min(FOLDER.glob("samples/*.jpg")).relative_to(FOLDER).as_posix()
OLD = (1, 22, 0)
"""A version whose configuration every Nginx reads, and which needs no DNS server of Docker's to find the replicas."""


@contextmanager
def gateway(port: int) -> Iterator[None]:
    async def nothing(*_: Any) -> None:
        raise AssertionError("no call of the API is meant here")

    outermost = Gateway(nothing, (), Page(), log_requests=False, bodies=Bodies(2**20))
    config = uvicorn.Config(outermost, port=port, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("edge")
    folder = nginx.configuration(root / "nginx", OLD)
    nginx.write_into(root, folder)
    (root / "secrets.sh").write_bytes((DEPLOY / "secrets.sh").read_bytes())
    run("sh", root / "secrets.sh")
    nginx.replace(folder / "snippets/tls.conf", "/run/secrets", str(root / "secrets"))
    behind, outside = free_port(), free_port()
    nginx.replace(folder / "snippets/upstream.conf", "classifier:3000", f"127.0.0.1:{behind}")
    for inside, port in ((8443, outside), (8080, free_port()), (8081, free_port())):
        nginx.replace(folder / "nginx.conf", f"listen {inside}", f"listen 127.0.0.1:{port}")
    argv = ("nginx", "-c", str(folder / "nginx.conf"), "-g", "daemon off;")
    with gateway(behind), subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        try:
            yield wait_for(f"https://127.0.0.1:{outside}", process)
        finally:
            process.terminate()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None
        with suppress(requests.ConnectionError):
            if get(url, "/").status_code == 200:
                return url
        time.sleep(0.1)
    raise AssertionError(f"{url} is not there")


def get(url: str, path: str, method: str = "GET", **headers: str) -> requests.Response:
    return requests.request(method, url + path, headers=headers, verify=False, timeout=20)


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/page.css", SAMPLE])
def test_the_page_passes_nginx_with_the_services_headers(url: str, path: str) -> None:
    reply = get(url, path)
    file = FOLDER / ("index.html" if path == "/" else path.removeprefix("/page/"))
    assert (reply.status_code, reply.content) == (200, file.read_bytes())
    # Exactly one of each: browsers enforce every policy they receive.
    assert {name: reply.headers[name] for name in HEADERS} == HEADERS
    assert "max-age=" in reply.headers["Strict-Transport-Security"]
    assert len(reply.headers["X-Request-Id"]) == 32
    assert get(url, path, **{"If-None-Match": reply.headers["ETag"]}).status_code == 304


@pytest.mark.parametrize(
    ("head", "status"),
    [("GET / HTTP/2.9\r\n", 505), ("POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n", 501)],
)
def test_a_request_in_unknown_http_is_the_callers_error(url: str, head: str, status: int) -> None:
    address = urlsplit(url)
    context = ssl._create_unverified_context()
    with (
        socket.create_connection((address.hostname, address.port), timeout=20) as plain,
        context.wrap_socket(plain) as client,
    ):
        client.sendall(f"{head}Host: x\r\nConnection: close\r\n\r\n".encode())
        reply = http.client.HTTPResponse(client)
        reply.begin()
        assert (reply.status, json.loads(reply.read())["error"]["code"]) == (status, "invalid_request")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/page/nothing.js", 404, "not_found"),
        ("GET", "/page", 404, "not_found"),
        ("GET", "/elsewhere", 404, "not_found"),
        ("POST", "/", 405, "method_not_allowed"),
        ("DELETE", "/page/main.js", 405, "method_not_allowed"),
    ],
)
def test_nothing_but_the_page_passes(url: str, method: str, path: str, status: int, code: str) -> None:
    reply = get(url, path, method)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert reply.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert reply.headers["Cache-Control"] == "no-store"
