"""Where a worker's own engine computes: few images at once, others in its thread, never two calls together."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import REGISTRY

from model.artifact import Outputs
from model.batching import Batcher
from model.preprocess import Pixels
from model.runtimes import EngineLostError
from serving.engines import MAX_BLOCKING_SECONDS, LocalEngine, RunnerClient
from serving.errors import ApiError
from tests.live import REPOSITORY

IMAGE = np.zeros((1, 4, 4, 3), np.uint8)


class Engine:
    """Takes ``seconds`` an image and remembers in which thread; complains of company."""

    name = "fake"

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._alone = threading.Lock()
        self.threads: list[str] = []

    def __call__(self, images: Pixels) -> Outputs:
        assert self._alone.acquire(blocking=False), "two threads at once"
        self.threads.append(threading.current_thread().name)
        time.sleep(len(images) * self._seconds)
        self._alone.release()
        return np.zeros((len(images), 3), np.float32)

    def evidence(self, images: Pixels) -> NDArray[np.float32]:
        return self(images)


def test_few_images_are_computed_at_once_when_it_is_known_that_they_are_few() -> None:
    """Tried again where the machine itself stood still meanwhile: the few then took long indeed."""

    async def ask(engine: Engine) -> None:
        local = LocalEngine(engine, engine)
        for count in (1, 1, 8, 1):
            await local.infer(np.repeat(IMAGE, count, axis=0))

    seen = []
    for _ in range(5):
        engine = Engine(MAX_BLOCKING_SECONDS / 4)
        asyncio.run(ask(engine))
        seen.append(engine.threads)
    assert ["engine_0", "MainThread", "engine_0", "MainThread"] in seen


def test_a_slow_engine_never_holds_up_the_event_loop() -> None:
    engine = Engine(2 * MAX_BLOCKING_SECONDS)

    async def ask() -> None:
        local = LocalEngine(engine, engine)
        for _ in range(4):
            await local.infer(IMAGE)

    asyncio.run(ask())
    assert set(engine.threads) == {"engine_0"}


def test_the_time_of_inference_is_the_engine_s_and_not_that_of_waiting_for_it() -> None:
    engine = Engine(MAX_BLOCKING_SECONDS)

    def inferred() -> float:
        return REGISTRY.get_sample_value("classifier_stage_seconds_sum", {"stage": "infer"}) or 0.0

    async def ask() -> None:
        local = LocalEngine(engine, engine, concurrency=2)
        await asyncio.gather(*(local.infer(np.repeat(IMAGE, 4, axis=0)) for _ in range(6)))

    before, started = inferred(), time.perf_counter()
    asyncio.run(ask())
    assert 24 * MAX_BLOCKING_SECONDS <= inferred() - before <= time.perf_counter() - started


def test_an_engine_at_work_is_waited_for() -> None:
    engine = Engine(MAX_BLOCKING_SECONDS / 4)

    async def ask() -> None:
        local = LocalEngine(engine, engine)
        await local.infer(IMAGE)
        busy = asyncio.create_task(local.evidence(np.repeat(IMAGE, 20, axis=0)))
        await asyncio.sleep(MAX_BLOCKING_SECONDS)  # until the thread has begun
        await asyncio.gather(busy, *(local.infer(IMAGE) for _ in range(3)))

    asyncio.run(ask())
    assert engine.threads == ["engine_0"] * 5


def test_the_next_batch_waits_at_the_engine_where_two_may_be_under_way() -> None:
    async def left_waiting(concurrency: int) -> int:
        engine = Engine(seconds=0.1)
        local = LocalEngine(engine, engine, concurrency)
        queue = Batcher(local.infer, max_batch=1, max_queue=8, concurrency=local.concurrency)
        jobs = [asyncio.create_task(queue(IMAGE)) for _ in range(3)]
        await asyncio.sleep(0.05)
        waiting = queue.waiting
        await asyncio.gather(*jobs)
        assert engine.threads == ["engine_0"] * 3
        return waiting

    assert [asyncio.run(left_waiting(concurrency)) for concurrency in (1, 2)] == [2, 1]


class Broken:
    """A GPU after an error from which its process does not recover."""

    name = "broken"

    def __call__(self, images: Pixels) -> Outputs:
        raise EngineLostError("CUDA error: an illegal memory access was encountered")

    def evidence(self, images: Pixels) -> NDArray[np.float32]:
        return self(images)


def test_a_lost_engine_is_503_and_its_process_gives_up_once() -> None:
    reasons: list[str] = []

    async def ask() -> None:
        local = LocalEngine(Broken(), Broken(), give_up=reasons.append)
        for ask in (local.infer, local.infer, local.evidence):
            with pytest.raises(ApiError) as caught:
                await ask(IMAGE)
            assert caught.value.status == 503

    asyncio.run(ask())
    assert reasons == ["CUDA error: an illegal memory access was encountered"]


def test_an_engine_that_hangs_is_given_up_and_one_that_is_busy_is_not() -> None:
    reasons: list[str] = []

    async def ask(seconds: float, times: int) -> None:
        engine = Engine(seconds)
        local = LocalEngine(engine, engine, patience=0.5, give_up=reasons.append)
        for _ in range(times):
            await local.infer(IMAGE)

    asyncio.run(ask(seconds=0.2, times=5))
    assert reasons == []
    asyncio.run(ask(seconds=2, times=1))
    assert reasons == ["a batch takes more than 0.5 s"]


HANGING = """
import signal, time
from concurrent.futures import ThreadPoolExecutor
from serving import engines
engines.GRACE_SECONDS = 0.5
class End(BaseException): pass
def stop(*_): raise End
signal.signal(signal.SIGTERM, stop)
hung = ThreadPoolExecutor(1).submit(time.sleep, 60)
try:
    engines.give_up("it hangs")
    time.sleep(5)
except End:
    print("told to stop", flush=True)
"""


def test_a_process_that_gives_up_ends_although_a_thread_hangs() -> None:
    """Told to stop first: what it holds is answered, and a mail is sent."""
    done = subprocess.run([sys.executable, "-c", HANGING], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "told to stop\n")
    assert "the engine is lost" in done.stderr


HOPELESS = """
import asyncio, signal, sys
from serving import draining, engines

async def serve():
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(stopped.set))
    draining.install(60)
    await asyncio.to_thread(engines.give_up, "it hangs")
    await asyncio.wait_for(stopped.wait(), 5)

asyncio.run(serve())
print("told to stop", flush=True)
"""


def test_a_process_without_an_engine_drains_nothing() -> None:
    """It would go on to take requests that others can answer."""
    done = subprocess.run([sys.executable, "-c", HOPELESS], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "told to stop\n"), done.stderr


async def ask_a_runner(socket: Path, hang_ups: int) -> Outputs:
    """Of one that hangs up on its first callers, and answers each later one with a row of zeros."""
    left = hang_ups

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(IMAGE.nbytes)
        left -= 1
        if left < 0:
            writer.write(b"HTTP/1.1 200 OK\r\nx-shape: 1,3\r\ncontent-length: 12\r\n\r\n" + bytes(12))
        writer.close()

    async def get_session() -> aiohttp.ClientSession:
        return session

    connector = aiohttp.UnixConnector(str(socket))
    async with (
        await asyncio.start_unix_server(serve, socket),
        aiohttp.ClientSession("http://runner", connector=connector) as session,
    ):
        client = SimpleNamespace(_session_manager=SimpleNamespace(get_session=get_session))
        return await RunnerClient(SimpleNamespace(to_async=client)).infer(IMAGE)


def test_a_runner_that_hangs_up_is_asked_once_more(tmp_path: Path) -> None:
    assert asyncio.run(ask_a_runner(tmp_path / "s", hang_ups=1)).tolist() == [[0, 0, 0]]


def test_a_runner_that_is_gone_is_503(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="cannot be reached"):
        asyncio.run(ask_a_runner(tmp_path / "s", hang_ups=2))


def test_a_runner_that_is_not_ready_is_told_once_for_many_probes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def probe() -> list[bool]:
        async with aiohttp.ClientSession(
            "http://runner", connector=aiohttp.UnixConnector(str(tmp_path / "s"))
        ) as session:

            async def get_session() -> aiohttp.ClientSession:
                return session

            client = SimpleNamespace(_session_manager=SimpleNamespace(get_session=get_session))
            remote = RunnerClient(SimpleNamespace(to_async=client))
            return [await remote.is_ready() for _ in range(3)]

    assert asyncio.run(probe()) == [False, False, False]
    (told,) = caplog.records
    assert told.reason.startswith("the engine cannot be reached: ")  # type: ignore[attr-defined]  # as it was logged
