"""The stack as callers see it from outside, through Nginx. `make e2e-stack`."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import requests

from settings import Settings
from tests.e2e.docker import docker, jpeg
from tests.e2e.stack import CERTIFICATE, Stack, address, assert_error, post, session

MAX_BODY_BYTES = Settings.model_fields["max_body_bytes"].default
CONNECTIONS = 64
"""Concurrent requests allowed per address: limit_conn."""


def test_it_classifies_over_tls(client: requests.Session, stack: Stack) -> None:
    reply = post(client, stack)
    assert reply.status_code == 200, reply.text
    assert reply.json()["confidence"] == max(reply.json()["all_probabilities"].values())


def test_calls_without_a_key_are_refused(stack: Stack) -> None:
    stranger = session()
    del stranger.headers["X-API-Key"]
    assert_error(post(stranger, stack), 401, "unauthorized")
    assert_error(stranger.get(f"{stack.url}/model", timeout=20), 401, "unauthorized")
    assert stranger.get(f"{stack.url}/readyz", timeout=20).status_code == 200


def test_nothing_is_served_without_tls(stack: Stack) -> None:
    plain = f"http://localhost:{stack.environment['HTTP_PORT']}/classify"
    reply = requests.post(plain, jpeg(), allow_redirects=False, timeout=20)
    assert (reply.status_code, reply.headers["Location"]) == (308, "https://localhost/classify")


def handshake(stack: Stack, version: ssl.TLSVersion) -> str | None:
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # lets this side offer TLS 1.1
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("localhost", int(stack.environment["HTTPS_PORT"])), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        return connection.version()


def test_tls_1_2_and_1_3_are_accepted(stack: Stack) -> None:
    assert handshake(stack, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert handshake(stack, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_old_tls_is_refused(stack: Stack) -> None:
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol[_ ]version"):
        handshake(stack, ssl.TLSVersion.TLSv1_1)


def test_one_request_id_appears_in_the_reply_and_the_logs(client: requests.Session, stack: Stack) -> None:
    sent = f"e2e-{time.time_ns()}"
    reply = post(client, stack, **{"X-Request-Id": sent})
    assert reply.headers["X-Request-Id"] == reply.json()["request_id"] == sent
    (outside,) = [line for line in stack.logs("nginx") if line["request_id"] == sent]
    assert (outside["path"], outside["status"], outside["upstream_status"]) == ("/classify", 200, "200")
    assert float(outside["upstream_seconds"]) <= outside["seconds"] + 0.002  # Nginx rounds to milliseconds
    assert [line["status"] for line in stack.logs("classifier") if line.get("request_id") == sent] == [200]


def test_the_audit_log_names_key_and_client_address(client: requests.Session, stack: Stack) -> None:
    sent = f"audit-{time.time_ns()}"
    answer = post(client, stack, **{"X-Request-Id": sent, "X-Forwarded-For": "203.0.113.7"}).json()
    time.sleep(1)  # a thread writes the log
    lines = docker("exec", stack.container("classifier"), "sh", "-c", "cat /audit/*.jsonl").splitlines()
    (line,) = [line for line in map(json.loads, lines) if line["request_id"] == sent]
    (outside,) = [line for line in stack.logs("nginx") if line["request_id"] == sent]
    assert (line["key"], line["client"], line["status"]) == ("first", outside["client"], 200)
    assert line["client"] != address(stack.container("nginx")).split(":")[0]
    assert line["images"][0]["class"] == answer["class_name"]


@pytest.mark.parametrize("bad", ["no spaces", 'quote"', "x" * 65])
def test_bad_request_ids_are_replaced(client: requests.Session, stack: Stack, bad: str) -> None:
    reply = client.get(f"{stack.url}/nowhere", headers={"X-Request-Id": bad}, timeout=20)
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["X-Request-Id"])
    assert_error(reply, 404, "not_found")


@pytest.mark.parametrize(
    "path",
    [
        "/page/nothing.js",
        "/metrics",
        "/docs.json",
        "/schema.json",
        "/healthz",
        "/stub_status",
        "/_error",
        "/classify/",
    ],
)
def test_internal_paths_are_not_found(client: requests.Session, stack: Stack, path: str) -> None:
    assert_error(client.get(f"{stack.url}{path}", timeout=20), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/classify", "POST"),
        ("PUT", "/classify/batch", "POST"),
        ("POST", "/model", "GET, HEAD"),
        ("DELETE", "/readyz", "GET, HEAD"),
    ],
)
def test_other_methods_are_refused(client: requests.Session, stack: Stack, method: str, path: str, allow: str) -> None:
    reply = client.request(method, f"{stack.url}{path}", timeout=20)
    assert_error(reply, 405, "method_not_allowed")
    assert reply.headers["Allow"] == allow


@pytest.mark.parametrize("path", ["/", "/model", "/livez", "/readyz"])
def test_public_paths_need_no_key(client: requests.Session, stack: Stack, path: str) -> None:
    assert client.get(f"{stack.url}{path}", timeout=20).status_code == 200
    assert client.head(f"{stack.url}{path}", timeout=20).status_code == 200


@pytest.mark.parametrize("path", ["/model", "/nowhere"])
def test_security_headers_are_sent(client: requests.Session, stack: Stack, path: str) -> None:
    headers = client.get(f"{stack.url}{path}", timeout=20).headers
    assert headers["Server"] == "nginx"  # without its version
    for name, part in {
        "Strict-Transport-Security": "max-age=",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'",
        "Cache-Control": "no-store",
    }.items():
        assert part in headers[name]


def test_nginx_has_the_services_body_limit(client: requests.Session, stack: Stack) -> None:
    """Nginx refuses one byte more. At the limit, the request reaches the service, which refuses so large an image."""
    sent = {"Content-Type": "image/jpeg"}
    assert_error(
        client.post(f"{stack.url}/classify", b"x" * (MAX_BODY_BYTES + 1), headers=sent, timeout=60), 413, "too_large"
    )
    chunks = (b"x" * 2**20 for _ in range(MAX_BODY_BYTES // 2**20 + 1))
    assert_error(client.post(f"{stack.url}/classify", chunks, headers=sent, timeout=60), 413, "too_large")
    assert_error(
        client.post(f"{stack.url}/classify", b"x" * MAX_BODY_BYTES, headers=sent, timeout=60), 413, "too_large"
    )
    from_nginx = [line for line in stack.logs("nginx") if line["status"] == 413]
    assert [line["upstream_status"] for line in from_nginx] == ["", "", "413"]
    assert {line["method"] for line in from_nginx} == {"POST"}


def test_malformed_http_gets_the_common_error_format(stack: Stack) -> None:
    with opened(stack) as connection:
        connection.sendall(b"garbage\r\n\r\n")
        head, body = connection.makefile("rb").read().split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "invalid_request"


@contextmanager
def opened(stack: Stack) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    with (
        socket.create_connection(("localhost", int(stack.environment["HTTPS_PORT"])), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        yield connection


def test_connections_per_address_are_limited(client: requests.Session, stack: Stack) -> None:
    with ExitStack() as opening:
        for _ in range(CONNECTIONS):
            connection = opening.enter_context(opened(stack))
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        time.sleep(0.5)
        reply = post(client, stack)
    assert_error(reply, 429, "too_many_requests")
    assert int(reply.headers["Retry-After"]) >= 1
    time.sleep(0.5)
    assert post(client, stack).status_code == 200


def test_requests_per_address_are_limited(stack: Stack) -> None:
    """600 at once: the burst passes, the others are told when to come back, and may then."""
    own = threading.local()

    def get(_: int) -> requests.Response:
        own.client = getattr(own, "client", None) or session()
        return own.client.get(f"{stack.url}/livez", timeout=20)

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(get, range(600)))
    refused = [reply for reply in replies if reply.status_code == 429]
    assert {reply.status_code for reply in replies} == {200, 429}
    assert len(replies) - len(refused) >= 200
    assert_error(refused[0], 429, "too_many_requests")
    time.sleep(int(refused[0].headers["Retry-After"]))
    assert session().get(f"{stack.url}/livez", timeout=20).status_code == 200
    time.sleep(2)  # lets the burst recover for the tests that follow
