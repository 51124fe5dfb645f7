"""Clients that take their time: each is cut off, and meanwhile the others are served."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serving.connections import RECEIVE_SECONDS, SEND_SECONDS
from tests import live
from tests.benchmark.workloads import SAMPLE, multipart
from tests.faults.load import traffic

EACH = 50
"""Clients of each kind, at once."""
BODY_SECONDS = 5.0
"""REQUEST_TIMEOUT of the server."""
MARGIN = 6.0
"""Seconds on top, for a busy machine."""
HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
BATCH = multipart("images")([SAMPLE.read_bytes()] * 256)


def connect(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", port))
    return client


def dribble(port: int, start: bytes, drop: bytes) -> float:
    """Send ``start`` and then ``drop`` again and again; seconds until the server has had enough."""
    started = time.monotonic()
    with connect(port) as client:
        try:
            client.sendall(start)
            while time.monotonic() - started < 60:
                client.sendall(drop)
                time.sleep(0.5)
        except OSError:
            pass
    return time.monotonic() - started


def slow_header(port: int) -> float:
    return dribble(port, HEAD, b"X: y\r\n")


def slow_body(port: int) -> float:
    return dribble(port, HEAD + b"Content-Length: 100000\r\n\r\n", b"x")


def slow_reader(port: int) -> float:
    """Asks for large replies and takes a byte of them now and then."""
    head = f"POST /classify/batch HTTP/1.1\r\nHost: x\r\nContent-Type: {BATCH.content_type}\r\n"
    started = time.monotonic()
    with connect(port) as client:
        client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(BATCH.content) + BATCH.content)
        try:
            while time.monotonic() - started < 90 and client.recv(1):
                time.sleep(1)
        except OSError:
            pass
    return time.monotonic() - started


def test_slow_clients_are_cut_off_and_the_others_served(tmp_path: Path, say: Callable[[str], None]) -> None:
    with live.serve("embedded", tmp_path, WORKERS=2, REQUEST_TIMEOUT=BODY_SECONDS) as url:
        port = int(url.rpartition(":")[2])
        with ThreadPoolExecutor(3 * EACH) as pool:
            headers = [pool.submit(slow_header, port) for _ in range(EACH)]
            bodies = [pool.submit(slow_body, port) for _ in range(EACH)]
            with traffic(url, seconds=8) as sent:
                pass
            held = {
                "headers": max(one.result() for one in headers),
                "body": max(one.result() for one in bodies),
            }
        say(f"{2 * EACH} slow clients: the last cut off after {held}; beside them {sent}")
        assert sent.failed == 0
        assert held["headers"] < RECEIVE_SECONDS + MARGIN
        assert held["body"] < BODY_SECONDS + RECEIVE_SECONDS + MARGIN


def test_a_reply_that_nobody_reads_is_given_up(tmp_path: Path, say: Callable[[str], None]) -> None:
    with live.serve("embedded", tmp_path, WORKERS=1, REQUEST_TIMEOUT=60) as url:
        port = int(url.rpartition(":")[2])
        held: list[float] = []
        readers = [threading.Thread(target=lambda: held.append(slow_reader(port))) for _ in range(4)]
        for reader in readers:
            reader.start()
        with traffic(url, seconds=8) as sent:
            pass
        for reader in readers:
            reader.join()
    say(f"{len(readers)} clients that read a byte a second: cut off after {max(held):.0f} s; beside them {sent}")
    assert sent.failed == 0
    assert max(held) < SEND_SECONDS + 30
