"""Clients that send slowly: each is cut off, and the others are served meanwhile."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serving.connections import Connection
from tests import live
from tests.faults.load import traffic

EACH = 50
"""Number of clients of each kind, all at once."""
BODY_SECONDS = 5.0
"""REQUEST_TIMEOUT of the server."""
MARGIN = 6.0
"""Extra seconds, for a busy machine."""
HEAD = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"


def dribble(port: int, start: bytes, drop: bytes) -> float:
    """Send ``start``, then ``drop`` repeatedly; returns the seconds until the server closes the connection."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as client:
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


def test_slow_clients_are_cut_off_while_others_are_served(tmp_path: Path, say: Callable[[str], None]) -> None:
    with live.serve("embedded", tmp_path, WORKERS=2, REQUEST_TIMEOUT=BODY_SECONDS) as url:
        port = int(url.rpartition(":")[2])
        with ThreadPoolExecutor(3 * EACH) as pool:
            headers = [pool.submit(slow_header, port) for _ in range(EACH)]
            bodies = [pool.submit(slow_body, port) for _ in range(EACH)]
            with traffic(url) as sent:
                time.sleep(4)
            held = {
                "headers": max(one.result() for one in headers),
                "body": max(one.result() for one in bodies),
            }
        say(f"{2 * EACH} slow clients: the last cut off after {held}; beside them {sent}")
        assert sent.failed == 0
        assert held["headers"] < Connection.receive_seconds + MARGIN
        assert held["body"] < BODY_SECONDS + Connection.receive_seconds + MARGIN
