"""Load shedding by the headers alone: a request that would end in 429 gets it before any work is done for it.

At several times the engine's capacity, most of a server's work is saying no. Here that takes no task, no body and no
application layers, only a fraction of the time, and the rest is left to requests that are answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from starlette.responses import Response

from model.batching import QueueFullError
from serving import draining, metrics
from serving.errors import OVERLOADED, ApiError, from_exception, standalone

logger = logging.getLogger("classifier.access")

REPORT_SECONDS = 0.02
SHEDDING_SECONDS = 1.0
"""Time after a refusal in which another is likely: the smallest ``Retry-After``."""
Count = Callable[[str, int, list[float]], None]
"""Called with a path, a status, and the seconds it took to make each reply, without the delay before it is sent."""


class LoadShedder:
    """Guards ``paths``; ``admit(1, ahead)`` raises ``QueueFullError`` if there is no room for another image.

    ``ahead`` is the number of requests admitted in the same turn of the event loop, in which hundreds may arrive at
    once. They reach the queue in the next turn, unless their bodies come late; any excess would be refused there after
    all, at five times the cost. Until then nothing leaves the queue: if one request has no room, none behind it has.

    Refusals are counted and logged in sums, ``REPORT_SECONDS`` later.
    """

    def __init__(
        self, paths: Collection[str], admit: Callable[[int, int], None], log_requests: bool, count: Count | None = None
    ) -> None:
        self._paths = {path.encode(): path for path in paths}
        self._admit, self._log_requests, self._count = admit, log_requests, count
        self._refused: defaultdict[str, list[float]] = defaultdict(list)
        self._ahead = 0
        self._shedding_until = 0.0
        self._refusal: ApiError | None = None
        """Shared by all requests refused in this turn."""

    def __call__(self, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> Response | None:
        """The refusal of a POST to ``target``, or None to admit it."""
        path = self._paths.get(target.partition(b"?")[0])
        if path is None or draining.started.is_set():
            return None
        started = time.perf_counter()
        if not (self._ahead or self._refusal):
            asyncio.get_running_loop().call_soon(self._end_turn)
        if not self._refusal:
            try:
                self._admit(1, self._ahead)
            except QueueFullError as full:
                self._refusal = from_exception(full)
            else:
                self._ahead += 1
                return None
        if not self._refused:
            asyncio.get_running_loop().call_later(REPORT_SECONDS, self._report)
        response = standalone(self._refusal, headers)
        ended = time.perf_counter()
        self._refused[path].append(ended - started)
        self._shedding_until = ended + SHEDDING_SECONDS
        return response

    @property
    def is_shedding(self) -> bool:
        """Whether it has refused a request in the last ``SHEDDING_SECONDS``, and may well refuse the next."""
        return time.perf_counter() < self._shedding_until

    def _end_turn(self) -> None:
        self._ahead, self._refusal = 0, None

    def _report(self) -> None:
        for path, seconds in self._refused.items():
            metrics.REJECTED.labels(OVERLOADED).inc(len(seconds))
            if self._count:
                self._count(path, 429, seconds)
            if self._log_requests:
                about = {"method": "POST", "path": path, "status": 429, "code": OVERLOADED, "requests": len(seconds)}
                logger.info("requests", extra=about)
        self._refused.clear()
