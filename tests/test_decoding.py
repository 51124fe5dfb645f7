"""The queue in front of the decoder, with decoders that wait for the test."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from model.batching import GoneError, QueueFullError
from model.preprocess import Pixels
from serving.decoding import DecodeQueue
from tests.loops import in_a_loop

PIXELS = np.zeros((1, 1, 3), np.uint8)


class Clock:
    """Advances by ten milliseconds at every reading."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def here() -> bool:
    return True


class Slow(Clock):
    """Makes the first image appear to take an hour."""

    def __call__(self) -> float:
        self.now += 3600 if self.now == 0.01 else 0.01
        return self.now


def held(release: threading.Event, done: list[bytes]) -> Callable[[bytes], Pixels]:
    def decode(data: bytes) -> Pixels:
        assert release.wait(10)
        done.append(data)
        return PIXELS

    return decode


async def begin(queue: DecodeQueue, decode: Callable[[bytes], Pixels], count: int) -> list[asyncio.Task[Pixels]]:
    """Admit ``count`` images, and return the waiting tasks."""
    waiting = []
    for number in range(count):
        queue.admit()
        waiting.append(asyncio.create_task(queue(here, decode, b"%d" % number)))
        await asyncio.sleep(0)
    return waiting


@in_a_loop
async def test_an_image_that_would_wait_too_long_is_refused_and_the_others_are_decoded() -> None:
    release, done = threading.Event(), list[bytes]()
    decode = held(release, done)
    queue = DecodeQueue(max_wait=0.05, clock=Clock())
    queue.admit()
    release.set()
    await queue(here, decode, b"first")
    release.clear()
    waiting = await begin(queue, decode, 6)
    with pytest.raises(QueueFullError, match="6 images are waiting; expected at most 5") as refusal:
        queue.admit()
    assert refusal.value.retry_after == 1
    release.set()
    await asyncio.gather(*waiting)
    assert len(done) == 7
    queue.admit()
    assert queue.waiting == 0


@in_a_loop
async def test_nothing_is_decoded_for_a_client_that_hung_up_or_timed_out() -> None:
    release, done = threading.Event(), list[bytes]()
    decode = held(release, done)
    queue = DecodeQueue(max_wait=1)
    first = asyncio.create_task(queue(here, decode, b"first"))
    left = asyncio.create_task(queue(lambda: False, decode, b"left"))
    late = asyncio.create_task(queue(here, decode, b"late"))
    await asyncio.sleep(0.05)
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    release.set()
    await first
    with pytest.raises(GoneError):
        await left
    assert done == [b"first"]
    assert queue.waiting == 0


@in_a_loop
async def test_a_timeout_leaves_nothing_behind_and_does_not_free_a_busy_decoder() -> None:
    release, done = threading.Event(), list[bytes]()
    decode = held(release, done)
    queue = DecodeQueue(max_wait=1)
    body = bytes(1000)
    holders = sys.getrefcount(body)

    async def give_up() -> None:
        tasks = [asyncio.create_task(queue(here, decode, data)) for data in (b"running", body)]
        await asyncio.sleep(0.05)
        assert queue.waiting == 2
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    await give_up()
    gc.collect()
    assert sys.getrefcount(body) == holders
    await asyncio.sleep(0)
    assert queue.waiting == 1, "the thread is still at it"
    release.set()
    while queue.waiting:  # noqa: ASYNC110  # an event would come from the code under test
        await asyncio.sleep(0.01)
    assert done == [b"running"]


@in_a_loop
async def test_an_undecodable_image_keeps_no_place() -> None:
    def broken(data: bytes) -> Pixels:
        raise ValueError

    queue = DecodeQueue(max_wait=1)
    with pytest.raises(ValueError):
        await queue(here, broken, b"")
    assert queue.waiting == 0


@in_a_loop
async def test_one_very_slow_image_does_not_shut_out_others_for_long() -> None:
    release, done = threading.Event(), list[bytes]()
    decode = held(release, done)
    queue = DecodeQueue(max_wait=0.5, clock=Slow())
    release.set()
    for number in range(20):
        await queue(here, decode, b"%d" % number)
    release.clear()
    waiting = await begin(queue, decode, 5)
    release.set()
    await asyncio.gather(*waiting)
