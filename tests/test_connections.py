"""Connections of clients that dawdle, send what is not HTTP, pipeline, or are refused from their headers.

Slow clients under load: tests/faults/test_slow_clients.py.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import requests
import uvicorn
from prometheus_client import REGISTRY
from starlette.responses import Response
from uvicorn.server import ServerState

from serving.connections import MAX_HEAD_BYTES, MAX_PIPELINED, Connection
from serving.errors import REFUSAL_SECONDS
from tests.live import free_port

PATIENCE, KEEP_ALIVE = 0.5, 0.3
REPLY = 64 * 2**20
"""Bytes; more than an operating system buffers for one connection."""
PIECES = (memoryview(b"a"), memoryview(b"bc"), memoryview(b"d"), b"", b"ef", memoryview(b"g"))
"""Types that any ASGI application may send."""
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
FULL = b"POST /full?a=b HTTP/1.1\r\nHost: x\r\n"
LENGTH = b"Content-Length: 5\r\n"
WHOLE = FULL + LENGTH + b"\r\nbody."
WHOLE_LENGTH = b"Content-Length: %d\r\n\r\n" % len(WHOLE)
DELAYS = {"/slow": 0.1, "/slower": 2 * PATIENCE}
"""Seconds before the application answers a POST to these paths."""
SLOWER = HEAD.replace(b"/ ", b"/slower ") + b"Content-Length: 0\r\n\r\n"


class Hasty(Connection):
    receive_seconds = send_seconds = PATIENCE


class Patient(Hasty):
    send_seconds = 10 * PATIENCE


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers GET with a large reply or with pieces, and POST at once, before any of its body, except on some paths."""
    if scope["path"] == "/read":
        while (await receive()).get("more_body", False):
            pass
    elif scope["path"] in DELAYS:
        await receive()
        await asyncio.sleep(DELAYS[scope["path"]])
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


class Shedding:
    """Refuses requests to one path, and blocks the event loop for requests to another."""

    is_shedding = True

    def __call__(self, target: bytes, headers: Any) -> Response | None:
        if target == b"/stall":
            time.sleep(2 * KEEP_ALIVE)
        return Response(b"full", 429, {"x-target": target.decode()}) if b"full" in target else None


class Guarded(Hasty):
    shedder = Shedding()


@contextmanager
def serving(loop: str, connection: type[Connection] = Hasty) -> Iterator[int]:
    port = free_port()
    config = uvicorn.Config(
        application,
        port=port,
        http=connection,
        loop=loop,
        lifespan="off",
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE,  # type: ignore[arg-type]  # any number works
    )
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


def noting(connection: type[Connection], made: list[Connection]) -> type[Connection]:
    """``connection``, which adds each one made to ``made``."""

    class Noted(connection):  # type: ignore[misc, valid-type]  # a parameter
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            made.append(self)

    return Noted


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


@contextmanager
def connected(loop: str, connection: type[Connection] = Hasty) -> Iterator[socket.socket]:
    """A client of a server of its own."""
    with serving(loop, connection) as port, connect(port) as client:
        yield client


def expect_reply(client: socket.socket) -> None:
    reply = b""
    while not reply.endswith(b"xx"):
        reply += client.recv(1) or pytest.fail(f"closed after {reply!r}")


def read_all(client: socket.socket) -> bytes:
    """All bytes until the connection ends, even if only by its idle timeout."""
    received = b""
    with suppress(ConnectionError):  # a reset: not everything sent was read
        while chunk := client.recv(2**16):
            received += chunk
    return received


def flood(client: socket.socket, start: bytes, more: bytes) -> tuple[bytes, int]:
    """Send ``start`` and then ``more`` endlessly; returns the reply and the number of bytes sent until it came."""
    client.sendall(start)
    sent = len(start)
    try:
        while sent < 2**26:
            client.sendall(more)
            sent += len(more)
    except OSError:
        pass
    return read_all(client), sent


def headers_that_never_end(client: socket.socket) -> None:
    client.sendall(HEAD)
    while True:
        client.sendall(b"X: y\r\n")
        time.sleep(0.05)


def a_body_that_goes_on_after_its_refusal(client: socket.socket) -> None:
    client.sendall(b"POST /full HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
    assert b"429" in client.recv(1000)
    while True:
        client.sendall(b"x")
        time.sleep(0.05)


def nothing_at_all(client: socket.socket) -> None:
    assert client.recv(1) == b""
    raise ConnectionError


def a_second_request_that_never_ends(client: socket.socket) -> None:
    client.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
    expect_reply(client)
    headers_that_never_end(client)


def line_breaks_after_a_request(client: socket.socket) -> None:
    client.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
    expect_reply(client)
    client.sendall(b"\r\n")
    nothing_at_all(client)


def a_body_that_goes_on_after_its_reply(client: socket.socket) -> None:
    client.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
    expect_reply(client)
    while True:
        client.sendall(b"x")
        time.sleep(0.05)


def a_body_that_ends_after_its_reply(client: socket.socket) -> None:
    client.sendall(HEAD + b"Content-Length: 1\r\n\r\n")
    expect_reply(client)
    client.sendall(b"x")
    nothing_at_all(client)


def a_reply_that_nobody_reads(client: socket.socket) -> None:
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    received = len(client.recv(1))  # making it may take a while
    time.sleep(4 * PATIENCE)
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
        line_breaks_after_a_request,
        a_body_that_goes_on_after_its_reply,
        a_body_that_ends_after_its_reply,
        a_body_that_goes_on_after_its_refusal,
        a_reply_that_nobody_reads,
    ],
)
def test_a_client_that_dawdles_is_cut_off(dawdle: Callable[[socket.socket], None], loop: str) -> None:
    with connected(loop, Guarded) as client:
        started = time.monotonic()
        with pytest.raises((ConnectionError, BrokenPipeError)):
            dawdle(client)
        assert time.monotonic() - started < 20 * PATIENCE


@pytest.mark.parametrize("start", [HEAD, FULL], ids=["answered", "refused"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_request_that_arrives_with_the_rest_of_an_answered_one_is_not_idle(loop: str, start: bytes) -> None:
    with connected(loop, Guarded) as client:
        client.sendall(start + LENGTH + b"\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 ")
        client.sendall(b"body." + SLOWER)
        expect_reply(client)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_client_does_not_dawdle_while_nothing_is_read_from_it(loop: str) -> None:
    """With a request waiting for the reply to another one, the server reads no more, although the client sends it."""
    with connected(loop) as client:
        for piece in (SLOWER[:9], SLOWER[9:19], SLOWER[19:], SLOWER + HEAD, b"Content-Length: 0\r\n\r\n"):
            client.sendall(piece)
            time.sleep(0.05)
        for _ in range(3):
            expect_reply(client)


def test_a_body_that_comes_late_is_awaited() -> None:
    """The application limits how long."""
    with connected("uvloop") as client:
        for piece in (HEAD.replace(b"/ ", b"/read ") + LENGTH + b"\r\n", b"\r\nbo"):
            client.sendall(piece)
            time.sleep(0.05)
        time.sleep(1.5 * PATIENCE)
        client.sendall(b"d")
        expect_reply(client)


def test_a_slow_but_steady_client_gets_everything() -> None:
    with connected("uvloop", Patient) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        while chunk := client.recv(2**20):
            received += len(chunk)
            time.sleep(0.001)  # slower than the server, but steady
        assert received > REPLY


def test_each_reply_has_its_own_timeout() -> None:
    class Pipe(asyncio.Transport):
        unread, is_aborted = 0, False

        def get_write_buffer_size(self) -> int:
            return self.unread

        def is_closing(self) -> bool:
            return self.is_aborted

        def write(self, data: Any) -> None:
            self.unread = len(data)

        def abort(self) -> None:
            self.is_aborted = True

    async def read() -> None:
        server = uvicorn.Config(application, http=Hasty, lifespan="off", log_config=None)
        server.load()
        connection, pipe = Hasty(server, ServerState(), {}), Pipe()
        connection.connection_made(pipe)
        connection.on_message_begin()
        connection._receiving.cancel()  # as after receiving a request
        reply = connection.transport
        reply.write(b"x" * 100)
        connection.pause_writing()
        await asyncio.sleep(0.8 * PATIENCE)
        reply.write(b"y" * 50)  # the first reply was read; this is another one
        await asyncio.sleep(0.4 * PATIENCE)
        assert not pipe.is_aborted
        await asyncio.sleep(PATIENCE)
        assert pipe.is_aborted

    asyncio.run(read())


def test_malformed_http_gets_the_common_error_format() -> None:
    with connected("uvloop") as client:
        client.sendall(b"\x16\x03\x01\x02\x00\r\n\r\n")
        response = http.client.HTTPResponse(client)
        response.begin()
        error = json.loads(response.read())["error"]
        assert (response.status, error["code"]) == (400, "invalid_request")
        assert error["request_id"] == response.headers["x-request-id"]
        assert client.recv(1) == b""


@pytest.mark.parametrize("more", [b"a:b\r\n" * 1000, b"X: " + b"y" * 5000], ids=["many", "long"])
def test_endless_headers_are_cut_off(more: bytes) -> None:
    with connected("uvloop") as client:
        _, sent = flood(client, HEAD, more)
    assert sent < 2**23, "what the two systems hold on the way, and no more"


def test_too_many_headers_are_refused() -> None:
    with connected("uvloop") as client:
        client.sendall(HEAD + b"X: " + b"y" * MAX_HEAD_BYTES)
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (431, "invalid_request")
        assert client.recv(1) == b""


def test_malformed_http_is_refused_once_however_long_it_goes_on() -> None:
    def refused() -> float:
        return REGISTRY.get_sample_value("classifier_rejected_total", {"reason": "invalid_request"}) or 0.0

    before = refused()
    with connected("uvloop") as client:
        received, _ = flood(client, b"POST / HTTP/1.1\r\nno header" + b"\0" * 2 * MAX_HEAD_BYTES, b"x")
    assert received.count(b"HTTP/1.1 ") <= 1
    assert refused() - before == 1


def test_many_headers_within_the_limit_are_accepted() -> None:
    with connected("uvloop") as client:
        for _ in range(4):
            client.sendall(HEAD + b"X: y\r\n" * 5000 + b"Content-Length: 0\r\n\r\n")
            expect_reply(client)


def test_endless_trailers_of_a_chunked_body_are_cut_off() -> None:
    start = HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    with serving("uvloop") as port:
        with connect(port) as client:
            client.sendall(start + b"X: y\r\n\r\n" + HEAD + b"Content-Length: 0\r\n\r\n")
            for _ in range(2):
                expect_reply(client)
        with connect(port) as client:
            _, sent = flood(client, start, b"a:b\r\n" * 1000)
    assert sent < 2**23


def test_trailers_of_a_chunked_body_are_not_headers_of_its_request() -> None:
    made: list[Connection] = []
    start = HEAD.replace(b"/ ", b"/read ") + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    with connected("uvloop", noting(Hasty, made)) as client:
        client.sendall(start + b"X-API-Key: y\r\n\r\n")
        expect_reply(client)
        assert [name for name, _ in made[0].scope["headers"]] == [b"host", b"transfer-encoding"]


def test_many_small_chunks_form_one_body() -> None:
    with connected("uvloop") as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")
        expect_reply(client)
        client.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
        expect_reply(client)


@pytest.mark.parametrize("method", [b"GET", b"CONNECT"])
def test_no_connection_becomes_a_websocket(method: bytes) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n"
    with connected("uvloop") as client:
        client.sendall(method + b" /pieces HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n")
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, response.read()) == (200, b"abcdefg")
        assert response.will_close == (method == b"CONNECT")  # what follows that is not HTTP


@pytest.mark.parametrize("method", [b"GET", b"POST"])
@pytest.mark.parametrize("pause", [0.0, 0.1], ids=["at once", "in parts"])
def test_a_request_to_upgrade_the_protocol_is_answered_in_http_1_1(method: bytes, pause: float) -> None:
    """Including its body, no part of which is taken for a request."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    body = b"GET /pieces HTTP/1.1\r\nHost: x\r\n\r\n"
    length = f"Content-Length: {len(body)}\r\n\r\n".encode()
    with connected("uvloop") as client:
        for part in (method + b" /pieces HTTP/1.1\r\nHost: x\r\n" + upgrade + length, body, body):
            client.sendall(part)
            time.sleep(pause)
        received = read_all(client)
        assert received.count(b"HTTP/1.1 ") == received.count(b"HTTP/1.1 200 OK") == received.count(b"abcdefg") == 2


def test_many_upgrade_requests_at_once_are_answered() -> None:
    asks = b"GET /pieces HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with connected("uvloop") as client:
        client.sendall(asks * 700)  # as many as one read may return
        assert read_all(client).count(b"abcdefg") == 700


def test_pipelined_requests_are_limited() -> None:
    with connected("uvloop") as client:
        client.sendall(b"GET /pieces HTTP/1.1\r\n\r\n" * 2 * MAX_PIPELINED)
        received = read_all(client)
    assert received.count(b"HTTP/1.1 200") == received.count(b"abcdefg") == 1 + MAX_PIPELINED


def test_http_1_0_ignores_upgrades_and_closes_after_its_reply() -> None:
    with connected("uvloop") as client:
        client.sendall(b"GET /pieces HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        assert b"connection: close" in read_all(client)


@pytest.mark.parametrize("requests_", [1, 3])
def test_malformed_http_does_not_answer_the_requests_before_it(requests_: int) -> None:
    with connected("uvloop") as client:
        client.sendall(b"GET /pieces HTTP/1.1\r\nHost: x\r\n\r\n" * requests_ + b"garbage\r\n\r\n")
        received = read_all(client)
    assert received.count(b"HTTP/1.1 ") == received.count(b"HTTP/1.1 200") == received.count(b"abcdefg") == requests_


def test_a_malformed_body_only_fails_its_own_request() -> None:
    broken = HEAD.replace(b"/ ", b"/read ") + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n"
    with serving("uvloop") as port:
        with connect(port) as client:
            client.sendall(broken)
            assert read_all(client).startswith(b"HTTP/1.1 400 ")
        with connect(port) as client:
            client.sendall(HEAD.replace(b"/ ", b"/read ") + LENGTH + b"\r\nbody." + broken)
            assert b" 400 " not in read_all(client)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_hanging_up_on_pipelined_requests_is_not_logged_as_an_error(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(loop) as port:
        for _ in range(10):
            client = connect(port)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets instead of closing
            client.sendall(HEAD.replace(b"/ ", b"/slow ") + LENGTH + b"\r\nbody." + b"GET /pieces HTTP/1.1\r\n\r\n")
            time.sleep(0.01)
            client.close()
        time.sleep(0.3)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_pieces_arrive_in_order_on_a_persistent_connection(loop: str) -> None:
    with serving(loop) as port, requests.Session() as session:
        for method, path, body in (
            ("GET", "/pieces", b"abcdefg"),
            ("HEAD", "/pieces", b""),
            ("POST", "/", b"xx"),
            ("GET", "/pieces", b"abcdefg"),
        ):
            assert session.request(method, f"http://127.0.0.1:{port}{path}", timeout=10).content == body


def test_a_load_shedder_answers_from_the_headers_and_keeps_the_connection() -> None:
    """Even with a body still to come, and for pipelined requests: it is not asked for those behind an admitted one."""
    full = FULL + LENGTH + b"\r\n"
    heard = HEAD + LENGTH + b"\r\nbody."
    with connected("uvloop", Guarded) as client:
        for _ in range(3):
            client.sendall(full)
            refusal = client.recv(1000)
            assert refusal.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
            assert refusal.endswith(b"\r\n\r\nfull")
            assert b"x-target: /full?a=b\r\n" in refusal
            client.sendall(b"body.")
            client.sendall(heard)
            expect_reply(client)
        client.sendall((full + b"body." + heard) * 20)
        received = b""
        while received.count(b"HTTP/1.1") < 40 or not received.endswith((b"xx", b"full")):
            received += client.recv(2**16)
        assert [reply[:3] for reply in received.split(b"HTTP/1.1 ")[1:]] == [b"429"] + [b"200"] * 39


def test_a_load_shedder_is_asked_only_once_per_request() -> None:
    """If asked again, it would count the request among those ahead of it."""
    asked = []

    class Counting(Shedding):
        def __call__(self, target: bytes, headers: Any) -> Response | None:
            asked.append(target)
            return super().__call__(target, headers)

    class Counted(Hasty):
        shedder = Counting()

    with connected("uvloop", Counted) as client:
        for _ in range(3):
            client.sendall(HEAD + LENGTH + b"\r\nbody.")
            expect_reply(client)
            client.sendall(FULL + LENGTH + b"\r\nbody.")
            assert client.recv(1000).startswith(b"HTTP/1.1 429 ")
    assert len(asked) == 6


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_refusal_is_delayed_and_later_requests_are_answered_after_it(loop: str) -> None:
    with connected(loop, Guarded) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.monotonic()
        client.sendall(FULL + LENGTH + b"\r\nbody.")
        for piece in (HEAD, LENGTH, b"Connection: close\r\n\r\nbo", b"dy."):
            time.sleep(0.01)
            client.sendall(piece)
        received = read_all(client)
    assert time.monotonic() - started >= REFUSAL_SECONDS
    assert re.findall(rb"HTTP/1.1 (\d+) ", received) == [b"429", b"200"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_little_of_what_follows_a_request_is_read_before_its_refusal(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.connections.REFUSAL_SECONDS", PATIENCE)
    large = HEAD + b"Content-Length: %d\r\n\r\n" % REPLY + bytes(REPLY)
    held: list[int] = []

    class Watched(Guarded):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            held.append(len(self._held))

    with connected(loop, Watched) as client:
        client.sendall(HEAD + LENGTH + b"\r\nbody.")
        expect_reply(client)
        client.sendall(FULL + LENGTH + b"\r\nbody.")
        time.sleep(PATIENCE / 10)
        client.sendall(large)
        assert re.findall(rb"HTTP/1.1 (\d+) ", read_all(client)) == [b"429", b"200"]
    assert 0 < max(held) < 2**20, "what one read returns"


def test_hanging_up_before_a_refusal_is_sent_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with serving("uvloop", Guarded) as port:
        for _ in range(5):
            with connect(port) as client:
                client.sendall(FULL + LENGTH + b"\r\nbody.")
        time.sleep(2 * REFUSAL_SECONDS)
        with connect(port) as client:
            client.sendall(HEAD + LENGTH + b"\r\nbody.")
            expect_reply(client)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_nothing_more_is_parsed_of_a_connection_cut_before_its_refusal(caplog: pytest.LogCaptureFixture) -> None:
    """As one is whose client has long read none of its replies."""
    made: list[Connection] = []
    with connected("uvloop", noting(Guarded, made)) as client:
        for head in (FULL, HEAD):
            client.sendall(head + LENGTH + b"\r\nbody.")
            time.sleep(REFUSAL_SECONDS / 4)
        made[0].loop.call_soon_threadsafe(made[0].transport.abort)
        time.sleep(2 * REFUSAL_SECONDS)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_pending_refusals_are_sent_when_the_server_stops() -> None:
    made: list[Connection] = []
    with connected("uvloop", noting(Guarded, made)) as client:
        client.sendall(FULL + LENGTH + b"\r\nbody.")
        started = time.monotonic()
        time.sleep(REFUSAL_SECONDS / 4)
        made[0].loop.call_soon_threadsafe(made[0].shutdown)
        assert read_all(client).startswith(b"HTTP/1.1 429 ")
        assert time.monotonic() - started < REFUSAL_SECONDS


def test_an_idle_connection_is_closed_when_the_server_stops() -> None:
    made: list[Connection] = []
    with connected("uvloop", noting(Connection, made)) as client:  # whose own timeouts are longer than the client's
        while not made:
            time.sleep(0.01)
        client.settimeout(Connection.receive_seconds / 2)
        made[0].loop.call_soon_threadsafe(made[0].shutdown)
        assert client.recv(1) == b""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("connection", [Hasty, Guarded])
def test_a_request_that_has_arrived_when_the_server_stops_is_answered(loop: str, connection: type[Connection]) -> None:
    """It is still unread where the event loop was busy; closing the connection then would reset it."""
    made: list[Connection] = []

    def stop_late() -> None:
        time.sleep(KEEP_ALIVE / 2)
        made[0].shutdown()

    path = b"/full" if connection is Guarded else b"/"
    with connected(loop, noting(connection, made)) as client:
        client.sendall(HEAD + LENGTH + b"\r\nbody.")
        expect_reply(client)
        made[0].loop.call_soon_threadsafe(stop_late)
        time.sleep(KEEP_ALIVE / 4)
        client.sendall(HEAD.replace(b"/ ", path + b" ") + LENGTH + b"\r\nbody.")
        received = read_all(client)
    assert received.startswith(b"HTTP/1.1 429 " if connection is Guarded else b"HTTP/1.1 200 ")
    assert (b"connection: close" in received) == (connection is Hasty)


@pytest.mark.parametrize(
    ("first", "statuses"),
    [
        pytest.param(HEAD + b"X: ", [b"200"], id="in a header"),
        pytest.param(HEAD.replace(b"/ ", b"/read ") + WHOLE_LENGTH, [b"200"], id="in a body"),
        pytest.param(HEAD + WHOLE_LENGTH, [b"200"], id="in a body already answered"),
        pytest.param(FULL + WHOLE_LENGTH, [b"429"], id="in a body already refused"),
        pytest.param(SLOWER, [b"200", b"200"], id="behind a request to be answered first"),
    ],
)
def test_only_the_next_request_is_shed_and_nothing_that_looks_like_one(first: bytes, statuses: list[bytes]) -> None:
    with connected("uvloop", Guarded) as client:
        client.sendall(first)
        time.sleep(0.1)
        client.sendall(WHOLE)
        assert re.findall(rb"HTTP/1.1 (\d+) ", read_all(client)) == statuses


def test_refusals_that_nobody_reads_do_not_pile_up() -> None:
    unsent = 0

    class Watched(Guarded):
        def data_received(self, data: bytes) -> None:
            nonlocal unsent
            super().data_received(data)
            unsent = max(unsent, self.transport.get_write_buffer_size())

    with connected("uvloop", Watched) as client:
        flood(client, b"", (FULL + b"Content-Length: 0\r\n\r\n") * 1000)
    assert 0 < unsent < 2**19


@pytest.mark.parametrize("head", [b"POST /full HTTP/1.0", b"POST /full HTTP/1.1\r\nConnection: close"])
def test_requests_that_close_the_connection_are_not_shed(head: bytes) -> None:
    with connected("uvloop", Guarded) as client:
        client.sendall(head + b"\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        received = read_all(client)
        assert received.startswith(b"HTTP/1.1 200")  # by the application, which would refuse at a higher cost


@pytest.mark.parametrize(
    "request_",
    [
        FULL + LENGTH + b"\r\nbody.",
        FULL + b"\r\n",
        FULL + b"content-length:5 \r\nX-Empty:\r\nconnection: Keep-Alive\r\n\r\nbody.",
        HEAD + LENGTH + b"\r\nbody.",
        FULL + LENGTH + b"\r\nbody." + HEAD + LENGTH + b"\r\nbody.",
        FULL + b"Transfer-Encoding: chunked\r\n\r\n5\r\nbody.\r\n0\r\n\r\n",
        FULL + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        FULL + LENGTH + LENGTH + b"\r\nbody.",
        FULL + b"Content-Length: 5, 5\r\n\r\nbody.",
        FULL + b"Content-Length: +5\r\n\r\nbody.",
        FULL + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        FULL + LENGTH + b"Connection: close\r\n\r\nbody.",
        FULL + LENGTH + b"Proxy-Connection: close\r\n\r\nbody.",
        FULL + LENGTH + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\nbody.",
        FULL + b"Name with space: 1\r\n\r\n",
        FULL + b"X: a\r\n b\r\n\r\n",
        FULL + b"X: \x00\r\n\r\n",
        b"POST /full HTTP/1.0\r\nHost: x\r\n\r\n",
        b"PUT /full HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_a_request_gets_the_same_reply_in_one_piece_or_several(request_: bytes) -> None:
    """The load shedder refuses whole requests without parsing them, but only where the parser would agree."""
    replies = set()
    with serving("uvloop", Guarded) as port:
        for cut in (len(request_), 30, 5):
            with connect(port) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.sendall(request_[:cut])
                time.sleep(0.05)
                client.sendall(request_[cut:])
                received = read_all(client)
            replies.add(re.sub(rb"(?m)^(date|x-request-id): .*|[0-9a-f]{32}", b"", received))
    assert len(replies) == 1
    assert replies != {b""}


def test_blanks_in_a_header_do_not_slow_down_shedding() -> None:
    with connected("uvloop", Guarded) as client:
        started = time.monotonic()
        client.sendall(FULL + b"X: a" + b" " * 60_000 + b"b\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 429")
        assert time.monotonic() - started < 1, (
            "a look at each blank takes a millisecond, one at each pair of them seconds"
        )


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_request_that_arrived_in_time_is_answered_however_busy_the_server_was(loop: str) -> None:
    with serving(loop, Guarded) as port:
        idle, other = (connect(port) for _ in range(2))
        with idle, other:
            idle.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
            expect_reply(idle)
            time.sleep(KEEP_ALIVE / 3)
            other.sendall(b"POST /stall HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            time.sleep(KEEP_ALIVE / 3)
            idle.sendall(HEAD + b"Content-Length: 0\r\n\r\n")
            expect_reply(idle)
            assert idle.recv(1) == b"", "an idle connection is closed all the same"
