"""Tells Prometheus that this worker's event loop runs: from outside, a hung process looks like any other.

Request counts do not tell: clients that keep their connections open may leave a worker without any.
"""

from __future__ import annotations

import asyncio
from typing import NoReturn

from serving import metrics

BEAT_SECONDS = 15.0
"""A quarter of the time after which the Prometheus rules take a worker for hung."""


async def beat(process: str) -> NoReturn:
    """Record the time, again and again, for the worker called ``process`` in its logs."""
    alive = metrics.WORKER_ALIVE.labels(process)
    while True:
        alive.set_to_current_time()
        await asyncio.sleep(BEAT_SECONDS)
