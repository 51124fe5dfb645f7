"""Where an engine runs, seen from a worker: in this process, or in the runner's."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Thread
from typing import Any, Protocol, TypeVar

import numpy as np

from model.artifact import Evidence, Outputs
from model.batching import Results
from model.preprocess import Pixels
from model.runtimes import EngineLostError, Runtime
from model.tuning import seconds_of
from serving import arrays, draining, metrics
from serving.errors import not_ready
from serving.logs import RateLimitedLogger
from serving.pacing import MAX_BLOCKING_SECONDS

logger = logging.getLogger("classifier.engines")

HANG_SECONDS = 60.0
"""A batch that takes longer will not come back."""
HANG_CHECKS = 10
"""Checks within ``HANG_SECONDS``; a batch that all of them see is hung."""
GRACE_SECONDS = 15.0
"""Time for a process to exit by itself, which a hung thread may prevent."""
PROBE_SECONDS = 5.0
"""Longest wait for the runner to say whether it is ready."""
Answer = TypeVar("Answer")


def give_up(reason: str) -> None:
    """End this process: it cannot get its engine back, and the supervisor starts another process."""
    logger.critical("the engine is lost", extra={"reason": reason})
    draining.exit_after(GRACE_SECONDS)
    draining.disable()
    os.kill(os.getpid(), signal.SIGTERM)


class EngineClient(Protocol):
    """Infers and explains without blocking the event loop, up to ``concurrency`` batches at once."""

    concurrency: int

    async def is_ready(self) -> bool: ...

    async def infer(self, images: Pixels) -> Outputs: ...

    async def evidence(self, images: Pixels) -> Evidence: ...


class Watchdog:
    """Runs an engine's batches, and calls ``give_up`` once if one loses the engine or takes ``patience`` seconds."""

    def __init__(self, patience: float, give_up: Callable[[str], None]) -> None:
        self._patience, self._give_up = patience, give_up
        self._call: object | None = None
        """A new object for each call while it lasts, None in between."""
        self._has_given_up = False
        Thread(target=self._watch, name="watch", daemon=True).start()

    def run(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """``function(*arguments)``, of which only one may run at a time."""
        self._call = object()
        try:
            return function(*arguments)
        except EngineLostError as error:
            self._give_up_once(str(error))
            raise not_ready("the engine is lost") from error
        finally:
            self._call = None

    def _watch(self) -> None:
        checks, call = 0, None
        while checks < HANG_CHECKS:  # not elapsed time: a process paused by `docker pause` does not hang
            time.sleep(self._patience / HANG_CHECKS)
            checks = checks + 1 if self._call and self._call is call else 0
            call = self._call
        self._give_up_once(f"a batch takes more than {self._patience:g} s")

    def _give_up_once(self, reason: str) -> None:
        if not self._has_given_up:
            self._has_given_up = True
            self._give_up(reason)


class LocalEngine:
    """An engine in this process; ``answer`` is how it infers, with or without a shadow.

    It has a thread of its own. Only a few images that take less than ``MAX_BLOCKING_SECONDS`` are computed on the event
    loop, because the way to the thread and back would cost a lone request a tenth of its time.

    When the engine is lost, or hangs for ``patience`` seconds, ``give_up`` is called once with the reason.
    """

    def __init__(
        self,
        engine: Runtime,
        answer: Callable[[Pixels], Outputs],
        concurrency: int = 1,
        patience: float = HANG_SECONDS,
        give_up: Callable[[str], None] = give_up,
    ) -> None:
        """With a ``concurrency`` of 2 the next batch waits at the engine, which then never waits for the event loop."""
        self._engine, self._answer, self.concurrency = engine, answer, concurrency
        self._watchdog = Watchdog(patience, give_up)
        self._thread = ThreadPoolExecutor(1, "engine")
        self._in_use = Lock()  # an engine is called from one thread at a time
        self._seconds_per_image = math.inf

    async def is_ready(self) -> bool:
        return True

    async def infer(self, images: Pixels) -> Outputs:
        is_short = len(images) * self._seconds_per_image < MAX_BLOCKING_SECONDS
        if is_short and self._in_use.acquire(blocking=False):
            try:
                return self._watchdog.run(self._timed, images)
            finally:
                self._in_use.release()
        return await self._in_thread(self._timed, images)

    def _timed(self, images: Pixels) -> Outputs:
        started = time.perf_counter()
        with metrics.Timer("infer"):  # here, where the engine is ours: waiting for it is not inference
            outputs = self._answer(images)
            self._seconds_per_image = (time.perf_counter() - started) / len(images)
        return outputs

    async def evidence(self, images: Pixels) -> Evidence:
        return await self._in_thread(self._engine.evidence, images)

    async def seconds_of(self, images: Pixels) -> float:
        """How long the engine takes for one batch."""
        return await self._in_thread(seconds_of, self._engine, images)

    async def _in_thread(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        def alone() -> Answer:
            with self._in_use:
                return self._watchdog.run(function, *arguments)

        return await asyncio.get_running_loop().run_in_executor(self._thread, alone)


class RunnerClient:
    """The runner behind a BentoML dependency, called over BentoML's own session."""

    concurrency = 4
    """Batches that one worker keeps in flight, so that the runner never waits for one."""

    def __init__(self, runner: Any) -> None:
        # Imported only where there is a runner: it takes a twentieth of the startup, to read certificates nobody needs.
        import aiohttp

        self._aiohttp = aiohttp
        self._session = runner.to_async._session_manager.get_session
        self._limited_logger = RateLimitedLogger(logger)

    async def is_ready(self) -> bool:
        """Whether the runner answers: it may hang, or be about to be replaced."""
        try:
            session = await self._session()
            timeout = self._aiohttp.ClientTimeout(PROBE_SECONDS)
            async with session.get("/readyz", timeout=timeout, raise_for_status=True):
                return True
        except (self._aiohttp.ClientError, TimeoutError) as error:
            self._limited_logger.warning("not ready yet", reason=f"the engine cannot be reached: {error!r}")
            return False

    async def infer(self, images: Pixels) -> Outputs:
        return await self._ask("/infer", images)

    async def evidence(self, images: Pixels) -> Evidence:
        return await self._ask("/evidence", images)

    async def _ask(self, path: str, images: Pixels) -> Results:
        message = arrays.pack(images)
        try:
            try:
                return await self._post(path, *message)
            except self._aiohttp.ClientConnectionError:  # just closed for idleness, or the runner is being replaced
                return await self._post(path, *message)
        except Exception as error:
            logger.error("the runner failed", extra={"reason": repr(error)})
            raise not_ready("the engine cannot be reached") from error

    async def _post(self, path: str, body: bytes, headers: dict[str, str]) -> Results:
        session = await self._session()
        async with session.post(path, data=body, headers=headers, raise_for_status=True) as reply:
            return arrays.unpack(await reply.read(), reply.headers[arrays.SHAPE], np.float32)
