"""Readiness that proves correctness: the reference images must come back with the outputs stored in the artifact."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable

import numpy as np

from model.artifact import Outputs, Reference
from model.batching import Batcher
from model.runtimes import Runtime
from model.verification import VerificationError, check, verify
from serving import draining
from serving.engines import HANG_SECONDS, EngineClient

logger = logging.getLogger("classifier.readiness")

WRONG_SECONDS = 60.0
"""Delay before a wrong engine is verified again, or the runner that owns it restarted."""
RETRY_SECONDS = 0.5
"""Interval at which a starting runner is polled for readiness."""


class Readiness:
    """Whether a worker answers correctly: it sends the reference images through ``queue``, the very path of requests.

    ``max_images`` is the most that the queue admits at once; ``on_success`` is called after each verification that
    succeeds.
    """

    def __init__(
        self,
        engine: EngineClient,
        queue: Batcher,
        reference: Reference,
        runtime: str,
        max_images: int,
        on_success: Callable[[], None],
    ) -> None:
        self._engine, self._queue, self._reference, self._runtime = engine, queue, reference, runtime
        self._max_images, self._on_success = max_images, on_success
        self._lock = asyncio.Lock()
        self._next_verification = 0.0
        self.is_verified = False
        """Set to False when the engine may have become another one: it is then verified again."""

    async def check(self) -> bool:
        """Whether this worker is ready; False from SIGTERM on."""
        if draining.started.is_set():
            return False
        if not await self._engine.is_ready():
            self.is_verified = False  # whatever replaces the runner must be verified again
            return False
        # One at a time: the first requests share a verification instead of each starting their own.
        async with self._lock:
            if not self.is_verified and time.monotonic() >= self._next_verification:
                self.is_verified = await self._verify()
            return self.is_verified

    async def check_when_possible(self) -> None:
        """Verify as soon as there is an engine: a probe reaches one worker, and requests would meet the others cold."""
        while not await self._engine.is_ready():  # noqa: ASYNC110  # another process sets no event
            await asyncio.sleep(RETRY_SECONDS)
        await self.check()

    async def _verify(self) -> bool:
        try:
            async with asyncio.timeout(HANG_SECONDS):
                check(await self._outputs(), self._reference, self._runtime)
        except VerificationError as error:
            # The next request or probe would find the same: no need to compute and log it each time.
            self._next_verification = time.monotonic() + WRONG_SECONDS
            logger.critical("not ready", extra={"reason": str(error)})
            return False
        except Exception as error:
            logger.warning("not ready yet", extra={"reason": repr(error)})
            return False
        self._on_success()
        return True

    async def _outputs(self) -> Outputs:
        """Outputs for the reference images, in batches that even the smallest queue admits."""
        images = self._reference.images
        size = min(self._queue.max_batch, self._max_images)
        scores = np.concatenate([await self._queue(images[i : i + size]) for i in range(0, len(images), size)])
        return scores[:, : self._reference.outputs.shape[1]]


def verify_or_exit(engine: Runtime, reference: Reference, is_alone: bool) -> bool:
    """Whether a runner's engine is right; if not, the runner exits in ``WRONG_SECONDS``: its successor may be right.

    The workers' own verification reaches only one of several runners, and none that replaces another. Unless the runner
    ``is_alone``, this does not return if the engine is wrong, because workers would ask it whenever it is free.
    """
    try:
        verify(engine, reference)
    except VerificationError as error:
        logger.critical("not ready", extra={"reason": str(error)})
        end = draining.exit_after(WRONG_SECONDS)
        if not is_alone:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            end.join()
        return False
    return True
