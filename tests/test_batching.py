"""The batcher in front of fake engines: held by hand, or of a known rate."""

from __future__ import annotations

import asyncio
import gc
import re
from contextvars import ContextVar
from itertools import chain, repeat
from typing import Any

import numpy as np
import pytest

from model.batching import REPORT_SECONDS, Batcher, Engine, GoneError, QueueFullError, Results
from model.preprocess import Pixels
from tests.loops import in_a_loop


def images(*values: int) -> Pixels:
    """One 1x1 image for each value."""
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)


def answer(batch: Pixels) -> Results:
    """Two outputs per image, from which the image can be identified."""
    value = batch[:, 0, 0, 0].astype(np.float32)
    return np.stack([value, -value], axis=1)


def values(outputs: Results) -> list[int]:
    assert outputs.shape[1] == 2
    assert (outputs[:, 0] == -outputs[:, 1]).all()
    return [int(value) for value in outputs[:, 0]]


class HeldEngine:
    """Holds each batch until the test releases it by its number in order of arrival."""

    def __init__(self) -> None:
        self.batches: list[Pixels] = []
        self._outcomes: list[asyncio.Future[None]] = []

    async def __call__(self, batch: Pixels) -> Results:
        self.batches.append(batch)
        outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outcomes.append(outcome)
        await outcome
        return answer(batch)

    @property
    def seen(self) -> list[list[int]]:
        return [batch[:, 0, 0, 0].tolist() for batch in self.batches]

    def release(self, number: int) -> None:
        self._outcomes[number].set_result(None)

    def fail(self, number: int, error: Exception) -> None:
        self._outcomes[number].set_exception(error)


def slow_at_first(seconds: float) -> Engine:
    """An engine that takes ``seconds`` for its first batch and almost no time for all others."""
    delays = chain([seconds], repeat(0.001))

    async def engine(batch: Pixels) -> Results:
        await asyncio.sleep(next(delays))
        return answer(batch)

    return engine


class OneAfterAnother:
    """An engine that processes one batch at a time, however many it is sent, at an exact rate by its own clock."""

    def __init__(self, images_per_second: float) -> None:
        self._images_per_second = images_per_second
        self._in_use = asyncio.Lock()
        self._worked = 0.0

    async def __call__(self, batch: Pixels) -> Results:
        async with self._in_use:
            seconds = len(batch) / self._images_per_second
            await asyncio.sleep(seconds)
            self._worked += seconds
        return answer(batch)

    def clock(self) -> float:
        return self._worked


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


@in_a_loop
async def test_a_free_engine_takes_a_lone_image_at_once() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=8, max_queue=64)
    caller = asyncio.create_task(batcher(images(7)))
    await settle()
    assert engine.seen == [[7]]
    assert batcher.waiting == 0
    engine.release(0)
    assert values(await caller) == [7]


@in_a_loop
async def test_batches_grow_while_the_engine_is_busy() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=8, max_queue=64)
    callers = [asyncio.create_task(batcher(images(i))) for i in range(6)]
    await settle()
    first = len(engine.batches[0])
    later = [asyncio.create_task(batcher(images(100 + i))) for i in range(5)]
    await settle()
    assert len(engine.batches) == 1
    assert batcher.waiting == 6 - first + 5
    engine.release(0)
    await settle()
    assert len(engine.batches) == 2
    assert len(engine.batches[1]) == min(8, 6 - first + 5)
    engine.release(1)
    await settle()
    if len(engine.batches) == 3:
        engine.release(2)
    assert [values(await caller) for caller in callers] == [[i] for i in range(6)]
    assert [values(await caller) for caller in later] == [[100 + i] for i in range(5)]


@in_a_loop
async def test_every_caller_gets_the_results_of_its_own_images_in_order() -> None:
    async def engine(batch: Pixels) -> Results:
        await asyncio.sleep(0)
        return answer(batch)

    batcher = Batcher(engine, max_batch=7, max_queue=10_000, concurrency=3)
    sizes = [1, 3, 7, 8, 2, 20, 1, 1, 5, 14, 6, 4]
    starts = np.cumsum([0, *sizes]).tolist()
    requests = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
    results = await asyncio.gather(*(batcher(images(*request)) for request in requests))
    assert [values(result) for result in results] == requests
    assert batcher.waiting == 0


@in_a_loop
async def test_max_batch_is_never_exceeded_and_every_batch_is_observed() -> None:
    sizes: list[int] = []
    observed: list[int] = []

    async def engine(batch: Pixels) -> Results:
        sizes.append(len(batch))
        await asyncio.sleep(0)
        return answer(batch)

    batcher = Batcher(engine, max_batch=5, max_queue=1000, observe=observed.append)
    await asyncio.gather(*(batcher(images(*range(n))) for n in (1, 2, 3, 4, 5, 6, 11, 23)))
    assert max(sizes) <= 5
    assert sum(sizes) == 1 + 2 + 3 + 4 + 5 + 6 + 11 + 23
    assert observed == sizes


@in_a_loop
async def test_a_request_larger_than_a_batch_is_split_and_reassembled() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=4, max_queue=64)
    caller = asyncio.create_task(batcher(images(*range(10))))
    for number, expected in enumerate([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]):
        await settle()
        assert engine.seen[number] == expected
        engine.release(number)
    assert values(await caller) == list(range(10))


@in_a_loop
async def test_two_engines_run_two_batches_at_once_and_no_more() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=1, max_queue=64, concurrency=2)
    callers = [asyncio.create_task(batcher(images(i))) for i in range(3)]
    await settle()
    assert engine.seen == [[0], [1]]
    engine.release(1)
    assert values(await callers[1]) == [1]
    await settle()
    assert engine.seen == [[0], [1], [2]]
    engine.release(0)
    engine.release(2)
    assert [values(await caller) for caller in callers] == [[0], [1], [2]]


@in_a_loop
async def test_one_large_request_keeps_every_free_engine_busy() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=2, max_queue=64, concurrency=3)
    caller = asyncio.create_task(batcher(images(*range(8))))
    await settle()
    assert engine.seen == [[0, 1], [2, 3], [4, 5]]
    for number in (2, 0, 1):
        engine.release(number)
    await settle()
    engine.release(3)
    assert values(await caller) == list(range(8))


@pytest.mark.parametrize("concurrency", [1, 2])
@in_a_loop
async def test_no_caller_is_forgotten_whenever_it_arrives(concurrency: int) -> None:
    """A caller may arrive at the very moment when a drain has found the queue empty and is about to end."""

    async def engine(batch: Pixels) -> Results:
        await asyncio.sleep(0)
        return answer(batch)

    async def late(batcher: Batcher, ticks: int) -> list[int]:
        for _ in range(ticks):
            await asyncio.sleep(0)
        return values(await batcher(images(2)))

    for ticks in range(25):
        for order in (False, True):
            batcher = Batcher(engine, max_batch=4, max_queue=8, concurrency=concurrency)
            callers = [batcher(images(1)), late(batcher, ticks)]
            if order:
                callers.reverse()
            try:
                async with asyncio.timeout(1):
                    await asyncio.gather(*callers)
            except TimeoutError:
                pytest.fail(f"a caller that came {ticks} ticks after another was never answered")


@in_a_loop
async def test_images_that_wait_are_reported_even_if_the_engine_never_answers() -> None:
    reports: list[int] = []
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=8, max_queue=64, report=reports.append)
    callers = [asyncio.create_task(batcher(images(1)))]
    await settle()
    assert reports[-1] == 0
    callers += [asyncio.create_task(batcher(images(2, 3))) for _ in range(3)]
    await asyncio.sleep(3 * REPORT_SECONDS)
    assert reports[-1] == 6
    callers.pop().cancel()
    await asyncio.sleep(3 * REPORT_SECONDS)
    assert reports[-1] == 4
    assert len(reports) < 12, "one for each image would cost more than it tells"
    engine.release(0)
    await settle()
    assert reports[-1] == 0
    engine.release(1)
    await asyncio.gather(*callers)
    await asyncio.sleep(2 * REPORT_SECONDS)
    before = len(reports)
    await asyncio.sleep(3 * REPORT_SECONDS)
    assert len(reports) == before, "an idle queue has nothing to report"
    callers = [asyncio.create_task(batcher(images(4)))]
    await settle()
    callers.append(asyncio.create_task(batcher(images(5))))
    await asyncio.sleep(3 * REPORT_SECONDS)
    assert reports[-1] == 1


@in_a_loop
async def test_a_full_queue_refuses_with_a_retry_after_and_keeps_what_waits() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=2, max_queue=4)
    running = asyncio.create_task(batcher(images(0, 1)))
    await settle()
    waiting = asyncio.create_task(batcher(images(2, 3, 4)))
    await settle()
    with pytest.raises(QueueFullError, match="3 images are waiting, and 2 come; expected at most 4") as refusal:
        await batcher(images(5, 6))
    assert type(refusal.value.retry_after) is int
    assert refusal.value.retry_after >= 1
    batcher.admit(1)
    with pytest.raises(QueueFullError, match="4 images are waiting; expected at most 4"):
        batcher.admit(1, ahead=1)
    fits = asyncio.create_task(batcher(images(7)))
    await settle()
    assert batcher.waiting == 4
    engine.release(0)
    await settle()
    engine.release(1)
    await settle()
    engine.release(2)
    assert values(await running) == [0, 1]
    assert values(await waiting) == [2, 3, 4]
    assert values(await fits) == [7]
    assert 6 not in [value for batch in engine.seen for value in batch]


@in_a_loop
async def test_retry_after_follows_the_rate_at_which_the_queue_drains() -> None:
    now = 0.0
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=4, max_queue=8, clock=lambda: now)
    callers = [asyncio.create_task(batcher(images(1, 2, 3, 4))) for _ in range(2)]
    await settle()
    now = 0.4  # ten images per second
    engine.release(0)
    await settle()
    callers += [asyncio.create_task(batcher(images(1, 2, 3, 4))) for _ in range(2)]
    await settle()
    for ahead, retry_after in ((0, 2), (20, 4)):  # beside 8 that wait and 4 at the engine
        with pytest.raises(QueueFullError) as refusal:
            batcher.admit(1, ahead)
        assert refusal.value.retry_after == retry_after
    for number in (1, 2, 3):
        engine.release(number)
        await settle()
    await asyncio.gather(*callers)


@in_a_loop
async def test_an_engine_error_says_nothing_about_the_rate() -> None:
    now = 0.0
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=1, max_queue=3, clock=lambda: now)
    callers = [asyncio.create_task(batcher(images(i))) for i in range(3)]
    await settle()
    now = 1.0  # one image per second
    engine.release(0)
    await settle()
    engine.fail(1, RuntimeError("the engine broke"))  # at once
    await settle()
    with pytest.raises(QueueFullError) as refusal:
        batcher.admit(1, ahead=3)
    assert refusal.value.retry_after == 4  # three, and one at the engine
    engine.release(2)
    await asyncio.gather(*callers, return_exceptions=True)


def test_only_a_call_that_can_never_fit_is_told_to_send_fewer_images() -> None:
    assert "fewer" not in str(QueueFullError(waiting=1, limit=0, retry_after=1))
    assert "fewer" not in str(QueueFullError(waiting=3, limit=4, retry_after=1, count=4))
    assert "fewer" in str(QueueFullError(waiting=0, limit=4, retry_after=1, count=5))


@in_a_loop
async def test_a_request_that_can_never_fit_is_refused_even_when_idle() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=2, max_queue=4)
    with pytest.raises(QueueFullError):
        await batcher(images(*range(5)))
    await settle()
    assert engine.seen == []
    assert batcher.waiting == 0


@in_a_loop
async def test_images_that_nobody_waits_for_are_not_computed() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=4, max_queue=64)
    first = asyncio.create_task(batcher(images(1)))
    await settle()
    waits = {2: True, 3: True}
    gone = asyncio.create_task(batcher(images(2), lambda: waits[2]))
    there = asyncio.create_task(batcher(images(3), lambda: waits[3]))
    await settle()
    waits[2] = False
    engine.release(0)
    await settle()
    engine.release(1)
    assert engine.seen == [[1], [3]]
    assert values(await first) == [1]
    assert values(await there) == [3]
    with pytest.raises(GoneError):
        await gone
    assert batcher.waiting == 0


@in_a_loop
async def test_a_lowered_limit_applies_at_once_and_drops_nothing_that_waits() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=4, max_queue=64)
    callers = [asyncio.create_task(batcher(images(1)))]
    await settle()
    callers += [asyncio.create_task(batcher(images(2, 3, 4))), asyncio.create_task(batcher(images(5)))]
    await settle()
    batcher.max_batch = 2
    for number in range(3):
        engine.release(number)
        await settle()
    assert engine.seen == [[1], [2, 3, 4], [5]]
    assert [values(outputs) for outputs in await asyncio.gather(*callers)] == [[1], [2, 3, 4], [5]]


@in_a_loop
async def test_a_cancelled_request_is_not_computed() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=4, max_queue=64)
    first = asyncio.create_task(batcher(images(1)))
    await settle()
    gone = asyncio.create_task(batcher(images(*range(50, 60))))
    stays = asyncio.create_task(batcher(images(2)))
    await settle()
    gone.cancel()
    await settle()
    assert batcher.waiting == 1  # its place in the queue is freed at once
    engine.release(0)
    await settle()
    assert engine.seen == [[1], [2]]
    assert batcher.waiting == 0
    engine.release(1)
    assert values(await first) == [1]
    assert values(await stays) == [2]
    with pytest.raises(asyncio.CancelledError):
        await gone


@in_a_loop
async def test_a_request_cancelled_just_as_the_engine_becomes_free_is_not_computed() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=4, max_queue=64)
    first = asyncio.create_task(batcher(images(1)))
    await settle()
    gone = asyncio.create_task(batcher(images(50)))
    await settle()
    gone.cancel()
    engine.release(0)
    await settle()
    assert engine.seen == [[1]]
    assert batcher.waiting == 0
    assert values(await first) == [1]


@in_a_loop
async def test_a_request_cancelled_in_a_running_batch_does_not_affect_the_others() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=4, max_queue=64)
    blocker = asyncio.create_task(batcher(images(0)))
    await settle()
    gone = asyncio.create_task(batcher(images(1)))
    stays = asyncio.create_task(batcher(images(2)))
    await settle()
    engine.release(0)
    await settle()
    assert engine.seen[1] == [1, 2]
    gone.cancel()
    await settle()
    engine.release(1)
    assert values(await blocker) == [0]
    assert values(await stays) == [2]


@in_a_loop
async def test_an_engine_error_reaches_only_the_callers_of_its_batch() -> None:
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=2, max_queue=64)
    before = asyncio.create_task(batcher(images(0)))
    await settle()
    unlucky = [asyncio.create_task(batcher(images(i))) for i in (1, 2)]
    after = asyncio.create_task(batcher(images(3)))
    await settle()
    engine.release(0)
    await settle()
    assert engine.seen == [[0], [1, 2]]
    engine.fail(1, RuntimeError("the engine broke"))
    await settle()
    engine.release(2)
    assert values(await before) == [0]
    assert values(await after) == [3]
    for caller in unlucky:
        with pytest.raises(RuntimeError, match="the engine broke"):
            await caller
    again = asyncio.create_task(batcher(images(4)))
    await settle()
    engine.release(3)
    assert values(await again) == [4]


@in_a_loop
async def test_an_engine_error_in_one_part_of_a_split_request_fails_it_once() -> None:
    """The other parts must neither hang nor warn of an exception that was never retrieved."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    engine = HeldEngine()
    batcher = Batcher(engine, max_batch=1, max_queue=64, concurrency=2)
    caller = asyncio.create_task(batcher(images(0, 1)))
    await settle()
    other = asyncio.create_task(batcher(images(2)))
    await settle()
    for number in range(3):
        await settle()
        if engine.seen[number] == [2]:
            engine.release(number)
        else:
            engine.fail(number, RuntimeError("the engine broke"))
    with pytest.raises(RuntimeError, match="the engine broke"):
        await caller
    assert values(await other) == [2]
    await settle()
    gc.collect()
    assert complaints == []


@in_a_loop
async def test_a_slow_first_batch_causes_no_refusals() -> None:
    """The first batch is slow and alone, so it says nothing about how fast a queue would drain."""
    batcher = Batcher(slow_at_first(0.3), max_batch=8, max_queue=100, max_wait=0.5)
    await batcher(images(0))
    await asyncio.gather(*(batcher(images(1)) for _ in range(50)))


@in_a_loop
async def test_a_request_that_would_wait_too_long_is_refused_despite_free_places() -> None:
    engine = OneAfterAnother(20)
    batcher = Batcher(engine, max_batch=1, max_queue=1000, max_wait=0.525, clock=engine.clock)
    await asyncio.gather(*(batcher(images(0)) for _ in range(3)))
    callers = [asyncio.create_task(batcher(images(1))) for _ in range(30)]
    answers = await asyncio.gather(*callers, return_exceptions=True)
    refused = [one for one in answers if isinstance(one, QueueFullError)]
    assert len(refused) == 20, "all but the ten whose turn comes in time"
    assert refused[0].retry_after == 1
    assert batcher.waiting == 0
    await batcher(np.concatenate([images(2)] * 12))  # an empty queue accepts any number


@in_a_loop
async def test_an_empty_queue_takes_an_image_however_slow_the_engine_is() -> None:
    engine = OneAfterAnother(20)
    batcher = Batcher(engine, max_batch=1, max_wait=0.04, clock=engine.clock)
    await asyncio.gather(*(batcher(images(0)) for _ in range(3)))
    with pytest.raises(QueueFullError):
        batcher.admit(1, ahead=1)
    assert values(await batcher(images(1))) == [1]


@in_a_loop
async def test_a_large_request_is_admitted_as_readily_as_a_single_image() -> None:
    """Its own images do not count as a wait: a queue that is hardly ever empty would otherwise never admit it."""
    engine = OneAfterAnother(200)
    batcher = Batcher(engine, max_batch=10, max_queue=1000, max_wait=0.5, clock=engine.clock)
    await asyncio.gather(*(batcher(images(0)) for _ in range(80)))
    busy = [asyncio.create_task(batcher(images(1))) for _ in range(40)]
    await settle()
    many = asyncio.create_task(batcher(np.concatenate([images(2)] * 300)))  # behind 40; up to 100 may wait
    await settle()
    with pytest.raises(QueueFullError, match=r"^3\d\d images are waiting; expected at most \d+: try again in 2 s$"):
        await batcher(images(3))
    assert len(await many) == 300
    await asyncio.gather(*busy)


@in_a_loop
async def test_images_sent_to_a_remote_engine_still_count_as_waiting() -> None:
    """It processes one batch at a time, however many it is sent: 400 images per second."""
    batcher = Batcher(OneAfterAnother(400), max_batch=20, max_queue=1000, max_wait=0.4, concurrency=4)
    await asyncio.gather(*(batcher(images(0)) for _ in range(600)))
    busy = [asyncio.create_task(batcher(images(1))) for _ in range(90)]
    await asyncio.sleep(0.01)  # 80 are in flight and ten wait
    late = await asyncio.gather(*(batcher(images(2)) for _ in range(200)), return_exceptions=True)
    await asyncio.gather(*busy)
    refused = [str(one) for one in late if isinstance(one, QueueFullError)]
    assert all(re.match(r"1\d\d images are waiting; expected at most 1\d\d: ", message) for message in refused)
    assert 70 < len(refused) < 200  # 130 by the engine's rate, once learned; 40 if images at the engine did not count


@in_a_loop
async def test_a_remote_engine_that_slows_down_is_noticed_with_an_empty_queue() -> None:
    """The maximum number of batches is in flight: the engine is busy, so its current rate is its capacity."""
    in_use, seconds = asyncio.Lock(), 0.0

    async def engine(batch: Pixels) -> Results:
        async with in_use:
            await asyncio.sleep(len(batch) * seconds)
        return answer(batch)

    async def ask_again_and_again() -> None:
        for _ in range(30):
            await batcher(np.concatenate([images(1)] * 4))

    batcher = Batcher(engine, max_batch=4, max_queue=1000, max_wait=0.4, concurrency=4)
    await asyncio.gather(*(batcher(images(0)) for _ in range(400)))
    seconds = 1 / 400
    await asyncio.gather(*(ask_again_and_again() for _ in range(4)))
    late = await asyncio.gather(*(batcher(images(2)) for _ in range(500)), return_exceptions=True)
    assert sum(not isinstance(one, QueueFullError) for one in late) < 300  # 160 by its rate


@pytest.mark.parametrize("concurrency", [1, 2, 4])
@in_a_loop
async def test_lone_batches_do_not_overstate_the_rate(concurrency: int) -> None:
    """Each has the whole engine, which concurrent batches would share: 500 images per second."""
    batcher = Batcher(OneAfterAnother(500), max_batch=10, max_queue=10_000, max_wait=0.2, concurrency=concurrency)
    await asyncio.gather(*(batcher(images(0)) for _ in range(600)), return_exceptions=True)
    for _ in range(40):
        await batcher(np.concatenate([images(1)] * 10))
    late = await asyncio.gather(*(batcher(images(2)) for _ in range(1000)), return_exceptions=True)
    # 100 by the true rate; two or four times as many if each concurrent batch were credited with the lone rate.
    assert sum(not isinstance(one, QueueFullError) for one in late) < 150


@in_a_loop
async def test_a_rate_measured_at_a_bad_moment_is_unlearned() -> None:
    """Rates are learned from full batches, but so few images may wait after it that no batch would ever fill again."""
    batcher = Batcher(slow_at_first(0.6), max_batch=32, max_queue=1000, max_wait=0.5)
    await asyncio.gather(*(batcher(images(0)) for _ in range(40)), return_exceptions=True)
    for _ in range(50):
        await batcher(images(1))
    answers = await asyncio.gather(*(batcher(images(2)) for _ in range(200)), return_exceptions=True)
    assert not [one for one in answers if isinstance(one, Exception)]


@in_a_loop
async def test_an_engine_that_returns_at_once_still_yields_to_the_event_loop() -> None:
    async def engine(batch: Pixels) -> Results:
        batches.append(len(batch))
        return answer(batch)

    batches: list[int] = []
    batcher = Batcher(engine, max_batch=1, max_queue=100)
    last = asyncio.create_task(batcher(np.concatenate([images(0)] * 50)))
    await settle()
    assert 0 < len(batches) < 50
    assert not last.done()
    await last
    assert len(batches) == 50


@in_a_loop
async def test_an_engine_runs_outside_the_callers_context() -> None:
    async def engine(batch: Pixels) -> Results:
        seen.append(name.get())
        return answer(batch)

    name: ContextVar[str] = ContextVar("name", default="nobody")
    seen: list[str] = []
    name.set("somebody")
    await Batcher(engine, max_batch=1, max_queue=10)(images(0))
    assert seen == ["nobody"]
