"""A client that takes its time is cut off; one that does not is not. Under load: tests/faults/test_slow_clients.py."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import uvicorn

from serving.connections import Connection
from tests.live import free_port

PATIENCE = 0.5
REPLY = 64 * 2**20
"""Bytes; more than an operating system buffers for one connection."""
PIECES = (memoryview(b"a"), memoryview(b"bc"), memoryview(b"d"), b"", b"ef", memoryview(b"g"))
"""As BentoML's runner sends them."""
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


class Hasty(Connection):
    receive_seconds = send_seconds = PATIENCE


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers GET with a large reply or with pieces, and POST at once, before any of its body."""
    if scope["path"] == "/pieces":
        length = (b"content-length", str(sum(map(len, PIECES))).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        for piece in PIECES:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    size = REPLY if scope["method"] == "GET" else 2
    length = (b"content-length", str(size).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": b"x" * size})


@contextmanager
def serving(loop: str) -> Iterator[int]:
    port = free_port()
    config = uvicorn.Config(application, port=port, http=Hasty, loop=loop, lifespan="off", log_config=None)  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield port
        noticed = time.monotonic() + PATIENCE
        while server.server_state.connections and time.monotonic() < noticed:
            time.sleep(0.01)
        assert not server.server_state.connections, "one is still held"
    finally:
        server.should_exit = True
        thread.join()


def headers_that_never_end(client: socket.socket) -> None:
    client.sendall(HEAD)
    while True:
        client.sendall(b"X: y\r\n")
        time.sleep(0.05)


def nothing_at_all(client: socket.socket) -> None:
    assert client.recv(1) == b""
    raise ConnectionError


def expect_reply(client: socket.socket) -> None:
    reply = b""
    while not reply.endswith(b"xx"):
        reply += client.recv(1) or pytest.fail(f"closed after {reply!r}")


def a_second_request_that_never_ends(client: socket.socket) -> None:
    client.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
    expect_reply(client)
    headers_that_never_end(client)


def a_body_that_goes_on_after_its_reply(client: socket.socket) -> None:
    client.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
    expect_reply(client)
    while True:
        client.sendall(b"x")
        time.sleep(0.05)


def a_reply_that_nobody_reads(client: socket.socket) -> None:
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    time.sleep(4 * PATIENCE)
    received = 0
    while chunk := client.recv(2**20):
        received += len(chunk)
    assert received < REPLY
    raise ConnectionError


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    "dawdle",
    [
        headers_that_never_end,
        nothing_at_all,
        a_second_request_that_never_ends,
        a_body_that_goes_on_after_its_reply,
        a_reply_that_nobody_reads,
    ],
)
def test_who_dawdles_is_cut_off(dawdle: Callable[[socket.socket], None], loop: str) -> None:
    with serving(loop) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        started = time.monotonic()
        with pytest.raises((ConnectionError, BrokenPipeError)):
            dawdle(client)
        assert time.monotonic() - started < 20 * PATIENCE


def test_who_does_not_gets_everything() -> None:
    with serving("uvloop") as port, socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        while chunk := client.recv(2**20):
            received += len(chunk)
            time.sleep(0.001)  # slower than the server, yet going on
        assert received > REPLY


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_pieces_arrive_in_order_on_a_connection_that_is_kept(loop: str) -> None:
    with serving(loop) as port, requests.Session() as session:
        for method, path, body in (
            ("GET", "/pieces", b"abcdefg"),
            ("HEAD", "/pieces", b""),
            ("POST", "/", b"xx"),
            ("GET", "/pieces", b"abcdefg"),
        ):
            assert session.request(method, f"http://127.0.0.1:{port}{path}", timeout=10).content == body
