"""When a worker counts as ready, with engines that the test makes wrong or absent. With real ones: test_service.py."""

from __future__ import annotations

import asyncio

import pytest

from model.artifact import ONNX_INT8, SHIPPED, Artifact, Evidence, Outputs
from model.batching import Batcher
from model.preprocess import Pixels
from serving import draining
from serving.readiness import Readiness
from tests.loops import in_a_loop

REFERENCE = Artifact.load(SHIPPED).reference(ONNX_INT8)
COUNT = len(REFERENCE.images)


class Engine:
    """Answers with the reference outputs, one after another, and ``error`` added to them."""

    concurrency = 1

    def __init__(self, error: float = 0.0, is_there: bool = True) -> None:
        self.error, self.is_there, self.computed = error, is_there, 0

    async def is_ready(self) -> bool:
        return self.is_there

    async def infer(self, images: Pixels) -> Outputs:
        start = self.computed % COUNT
        self.computed += len(images)
        await asyncio.sleep(0)
        return REFERENCE.outputs[start : start + len(images)] + self.error

    async def evidence(self, images: Pixels) -> Evidence:
        raise NotImplementedError


def readiness_of(engine: Engine, max_queue: int = COUNT, told: list[str] | None = None) -> Readiness:
    queue = Batcher(engine.infer, max_batch=COUNT, max_queue=max_queue)
    on_success = (lambda: None) if told is None else (lambda: told.append("ready"))
    return Readiness(engine, queue, REFERENCE, ONNX_INT8, max_queue, on_success)


@in_a_loop
async def test_simultaneous_requests_share_one_verification() -> None:
    engine, told = Engine(), list[str]()
    readiness = readiness_of(engine, told=told)
    assert await asyncio.gather(*(readiness.check() for _ in range(5))) == [True] * 5
    assert engine.computed == COUNT
    assert told == ["ready"]


@in_a_loop
async def test_the_smallest_queue_is_enough_for_the_reference_images() -> None:
    assert await readiness_of(Engine(), max_queue=1).check()


@in_a_loop
async def test_a_wrong_engine_is_verified_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(error=5)
    readiness = readiness_of(engine)
    assert [await readiness.check() for _ in range(3)] == [False] * 3
    assert engine.computed == COUNT
    monkeypatch.setattr("serving.readiness.WRONG_SECONDS", 0.0)
    readiness = readiness_of(engine)
    assert not await readiness.check()
    engine.error = 0.0
    assert await readiness.check()


@in_a_loop
async def test_an_engine_that_was_away_is_verified_again() -> None:
    engine = Engine()
    readiness = readiness_of(engine)
    assert await readiness.check()
    engine.is_there = False
    assert not await readiness.check()
    engine.is_there, engine.error = True, 5
    assert not await readiness.check()


@in_a_loop
async def test_an_engine_is_verified_unasked_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.readiness.RETRY_SECONDS", 0.01)
    engine = Engine(is_there=False)
    readiness = readiness_of(engine)
    verification = asyncio.create_task(readiness.check_when_possible())
    await asyncio.sleep(0.05)
    assert not verification.done()
    engine.is_there = True
    await verification
    assert readiness.is_verified


@in_a_loop
async def test_a_draining_worker_is_not_ready() -> None:
    readiness = readiness_of(Engine())
    assert await readiness.check()
    draining.started.set()
    try:
        assert not await readiness.check()
    finally:
        draining.started.clear()
