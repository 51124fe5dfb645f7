"""Long work on the event loop, in pieces that let everyone else have a turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

AT_ONCE_SECONDS = 0.004
"""Time after which work on the event loop gives way to others, between two pieces of it. One piece, such as an image of
many megabytes in base64, may take longer."""
Work = TypeVar("Work")


async def paced(items: Iterable[Work]) -> AsyncIterator[Work]:
    """``items``; the event loop turns whenever what is done with them has kept it for ``AT_ONCE_SECONDS``."""
    since = time.perf_counter()
    for item in items:
        yield item
        if time.perf_counter() - since > AT_ONCE_SECONDS:
            await asyncio.sleep(0)
            since = time.perf_counter()
