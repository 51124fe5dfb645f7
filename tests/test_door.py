"""What is refused by its headers alone, what the reply says, and how it is counted. Over HTTP: test_connections.py."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson
import pytest
from starlette.responses import Response

from model.batching import QueueFullError
from serving import draining, metrics
from serving.door import GATHER_SECONDS, Door

REQUEST_ID = (b"x-request-id", b"mine")


def full(count: int, ahead: int) -> None:
    raise QueueFullError(waiting=50, limit=50, retry_after=3)


def free(count: int, ahead: int) -> None:
    pass


def test_a_refusal_is_the_reply_that_the_application_would_have_given() -> None:
    async def knock() -> None:
        response = Door(["/classify"], full, log_requests=False)(b"/classify?prediction_set=0.9", [REQUEST_ID])
        assert response
        assert response.status_code == 429
        headers = dict(response.raw_headers)
        assert headers[b"retry-after"] == b"3"
        assert headers[b"x-error-code"] == b"overloaded"
        assert headers[b"x-request-id"] == b"mine"
        assert int(headers[b"content-length"]) == len(response.body)
        error = orjson.loads(response.body)["error"]
        assert (error["code"], error["request_id"]) == ("overloaded", "mine")
        assert "50 images are waiting" in error["message"]

    asyncio.run(knock())


def test_each_refusal_without_an_id_has_one_of_its_own() -> None:
    async def knock() -> set[Any]:
        door = Door(["/classify"], full, log_requests=False)
        responses = [door(b"/classify", [(b"x-request-id", b"no good\n")]) for _ in range(3)]
        return {orjson.loads(response.body)["error"]["request_id"] for response in responses if response}

    assert len(asyncio.run(knock()) - {"no good\n", ""}) == 3


@pytest.mark.parametrize(
    ("admit", "target"), [(free, b"/classify"), (full, b"/model"), (full, b"/classify/"), (full, b"")]
)
def test_what_has_a_place_or_needs_none_is_heard(admit: Any, target: bytes) -> None:
    async def knock() -> Response | None:
        return Door(["/classify"], admit, log_requests=False)(target, [])

    assert asyncio.run(knock()) is None


def test_of_those_that_come_at_once_as_many_are_let_in_as_have_a_place() -> None:
    places = 3

    def admit(count: int, ahead: int) -> None:
        if ahead + count > places:
            raise QueueFullError(ahead, places, retry_after=1)

    async def knock() -> list[list[bool]]:
        door = Door(["/classify"], admit, log_requests=False)
        turns = []
        for _ in range(2):
            turns.append([door(b"/classify", []) is None for _ in range(5)])
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(knock()) == [[True, True, True, False, False]] * 2


def test_a_place_that_has_become_free_is_given_in_the_next_turn() -> None:
    waiting, asked = 1, 0

    def admit(count: int, ahead: int) -> None:
        nonlocal asked
        asked += 1
        if waiting:
            raise QueueFullError(waiting, 1, retry_after=1)

    async def knock() -> list[bool]:
        nonlocal waiting
        door = Door(["/classify"], admit, log_requests=False)
        heard = [door(b"/classify", []) is None for _ in range(3)]
        waiting = 0
        await asyncio.sleep(0)
        return [*heard, door(b"/classify", []) is None]

    assert asyncio.run(knock()) == [False, False, False, True]
    assert asked == 2, "once in each turn, in which nothing changes"


def test_while_draining_the_application_answers_and_says_goodbye() -> None:
    draining.begun.set()
    try:
        assert Door(["/classify"], full, log_requests=False)(b"/classify", []) is None
    finally:
        draining.begun.clear()


def test_it_is_shut_for_a_while_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.door.SHUT_SECONDS", 0.05)

    async def knock() -> list[bool]:
        door = Door(["/classify"], full, log_requests=False)
        states = [door.is_shut]
        door(b"/classify", [])
        states.append(door.is_shut)
        await asyncio.sleep(0.06)
        return [*states, door.is_shut]

    assert asyncio.run(knock()) == [False, True, False]


def test_refusals_are_counted_and_logged_in_sums(caplog: pytest.LogCaptureFixture) -> None:
    counted: list[tuple[str, int, int]] = []
    before = metrics.REJECTED.labels("overloaded")._value.get()

    async def knock() -> None:
        paths = ["/classify", "/classify/batch"]
        door = Door(paths, full, True, lambda path, status, seconds: counted.append((path, status, len(seconds))))
        for target in (b"/classify", b"/classify/batch", b"/classify"):
            door(target, [])
        await asyncio.sleep(3 * GATHER_SECONDS)
        door(b"/classify", [])
        await asyncio.sleep(3 * GATHER_SECONDS)

    with caplog.at_level(logging.INFO):
        asyncio.run(knock())
    assert metrics.REJECTED.labels("overloaded")._value.get() - before == 4
    assert counted == [("/classify", 429, 2), ("/classify/batch", 429, 1), ("/classify", 429, 1)]
    assert [(record.path, record.requests) for record in caplog.records if record.message == "requests"] == [  # type: ignore[attr-defined]  # by extra
        ("/classify", 2),
        ("/classify/batch", 1),
        ("/classify", 1),
    ]
