"""The queue in front of an engine: adaptive batches, and admission by images.

Work-conserving: an engine that is free takes what waits at once, so that batches grow only while it is busy. Nothing is
held back in the hope of a fuller batch (compare the timeout of Crankshaw et al., "Clipper", NSDI 2017).
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.preprocess import Pixels

Results = NDArray[np.float32]
"""(N, ...): outputs or evidence, a row for each image."""
Engine = Callable[[Pixels], Awaitable[Results]]
"""(N, H, W, 3) uint8 to ``Results``, without blocking the event loop."""

MEMORY = 0.9
"""Weight of the past in a moving average."""


class QueueFullError(RuntimeError):
    """More images wait, or come at once, than the limit; ``retry_after`` is in whole seconds."""

    def __init__(self, waiting: int, limit: int, retry_after: int, count: int = 1) -> None:
        coming = f", and {count} come" if count > 1 else ""
        message = f"{waiting} images are waiting{coming}; expected at most {limit}: try again in {retry_after} s"
        super().__init__(message + ", or with fewer at once" * (count > max(1, limit)))
        self.retry_after = retry_after


class GoneError(RuntimeError):
    """The caller's client hung up before its images were taken."""


@dataclass(eq=False)
class _Job:
    images: Pixels
    result: asyncio.Future[Results]
    is_wanted: Callable[[], bool]


class Batcher:
    """Groups the images of concurrent callers into batches of at most ``max_batch`` for ``engine``.

    ``concurrency`` batches may be under way at once: with more than one, the next is at the engine when that is free.
    Images that would wait longer than ``max_wait`` seconds for those before them, waiting or under way, are refused, by
    the rate of late.
    ``observe`` is told the size of each batch. Belongs to one event loop.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int,
        max_queue: int = sys.maxsize,
        max_wait: float = math.inf,
        concurrency: int = 1,
        observe: Callable[[int], None] = lambda size: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._engine, self.max_batch, self._max_queue, self._max_wait = engine, max_batch, max_queue, max_wait
        self._concurrency, self._observe = concurrency, observe
        self._jobs: deque[_Job] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._images_per_second = 0.0
        """That leave the queue, as seen lately."""
        self._under_way = 0
        """Images in batches that the engine has taken; a remote one may have a queue of its own."""
        self.waiting = 0
        """Images that no engine has taken yet."""

    async def __call__(self, images: Pixels, is_wanted: Callable[[], bool] = lambda: True) -> Results:
        """Results (N, ...) for ``images`` (N, H, W, 3); more than ``max_batch`` of them are split over batches.

        Unless its batch is already under way, nothing is computed for a caller that was cancelled, because it ran out
        of time, or for images that by then are no longer wanted: ``GoneError``. Raises ``QueueFullError`` when the
        images do not fit into the queue, and whatever the engine raised for their batch.
        """
        self.admit(len(images))
        loop = asyncio.get_running_loop()
        parts = [images[i : i + self.max_batch] for i in range(0, len(images), self.max_batch)]
        jobs = [_Job(part, loop.create_future(), is_wanted) for part in parts]
        self._jobs.extend(jobs)
        self.waiting += len(images)
        self._start()
        try:
            if len(jobs) == 1:  # nearly every time, and without the tasks' worth of work that gathering is
                return await jobs[0].result
            results = await asyncio.gather(*(job.result for job in jobs))
        except BaseException:
            self._withdraw(jobs)
            raise
        return np.concatenate(results)

    def admit(self, count: int, ahead: int = 0) -> None:
        """Raise ``QueueFullError`` when ``count`` images more are too many, or would wait longer than ``max_wait``.

        Behind those that wait come ``ahead`` others, which are on their way. Those of one call wait for who was before
        them, and not for each other: many at once have the same chance as one.
        """
        waiting = self.waiting + ahead
        if waiting + count > self._max_queue:
            raise QueueFullError(waiting, self._max_queue, self._retry_after(waiting), count)
        if waiting and self._images_per_second:
            limit = max(0.0, self._images_per_second * self._max_wait - self._under_way)
            if waiting + 1 > limit:
                raise QueueFullError(waiting, int(limit), self._retry_after(waiting))

    def _withdraw(self, jobs: list[_Job]) -> None:
        """Free the places of what is still waiting when its caller leaves."""
        for job in jobs:
            if job in self._jobs:
                self._jobs.remove(job)
                self.waiting -= len(job.images)

    def _retry_after(self, waiting: int) -> int:
        """Seconds until a queue of so many images has drained, at the rate seen lately."""
        rate = self._images_per_second
        return max(1, math.ceil((waiting + self._under_way) / rate)) if rate else 1

    def _start(self) -> None:
        """Wake a free engine for each waiting job; one that finds nothing to do ends at once."""
        for _ in range(min(len(self._jobs), self._concurrency - len(self._running))):
            # In a context of its own: it goes on with the images of others, and nothing of theirs is this caller's.
            self._running.add(asyncio.get_running_loop().create_task(self._drain(), context=contextvars.Context()))

    async def _drain(self) -> None:
        started = self._clock()
        try:
            while batch := self._take():
                size = sum(len(job.images) for job in batch)
                self._observe(size)
                # The rate of an engine that is not saturated is only a lower bound, and the first batch of all is cold.
                # It is saturated when images still wait or, where several batches may be under way, as many are.
                is_full = self.waiting > 0 or 1 < self._concurrency == len(self._running)
                self._under_way += size
                try:
                    is_answered = await self._compute(batch)
                finally:
                    self._under_way -= size
                if is_answered:
                    # What passes between two batches of a busy engine is time that images wait, too.
                    now = self._clock()
                    # A batch that is alone has the engine to itself; of several each has its share.
                    rate = size / max(now - started, 1e-6) * (self._concurrency if is_full else 1)
                    if is_full or 0 < self._images_per_second < rate:  # at least that much can be done
                        self._images_per_second = moving_average(self._images_per_second, rate)
                    started = now
                if self._jobs:  # an engine that answers at once must not keep the event loop from all else
                    await asyncio.sleep(0)
        finally:
            # Not in a done callback, which runs a tick later: whoever arrived in between would wait for ever.
            self._running.discard(asyncio.current_task())

    async def _compute(self, batch: list[_Job]) -> bool:
        """Answer a batch; whether its engine did."""
        try:
            outputs = await self._engine(
                batch[0].images if len(batch) == 1 else np.concatenate([job.images for job in batch])
            )
        except Exception as error:
            for job in batch:
                _settle(job, error)
            return False
        start = 0
        for job in batch:
            _settle(job, outputs[start : start + len(job.images)])
            start += len(job.images)
        return True

    def _take(self) -> list[_Job]:
        """The next batch: jobs in order of arrival while they fit, without those whose caller has gone."""
        batch: list[_Job] = []
        room = self.max_batch
        while self._jobs and (len(self._jobs[0].images) <= room or not batch):
            job = self._jobs.popleft()
            self.waiting -= len(job.images)
            if not job.is_wanted():
                _settle(job, GoneError("the client hung up"))
            if not job.result.done():
                batch.append(job)
                room -= len(job.images)
        return batch


def moving_average(past: float, new: float) -> float:
    """``past``, 0 before the first measurement, with ``new`` in it."""
    return MEMORY * (past or new) + (1 - MEMORY) * new


def _settle(job: _Job, outcome: Results | Exception) -> None:
    """Answer a job, unless its caller has gone."""
    if job.result.done():
        return
    if isinstance(outcome, Exception):
        job.result.set_exception(outcome)
    else:
        job.result.set_result(outcome)
