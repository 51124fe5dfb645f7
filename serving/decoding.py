"""The queue for decoding large images: one at a time, bounded, and no work for clients that have hung up."""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from model.batching import GoneError, QueueFullError, moving_average
from model.preprocess import Pixels


@dataclass(eq=False)
class _Job:
    """A call of ``decode(data, *how)``; its ``data`` is None once nobody waits for it.

    The thread's queue keeps cancelled calls until their turn, and they must not keep their images too.
    """

    is_wanted: Callable[[], bool]
    decode: Callable[..., Pixels]
    data: bytes | None
    how: tuple[Any, ...]


class DecodeQueue:
    """One thread: there is a worker for each processor, and memory for one large image.

    Refuses images that would wait longer than ``max_wait`` seconds, judging by how long recent ones took. In that
    average none counts for more than ``max_wait``: one crafted to take long would otherwise keep the others out.
    """

    def __init__(self, max_wait: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_wait, self._clock = max_wait, clock
        self._thread = ThreadPoolExecutor(1, "decode")
        self._seconds = 0.0
        """Time that one image takes, as a moving average."""
        self._pending: set[Future[Pixels]] = set()
        self._reservations = 0

    @property
    def waiting(self) -> int:
        """Images waiting, being decoded or about to come; one whose caller gave up counts only while being decoded."""
        return len(self._pending) + self._reservations

    def admit(self) -> None:
        """Raise ``QueueFullError`` if one more would wait too long. An empty queue accepts any."""
        delay = self.waiting * self._seconds
        if delay > self._max_wait:
            raise QueueFullError(self.waiting, int(self._max_wait / self._seconds), math.ceil(delay))

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """``admit`` an image that comes only after this block, and count it as waiting meanwhile."""
        self.admit()
        self._reservations += 1
        try:
            yield
        finally:
            self._reservations -= 1

    async def __call__(
        self, is_wanted: Callable[[], bool], decode: Callable[..., Pixels], data: bytes, *how: Any
    ) -> Pixels:
        """``decode(data, *how)`` in its turn; raises what it raises, or ``GoneError`` if no longer wanted by then."""
        job = _Job(is_wanted, decode, data, how)
        future = self._thread.submit(contextvars.copy_context().run, self._run, job)  # its log lines have a request id
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        try:
            return await asyncio.wrap_future(future)
        finally:
            job.data = None

    def _run(self, job: _Job) -> Pixels:
        data = job.data
        if data is None or not job.is_wanted():
            raise GoneError("the client hung up")
        started = self._clock()
        try:
            return job.decode(data, *job.how)
        finally:
            self._seconds = moving_average(self._seconds, min(self._clock() - started, self._max_wait))
