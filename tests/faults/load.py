"""Traffic during a fault, and the outcome of each request."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import uvloop

from model.artifact import ONNX_INT8, SHIPPED, Artifact
from model.runtimes import create
from model.tuning import images_per_second
from tests.benchmark.openloop import UNANSWERED, Load, arrivals
from tests.benchmark.workloads import SAMPLE, Body

RATE, SHARE = 200.0, 1 / 3
"""Requests per second, capped at that share of what one engine can answer on this machine: no overload is intended."""
PATIENCE = 20.0
"""Seconds after the last request within which replies still count."""
AROUND_SECONDS = 2.0
LONGEST_SECONDS = 600.0
RESTORED_SECONDS = 10.0
"""Seconds within which the service must have healed itself."""
SLACK = 0.1
"""Seconds of tolerance for learning late about an event in another process."""
ONE_IMAGE = Body("image/jpeg", SAMPLE.read_bytes())


class Traffic:
    """Requests that leave when they are due, whether or not earlier ones have been answered."""

    def __init__(self, url: str) -> None:
        self.load = Load(f"{url}/classify", ONE_IMAGE)
        self._rate = min(RATE, SHARE * _engine_rate())

    def run(self) -> None:
        uvloop.run(self.load.run(arrivals(self._rate, LONGEST_SECONDS), PATIENCE))

    @property
    def outcomes(self) -> Counter[str]:
        """The status of each request, or why it has none, counted."""
        counted = Counter(reply.outcome for reply in self.load.replies)
        return counted + Counter({UNANSWERED: self.load.sent - len(self.load.replies)})

    @property
    def failed(self) -> int:
        return self.outcomes.total() - self.outcomes["200"]

    def under_way(self, since: float, until: float) -> int:
        """Requests in flight at some moment between ``since`` and ``until``, both times of ``load.now()``."""
        return sum(reply.due <= until + SLACK and reply.answered >= since - SLACK for reply in self.load.replies)

    def __str__(self) -> str:
        counted = ", ".join(f"{outcome}: {count}" for outcome, count in self.outcomes.most_common())
        return f"{self.load.sent} sent ({counted})"


@cache
def _engine_rate() -> float:
    """Images per second of the shipped model on one core, one image at a time."""
    artifact = Artifact.load(SHIPPED)
    return images_per_second(create(ONNX_INT8, artifact), artifact.reference(ONNX_INT8).images[:1])


@contextmanager
def traffic(url: str) -> Iterator[Traffic]:
    """Send requests at a steady rate during the block and shortly before and after; all of them are settled on exit."""
    running = Traffic(url)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(running.run)
        try:
            time.sleep(AROUND_SECONDS)
            yield running
            time.sleep(AROUND_SECONDS)
        finally:
            running.load.stop()
        done.result()


def seconds_until(condition: Callable[[], bool], limit: float) -> float:
    """How long ``condition`` takes to become true; fails after ``limit`` seconds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit, f"not within {limit} s"
        time.sleep(0.05)
    return time.monotonic() - started
