"""Where an engine runs, seen from a worker: in this process, or in the runner's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, Protocol

import numpy as np

from model.artifact import Outputs
from model.preprocess import Pixels
from model.runtimes import Runtime
from model.tuning import images_per_second
from serving.errors import ApiError

logger = logging.getLogger("classifier.hosts")


class Host(Protocol):
    """Infers and explains without blocking the event loop, ``concurrency`` batches at once."""

    concurrency: int

    async def infer(self, images: Pixels) -> Outputs: ...

    async def evidence(self, images: Pixels) -> Outputs: ...


class Local:
    """An engine of this process, in a thread of its own; ``answer`` is how it infers, with a shadow or without."""

    concurrency = 1

    def __init__(self, engine: Runtime, answer: Callable[[Pixels], Outputs]) -> None:
        self._engine, self._answer = engine, answer
        self._thread = ThreadPoolExecutor(1, "engine")

    async def infer(self, images: Pixels) -> Outputs:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, images)

    async def evidence(self, images: Pixels) -> Outputs:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.evidence, images)

    async def images_per_second(self, images: Pixels) -> float:
        return await asyncio.get_running_loop().run_in_executor(self._thread, images_per_second, self._engine, images)


class Remote:
    """The runner behind a BentoML dependency."""

    concurrency = 4
    """Batches that one worker keeps on their way, so that the runner never waits for one."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner.to_async

    async def infer(self, images: Pixels) -> Outputs:
        return await self._ask(self._runner.infer, images)

    async def evidence(self, images: Pixels) -> Outputs:
        return await self._ask(self._runner.evidence, images)

    async def _ask(self, method: Callable[[Pixels], Awaitable[Any]], images: Pixels) -> Outputs:
        try:
            return np.asarray(await method(images), np.float32)
        except Exception as error:
            logger.error("the runner failed", extra={"reason": repr(error)})
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", "the engine cannot be reached") from error
