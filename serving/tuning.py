"""Adopts the batch size that is fastest on this machine, measured while no request waits."""

from __future__ import annotations

import asyncio
import logging

from model.batching import Batcher
from model.preprocess import Pixels
from model.tuning import best_batch, measure_batches
from serving import metrics
from serving.engines import LocalEngine

logger = logging.getLogger("classifier.tuning")

IDLE_SECONDS = 0.05
"""Interval at which it is checked whether the queue is empty."""


async def tune(queue: Batcher, engine: LocalEngine, images: Pixels) -> None:
    """Set the ``max_batch`` of ``queue`` by how fast its ``engine`` is for batches of ``images`` (N, H, W, 3)."""

    async def until_idle() -> None:
        while queue.waiting:  # noqa: ASYNC110  # an event would cost every request a little
            await asyncio.sleep(IDLE_SECONDS)

    try:
        seconds = await measure_batches(engine.seconds_of, images, until_idle)
    except Exception:
        logger.exception("measuring batch sizes failed")
        return
    queue.max_batch = best_batch(seconds)
    metrics.BATCH_LIMIT.set(queue.max_batch)
    rates = {size: round(size / taken, 1) for size, taken in seconds.items()}
    logger.info("measured batches", extra={"images_per_s": rates, "max_batch": queue.max_batch})
