"""Long work on the event loop, in pieces that let other tasks have their turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

MAX_BLOCKING_SECONDS = 0.004
"""Time after which long work on the event loop yields to other tasks, between two pieces. A single piece, such as an
image of many megabytes in base64, may take longer."""
Work = TypeVar("Work")


async def without_blocking(items: Iterable[Work]) -> AsyncIterator[Work]:
    """``items``, yielding to the event loop whenever the work on them has kept it for ``MAX_BLOCKING_SECONDS``."""
    since = time.perf_counter()
    for item in items:
        yield item
        if time.perf_counter() - since > MAX_BLOCKING_SECONDS:
            await asyncio.sleep(0)
            since = time.perf_counter()
