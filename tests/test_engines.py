"""Where a worker's own engine computes: small batches at once, others in its thread, and never two calls at a time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
from tests.loops import in_a_loop

IMAGE = np.zeros((1, 4, 4, 3), np.uint8)


class Engine:
    """Takes ``seconds`` per image, records the calling threads, and fails if called concurrently."""

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


def test_small_batches_run_on_the_event_loop_once_known_to_be_fast() -> None:
    """Repeated, because a stall of the machine makes even a small batch slow."""

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


@in_a_loop
async def test_a_slow_engine_never_blocks_the_event_loop() -> None:
    engine = Engine(2 * MAX_BLOCKING_SECONDS)
    local = LocalEngine(engine, engine)
    for _ in range(4):
        await local.infer(IMAGE)
    assert set(engine.threads) == {"engine_0"}


@in_a_loop
async def test_inference_time_excludes_waiting_for_the_engine() -> None:
    def inferred() -> float:
        return REGISTRY.get_sample_value("classifier_stage_seconds_sum", {"stage": "infer"}) or 0.0

    engine = Engine(MAX_BLOCKING_SECONDS)
    local = LocalEngine(engine, engine, concurrency=2)
    before, started = inferred(), time.perf_counter()
    await asyncio.gather(*(local.infer(np.repeat(IMAGE, 4, axis=0)) for _ in range(6)))
    assert 24 * MAX_BLOCKING_SECONDS <= inferred() - before <= time.perf_counter() - started


@in_a_loop
async def test_calls_wait_for_an_engine_that_is_busy() -> None:
    engine = Engine(MAX_BLOCKING_SECONDS / 4)
    local = LocalEngine(engine, engine)
    await local.infer(IMAGE)
    busy = asyncio.create_task(local.evidence(np.repeat(IMAGE, 20, axis=0)))
    await asyncio.sleep(MAX_BLOCKING_SECONDS)  # until the thread has started
    await asyncio.gather(busy, *(local.infer(IMAGE) for _ in range(3)))
    assert engine.threads == ["engine_0"] * 5


@pytest.mark.parametrize(("concurrency", "waiting"), [(1, 2), (2, 1)])
@in_a_loop
async def test_with_two_batches_in_flight_the_next_one_waits_at_the_engine(concurrency: int, waiting: int) -> None:
    engine = Engine(seconds=0.1)
    local = LocalEngine(engine, engine, concurrency)
    queue = Batcher(local.infer, max_batch=1, max_queue=8, concurrency=local.concurrency)
    jobs = [asyncio.create_task(queue(IMAGE)) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert queue.waiting == waiting
    await asyncio.gather(*jobs)
    assert engine.threads == ["engine_0"] * 3


class Broken:
    """A GPU after an error from which its process cannot recover."""

    name = "broken"

    def __call__(self, images: Pixels) -> Outputs:
        raise EngineLostError("CUDA error: an illegal memory access was encountered")

    def evidence(self, images: Pixels) -> NDArray[np.float32]:
        return self(images)


@in_a_loop
async def test_a_lost_engine_gives_503_and_its_process_gives_up_once() -> None:
    reasons: list[str] = []
    local = LocalEngine(Broken(), Broken(), give_up=reasons.append)
    for ask in (local.infer, local.infer, local.evidence):
        with pytest.raises(ApiError) as caught:
            await ask(IMAGE)
        assert caught.value.status == 503
    assert reasons == ["CUDA error: an illegal memory access was encountered"]


@in_a_loop
async def test_a_hanging_engine_is_given_up_but_a_busy_one_is_not() -> None:
    reasons: list[str] = []

    async def ask(seconds: float, times: int) -> None:
        engine = Engine(seconds)
        local = LocalEngine(engine, engine, patience=0.5, give_up=reasons.append)
        for _ in range(times):
            await local.infer(IMAGE)

    await ask(seconds=0.2, times=5)
    assert reasons == []
    await ask(seconds=2, times=1)
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


def test_a_process_that_gives_up_ends_even_if_a_thread_hangs() -> None:
    """It is told to stop first, so that requests in progress are answered and a mail is sent."""
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


def test_a_process_without_an_engine_does_not_drain() -> None:
    """Draining, it would keep accepting requests that other processes can answer."""
    done = subprocess.run([sys.executable, "-c", HOPELESS], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "told to stop\n"), done.stderr


@asynccontextmanager
async def runner_at(socket: Path) -> AsyncIterator[RunnerClient]:
    """A client of the runner that listens, or does not, on ``socket``."""

    async def get_session() -> aiohttp.ClientSession:
        return session

    async with aiohttp.ClientSession("http://runner", connector=aiohttp.UnixConnector(str(socket))) as session:
        client = SimpleNamespace(_session_manager=SimpleNamespace(get_session=get_session))
        yield RunnerClient(SimpleNamespace(to_async=client))


async def ask_a_runner(socket: Path, hang_ups: int) -> Outputs:
    """Ask a runner that closes its first ``hang_ups`` connections, and answers each later one with a row of zeros."""
    left = hang_ups

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(IMAGE.nbytes)
        left -= 1
        if left < 0:
            writer.write(b"HTTP/1.1 200 OK\r\nx-shape: 1,3\r\ncontent-length: 12\r\n\r\n" + bytes(12))
        writer.close()

    async with await asyncio.start_unix_server(serve, socket), runner_at(socket) as remote:
        return await remote.infer(IMAGE)


@in_a_loop
async def test_a_runner_that_hangs_up_is_asked_again_once(tmp_path: Path) -> None:
    assert (await ask_a_runner(tmp_path / "s", hang_ups=1)).tolist() == [[0, 0, 0]]


@in_a_loop
async def test_an_unreachable_runner_gives_503(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="cannot be reached"):
        await ask_a_runner(tmp_path / "s", hang_ups=2)


@in_a_loop
async def test_an_unready_runner_is_logged_once_for_many_probes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with runner_at(tmp_path / "s") as remote:
        assert [await remote.is_ready() for _ in range(3)] == [False, False, False]
    (told,) = caplog.records
    assert told.reason.startswith("the engine cannot be reached: ")  # type: ignore[attr-defined]  # as logged
