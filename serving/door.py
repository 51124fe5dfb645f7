"""Refusal by the headers alone: who would be told 429 after all is told so before anything is done for them.

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
from serving.errors import from_exception, outside

logger = logging.getLogger("classifier.access")

GATHER_SECONDS = 0.02
Count = Callable[[str, int, list[float]], None]
"""Told a path, a status, and the seconds that each reply of them took."""


class Door:
    """Stands before ``paths``; ``admit`` raises ``QueueFullError`` where an image more has no place.

    What is refused is counted and logged in sums, ``GATHER_SECONDS`` later.
    """

    def __init__(
        self, paths: Collection[str], admit: Callable[[int], None], log_requests: bool, count: Count | None = None
    ) -> None:
        self._paths = {path.encode(): path for path in paths}
        self._admit, self._log_requests, self._count = admit, log_requests, count
        self._refused: defaultdict[str, list[float]] = defaultdict(list)

    def __call__(self, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> Response | None:
        """The refusal of a POST to ``target``, or None for one that is to be heard."""
        path = self._paths.get(target.partition(b"?")[0])
        if path is None or draining.begun.is_set():
            return None
        started = time.perf_counter()
        try:
            self._admit(1)
        except QueueFullError as full:
            response = outside(from_exception(full), headers)
        else:
            return None
        if not self._refused:
            asyncio.get_running_loop().call_later(GATHER_SECONDS, self._tell)
        self._refused[path].append(time.perf_counter() - started)
        return response

    @property
    def is_shut(self) -> bool:
        """Whether it has refused someone in the last ``GATHER_SECONDS``, and may well refuse the next."""
        return bool(self._refused)

    def _tell(self) -> None:
        for path, seconds in self._refused.items():
            metrics.REJECTED.labels("overloaded").inc(len(seconds))
            if self._count:
                self._count(path, 429, seconds)
            if self._log_requests:
                about = {"method": "POST", "path": path, "status": 429, "code": "overloaded", "requests": len(seconds)}
                logger.info("requests", extra=about)
        self._refused.clear()
