"""Traffic beside a fault, and what became of it."""

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
"""Requests a second; at most that share of what one engine could answer on this machine, for no overload is meant."""
PATIENCE = 20.0
"""Seconds after the last request in which its reply may come."""
AROUND_SECONDS = 2.0
LONGEST_SECONDS = 600.0
RESTORED_SECONDS = 10.0
"""Within which the service must have healed by itself."""
SLACK = 0.1
"""Seconds by which this process may learn late of what happened to another."""
ONE_IMAGE = Body("image/jpeg", SAMPLE.read_bytes())


class Traffic:
    """Requests that leave when they are due, whatever becomes of the others."""

    def __init__(self, url: str) -> None:
        self.load = Load(f"{url}/classify", ONE_IMAGE)
        self._rate = min(RATE, SHARE * _engine_rate())

    def run(self) -> None:
        uvloop.run(self.load.run(arrivals(self._rate, LONGEST_SECONDS), PATIENCE))

    @property
    def outcomes(self) -> Counter[str]:
        """Of every request: a status, or why there is none."""
        counted = Counter(reply.outcome for reply in self.load.replies)
        return counted + Counter({UNANSWERED: self.load.sent - len(self.load.replies)})

    @property
    def failed(self) -> int:
        return self.outcomes.total() - self.outcomes["200"]

    def under_way(self, since: float, until: float) -> int:
        """Requests that were sent and not answered at some moment between two of ``load.now()``."""
        return sum(reply.due <= until + SLACK and reply.answered >= since - SLACK for reply in self.load.replies)

    def __str__(self) -> str:
        counted = ", ".join(f"{outcome}: {count}" for outcome, count in self.outcomes.most_common())
        return f"{self.load.sent} sent ({counted})"


@cache
def _engine_rate() -> float:
    """Images a second of the shipped model, one at a time on one core."""
    artifact = Artifact.load(SHIPPED)
    return images_per_second(create(ONNX_INT8, artifact), artifact.reference(ONNX_INT8).images[:1])


@contextmanager
def traffic(url: str) -> Iterator[Traffic]:
    """Requests at a steady rate beside what is done meanwhile, and a little before and after; then all are settled."""
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
    """How long it takes; fails after ``limit`` seconds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit, f"not within {limit} s"
        time.sleep(0.05)
    return time.monotonic() - started
