"""Tells Prometheus that the event loop of this worker turns: one that hangs is a process like any other.

Its requests do not tell: those who keep connections open may leave a worker without any.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn

from serving import metrics

BEAT_SECONDS = 15.0
"""A quarter of what the rules of Prometheus take for silence."""


async def beat(process: str) -> NoReturn:
    """Note the time, again and again, for the worker that its logs call ``process``."""
    alive = metrics.WORKER_ALIVE.labels(process)
    while True:
        alive.set_to_current_time()
        await asyncio.sleep(BEAT_SECONDS)
