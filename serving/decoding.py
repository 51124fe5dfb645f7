"""The queue before the decoder of large images: one at a time, with a bound, and nothing for who has hung up."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from model.batching import GoneError, QueueFullError, moving_average
from model.preprocess import Pixels


class Decoding:
    """One thread, for there is a worker for each processor, and memory for one large image.

    Images that would wait longer than ``max_wait`` seconds, by what lately one took, are refused.
    """

    def __init__(self, max_wait: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_wait, self._clock = max_wait, clock
        self._thread = ThreadPoolExecutor(1, "decode")
        self._seconds = 0.0
        """That one image takes, as a moving average."""
        self.waiting = 0
        """Images that are waiting or being decoded."""

    def admit(self) -> None:
        """Raise ``QueueFullError`` when one more would wait too long. Where none waits any is welcome."""
        delay = self.waiting * self._seconds
        if delay > self._max_wait:
            raise QueueFullError(self.waiting, int(self._max_wait / self._seconds), math.ceil(delay))

    async def __call__(
        self, is_wanted: Callable[[], bool], decode: Callable[..., Pixels], data: bytes, *how: Any
    ) -> Pixels:
        """``decode(data, *how)`` in its turn; raises what it raises, and ``GoneError`` if by then it is not wanted."""
        self.waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._timed, is_wanted, decode, data, *how)
        finally:  # who gave up has left the queue too
            self.waiting -= 1

    def _timed(self, is_wanted: Callable[[], bool], decode: Callable[..., Pixels], *what: Any) -> Pixels:
        if not is_wanted():
            raise GoneError("the client hung up")
        started = self._clock()
        try:
            return decode(*what)
        finally:
            self._seconds = moving_average(self._seconds, self._clock() - started)
