"""Open loop: requests leave when they are due (a Poisson process), whether or not earlier ones have been answered.

    python -m tests.benchmark.openloop URL BODY_FILE CONTENT_TYPE --rate 5000 --seconds 8 --deadline 1

A reply is good if it is a 200 within the deadline, counted from the moment when its request was due, so that a late
generator or connection hides nothing (Schroeder et al., "Open versus closed", NSDI 2006).
Written for this benchmark because it shares two cores with the server: at 15,000 requests/s any generator is costly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import httptools
import numpy as np
import uvloop

from tests.benchmark.workloads import Body

MAX_CONNECTIONS = 4096
"""Beyond this limit a request counts as unsent, as at a proxy with such a limit. Connections are opened on demand."""
IDLE_SECONDS = 4.0
"""An idle connection older than this is not reused, because the server may be closing it: BentoML does after 5 s."""
TICK = 0.001
GIVEN_UP, LOST, UNANSWERED = "unsent", "connection lost", "unanswered"
"""Outcomes counted in place of a status code."""


class Reply(NamedTuple):
    """Outcome of one request; ``due`` and ``answered`` are seconds since the start."""

    outcome: str
    due: float
    answered: float


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request in flight."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._due: float | None = None
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transport is no subclass of it
        self._load.open.add(self)

    def abort(self) -> None:
        self._transport.abort()

    def send(self, due: float) -> None:
        self._due = due
        self._transport.write(next(self._load.requests))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_message_complete(self) -> None:
        self._settle(str(self._parser.get_status_code()))
        if self._parser.should_keep_alive():
            self.idle_since = self._load.now()
            self._load.idle.append(self)
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._load.connections -= 1
        self._load.open.discard(self)
        if self in self._load.idle:
            self._load.idle.remove(self)
        self._settle(LOST)

    def _settle(self, outcome: str) -> None:
        if self._due is not None:
            self._load.settle(outcome, self._due)
            self._due = None


class Load:
    """Sends ``bodies`` in turn, each when it is due."""

    def __init__(self, url: str, *bodies: Body) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        self.requests = cycle([_request(head, body) for body in bodies])
        self.idle: list[Connection] = []
        """A stack: reusing the most recent connection keeps no more of them open than needed."""
        self.open: set[Connection] = set()
        self.connections = 0
        self.sent = 0
        self._stopped = self._ended = False
        self.replies: list[Reply] = []
        self.lags: list[float] = []
        """How late each request left, in seconds."""
        self._complete = asyncio.Event()
        self._faults: list[dict[str, Any]] = []
        self._connecting: set[asyncio.Task[None]] = set()

    async def run(self, due: np.ndarray, deadline: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda loop, context: self._faults.append(context))
        self._start = self._loop.time()
        while self.sent < len(due) and not self._stopped:
            now = self.now()
            while self.sent < len(due) and due[self.sent] <= now:
                self._fire(float(due[self.sent]))
                self.lags.append(now - float(due[self.sent]))
                self.sent += 1
            await asyncio.sleep(TICK)
        self._stopped = True
        self._check()
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                await self._complete.wait()
        self._ended = True
        for connection in list(self.open):
            connection.abort()
        await asyncio.sleep(0)
        if self._faults:
            raise RuntimeError(f"the generator itself failed: {self._faults[0]}")

    def settle(self, outcome: str, due: float) -> None:
        if self._ended:  # closed by us at the end of the run: the request stays unanswered
            return
        self.replies.append(Reply(outcome, due, self.now()))
        self._check()

    def stop(self) -> None:
        """Send no more requests. Thread-safe."""
        self._stopped = True

    def _check(self) -> None:
        if self._stopped and len(self.replies) == self.sent:
            self._complete.set()

    def now(self) -> float:
        """Seconds since the start, on the clock of the replies."""
        return self._loop.time() - self._start

    def _fire(self, due: float) -> None:
        if self.idle and self.now() - self.idle[-1].idle_since < IDLE_SECONDS:
            self.idle.pop().send(due)
        elif self.connections < MAX_CONNECTIONS:
            self.connections += 1
            task = self._loop.create_task(self._connect(due))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
        else:
            self.settle(GIVEN_UP, due)

    async def _connect(self, due: float) -> None:
        try:
            _, connection = await self._loop.create_connection(lambda: Connection(self), self._host, self._port)
        except OSError:
            self.connections -= 1
            self.settle(LOST, due)
        else:
            connection.send(due)


def _request(head: str, body: Body) -> bytes:
    fields = f"Content-Type: {body.content_type}\r\nContent-Length: {len(body.content)}\r\n\r\n"
    return (head + fields).encode() + body.content


def arrivals(rate: float, seconds: float, seed: int = 0) -> np.ndarray:
    """Arrival times of a Poisson process in seconds; the same seed always gives the same times."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 1.1) + 100)
    moments = gaps.cumsum()
    return np.asarray(moments[moments < seconds])


def report(load: Load, due: np.ndarray, seconds: float, deadline: float) -> dict[str, Any]:
    """Goodput excludes the first ``deadline`` seconds, while the server's queue is still filling."""
    outcomes = Counter(reply.outcome for reply in load.replies)
    outcomes[UNANSWERED] = len(due) - len(load.replies)
    latencies = [r.answered - r.due for r in load.replies if r.outcome == "200"]
    good = sum(
        r.outcome == "200" and r.answered - r.due <= deadline and deadline <= r.answered < seconds for r in load.replies
    )
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99)) if latencies else (None, None, None)
    return {
        "offered": len(due) / seconds,
        "good": good / (seconds - deadline),
        "outcomes": {outcome: count for outcome, count in sorted(outcomes.items()) if count},
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "lag_p99": float(np.percentile(load.lags, 99)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("body", type=Path)
    parser.add_argument("content_type")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--deadline", type=float, default=1.0)
    options = parser.parse_args()
    load = Load(options.url, Body(options.content_type, options.body.read_bytes()))
    due = arrivals(options.rate, options.seconds)
    uvloop.run(load.run(due, options.deadline))
    print(json.dumps(report(load, due, options.seconds, options.deadline)))


if __name__ == "__main__":
    main()
