"""The limit on the request bodies that a worker holds, tested without a server."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message, Receive

from serving.bodies import SMALL, Bodies
from serving.errors import ApiError

LARGE = SMALL + 40
LIMIT = 2 * LARGE + 20


async def endless() -> Message:
    return {"type": "http.request", "body": b"x" * LARGE, "more_body": True}


async def small() -> Message:
    return {"type": "http.request", "body": b"x" * (SMALL // 2), "more_body": True}


def take(receive: Receive, times: int) -> None:
    async def work() -> None:
        for _ in range(times):
            await receive()

    asyncio.run(work())


def test_the_bodies_of_all_requests_together_are_bounded() -> None:
    bodies = Bodies(LIMIT)
    with bodies.meter(endless) as first, bodies.meter(endless) as second:
        take(first, 1)
        take(second, 1)
        with pytest.raises(ApiError) as refusal:
            take(second, 1)
    assert (refusal.value.status, refusal.value.code) == (429, "overloaded")
    assert int(refusal.value.headers["retry-after"]) >= 1


def test_body_memory_is_released_after_the_request() -> None:
    bodies = Bodies(LIMIT)
    for _ in range(5):
        with pytest.raises(ApiError), bodies.meter(endless) as receive:
            take(receive, 3)
    with bodies.meter(endless) as receive:
        take(receive, 2)


def test_a_refused_request_leaves_its_room_to_others_before_it_is_answered() -> None:
    bodies = Bodies(LIMIT)
    with bodies.meter(endless) as refused, bodies.meter(endless) as other:
        take(refused, 1)
        take(other, 1)
        with pytest.raises(ApiError):
            take(refused, 1)
        take(other, 1)
    assert bodies.held == 0


def test_a_message_without_a_body_costs_nothing() -> None:
    async def gone() -> Message:
        return {"type": "http.disconnect"}

    with Bodies(0).meter(gone) as receive:
        take(receive, 9)


def test_endless_large_bodies_do_not_keep_small_ones_out() -> None:
    bodies = Bodies(LIMIT)
    with bodies.meter(endless) as large, bodies.meter(small) as image:
        take(large, 2)
        take(image, 2)
        assert bodies.held > LIMIT
        with pytest.raises(ApiError):
            take(image, 1)
    assert bodies.held == 0
