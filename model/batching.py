"""The queue in front of an engine: adaptive batches, and admission by images.

Work-conserving: a free engine takes whatever is waiting at once, so batches grow only while it is busy. Nothing is held
back in the hope of a fuller batch (compare the timeout of Crankshaw et al., "Clipper", NSDI 2017).
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
"""(N, ...): outputs or evidence, one row per image."""
Engine = Callable[[Pixels], Awaitable[Results]]
"""(N, H, W, 3) uint8 to ``Results``, without blocking the event loop."""

EMA_DECAY = 0.9
"""Weight of the past in a moving average: it decays by this factor with each measurement."""
REPORT_SECONDS = 0.1
"""Interval between reports of how many images wait: one for each that comes would cost more than it tells."""


class QueueFullError(RuntimeError):
    """The queue is full, or a call holds more images than the limit; ``retry_after`` is in whole seconds."""

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

    Up to ``concurrency`` batches are in flight at once: with more than one, the next batch is already at the engine
    when it becomes free. Images are refused when, at the recent rate, those ahead of them (queued or in flight) would
    keep them waiting longer than ``max_wait`` seconds. ``observe`` is called with the size of each batch, ``report``
    with the number of images that wait: at each batch and, while some do, every ``REPORT_SECONDS``, whether or not the
    engine answers. Belongs to one event loop.
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
        report: Callable[[int], None] = lambda waiting: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._engine, self.max_batch, self._max_queue, self._max_wait = engine, max_batch, max_queue, max_wait
        self._concurrency, self._observe, self._report = concurrency, observe, report
        self._next_report: asyncio.TimerHandle | None = None
        self._jobs: deque[_Job] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._images_per_second = 0.0
        """Recent rate at which images leave the queue."""
        self._under_way = 0
        """Images in batches that the engine has taken; a remote engine may queue them again."""
        self.waiting = 0
        """Images that the engine has not taken yet."""

    async def __call__(self, images: Pixels, is_wanted: Callable[[], bool] = lambda: True) -> Results:
        """Results (N, ...) for ``images`` (N, H, W, 3); more than ``max_batch`` images are split over several batches.

        Unless their batch is already in flight, nothing is computed for a caller that was cancelled, such as on a
        timeout, or for images that are no longer wanted. Raises ``GoneError`` for the latter, ``QueueFullError`` when
        the images do not fit into the queue, and whatever the engine raised for their batch.
        """
        self.admit(len(images))
        loop = asyncio.get_running_loop()
        parts = [images[i : i + self.max_batch] for i in range(0, len(images), self.max_batch)]
        jobs = [_Job(part, loop.create_future(), is_wanted) for part in parts]
        self._jobs.extend(jobs)
        self.waiting += len(images)
        self._start()
        if not self._next_report:
            self._report_while_some_wait()
        try:
            if len(jobs) == 1:  # nearly always; saves the overhead of gather
                return await jobs[0].result
            results = await asyncio.gather(*(job.result for job in jobs))
        except BaseException:
            self._withdraw(jobs)
            raise
        return np.concatenate(results)

    def admit(self, count: int, ahead: int = 0) -> None:
        """Raise ``QueueFullError`` if ``count`` more images overfill the queue or would wait longer than ``max_wait``.

        ``ahead`` further images are on their way and will be queued first. The wait is that of the call's first image:
        its images do not count as waiting for each other, so many have the same chance as one.
        """
        waiting = self.waiting + ahead
        if waiting + count > self._max_queue:
            raise QueueFullError(waiting, self._max_queue, self._retry_after(waiting), count)
        if waiting and self._images_per_second:
            limit = self._images_per_second * self._max_wait
            if waiting + self._under_way + 1 > limit:
                raise QueueFullError(waiting + self._under_way, int(limit), self._retry_after(waiting))

    def _withdraw(self, jobs: list[_Job]) -> None:
        """Take the jobs that are still waiting out of the queue when their caller leaves."""
        for job in jobs:
            if job in self._jobs:
                self._jobs.remove(job)
                self.waiting -= len(job.images)

    def _retry_after(self, waiting: int) -> int:
        """Seconds until ``waiting`` images and those in flight are done, at the recent rate; at least 1."""
        rate = self._images_per_second
        return max(1, math.ceil((waiting + self._under_way) / rate)) if rate else 1

    def _start(self) -> None:
        """Start a drain task for each waiting job, up to ``concurrency``; one that finds nothing to do ends at once."""
        for _ in range(min(len(self._jobs), self._concurrency - len(self._running))):
            # In an empty context: the task goes on to serve other callers, which must not inherit this one's variables.
            self._running.add(asyncio.get_running_loop().create_task(self._drain(), context=contextvars.Context()))

    def _report_while_some_wait(self) -> None:
        self._report(self.waiting)
        self._next_report = None
        if self.waiting:
            context = contextvars.Context()  # empty, as for the tasks above
            loop = asyncio.get_running_loop()
            self._next_report = loop.call_later(REPORT_SECONDS, self._report_while_some_wait, context=context)

    async def _drain(self) -> None:
        started = self._clock()
        try:
            while batch := self._take():
                size = sum(len(job.images) for job in batch)
                self._observe(size)
                self._report(self.waiting)
                # Saturated: images still wait or, with several batches allowed, all of them are in flight.
                is_saturated = self.waiting > 0 or 1 < self._concurrency == len(self._running)
                self._under_way += size
                try:
                    is_answered = await self._compute(batch)
                finally:
                    self._under_way -= size
                if is_answered:
                    # Counted from the end of the last batch: images also wait in the gap between two batches.
                    now = self._clock()
                    self._update_rate(size, now - started, is_saturated)
                    started = now
                if self._jobs:  # an engine that answers at once must not starve the event loop
                    await asyncio.sleep(0)
        finally:
            # Not in a done callback, which runs a tick later: a job arriving in between would wait for ever.
            self._running.discard(asyncio.current_task())

    def _update_rate(self, size: int, seconds: float, is_saturated: bool) -> None:
        """Update the drain rate with a batch of ``size`` images, done ``seconds`` after the last one."""
        # A lone batch has the engine to itself; concurrent batches share it.
        rate = size / max(seconds, 1e-6) * (self._concurrency if is_saturated else 1)
        # An unsaturated engine shows only a lower bound of its rate, which counts if it is above the estimate. There is
        # no estimate before the very first batch, which runs cold.
        if is_saturated or 0 < self._images_per_second < rate:
            self._images_per_second = moving_average(self._images_per_second, rate)

    async def _compute(self, batch: list[_Job]) -> bool:
        """Settle the jobs of a batch; returns whether the engine succeeded."""
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
        """The next batch: jobs in order of arrival while they fit, skipping those whose caller has gone."""
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
    """Exponential moving average: ``past`` (0 before the first measurement) updated with ``new``."""
    return EMA_DECAY * (past or new) + (1 - EMA_DECAY) * new


def _settle(job: _Job, outcome: Results | Exception) -> None:
    """Set the result of a job, unless its caller has gone."""
    if job.result.done():
        return
    if isinstance(outcome, Exception):
        job.result.set_exception(outcome)
    else:
        job.result.set_result(outcome)
