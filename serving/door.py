"""Load shedding by the headers alone: who would be told 429 after all is told so before anything is done for them.

At several times what the engine can do, most of the work of a server is to say no. Here it is said without a task, a
body and the layers of an application, for a fraction of the time, which is left to those who are answered.
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

GATHER_SECONDS = 0.02
SHUT_SECONDS = 1.0
"""After a refusal, in which another is likely: the least that ``Retry-After`` says."""
Count = Callable[[str, int, list[float]], None]
"""Told a path, a status, and the seconds that it took to make each reply, without the delay before it is sent."""


class Door:
    """Stands before ``paths``; ``admit(1, ahead)`` raises ``QueueFullError`` where an image more has no place.

    Ahead are the requests let in during the same turn of the event loop, in which hundreds come at once. They reach the
    queue in the next turn, unless their bodies come late, and those that are too many would be refused there after all,
    at five times the cost. Until then nothing leaves the queue: where one has no place nobody behind has.

    What is refused is counted and logged in sums, ``GATHER_SECONDS`` later.
    """

    def __init__(
        self, paths: Collection[str], admit: Callable[[int, int], None], log_requests: bool, count: Count | None = None
    ) -> None:
        self._paths = {path.encode(): path for path in paths}
        self._admit, self._log_requests, self._count = admit, log_requests, count
        self._refused: defaultdict[str, list[float]] = defaultdict(list)
        self._ahead = 0
        self._shut_until = 0.0
        self._refusal: ApiError | None = None
        """Shared by all that are refused in this turn."""

    def __call__(self, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> Response | None:
        """The refusal of a POST to ``target``, or None for one that is to be heard."""
        path = self._paths.get(target.partition(b"?")[0])
        if path is None or draining.begun.is_set():
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
            asyncio.get_running_loop().call_later(GATHER_SECONDS, self._tell)
        response = standalone(self._refusal, headers)
        ended = time.perf_counter()
        self._refused[path].append(ended - started)
        self._shut_until = ended + SHUT_SECONDS
        return response

    @property
    def is_shut(self) -> bool:
        """Whether it has refused someone in the last ``SHUT_SECONDS``, and may well refuse the next."""
        return time.perf_counter() < self._shut_until

    def _end_turn(self) -> None:
        self._ahead, self._refusal = 0, None

    def _tell(self) -> None:
        for path, seconds in self._refused.items():
            metrics.REJECTED.labels(OVERLOADED).inc(len(seconds))
            if self._count:
                self._count(path, 429, seconds)
            if self._log_requests:
                about = {"method": "POST", "path": path, "status": 429, "code": OVERLOADED, "requests": len(seconds)}
                logger.info("requests", extra=about)
        self._refused.clear()
