"""Refusals from the headers alone: when, with what reply, and how they are counted. Over HTTP: test_connections.py."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import orjson
import pytest

from model.batching import QueueFullError
from serving import draining, metrics
from serving.shedding import REPORT_SECONDS, LoadShedder
from tests.loops import in_a_loop

REQUEST_ID = (b"x-request-id", b"mine")


def full(count: int, ahead: int) -> None:
    raise QueueFullError(waiting=50, limit=50, retry_after=3)


def free(count: int, ahead: int) -> None:
    pass


@in_a_loop
async def test_a_refusal_equals_the_reply_of_the_application() -> None:
    response = LoadShedder(["/classify"], full, log_requests=False)(b"/classify?prediction_set=0.9", [REQUEST_ID])
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


@in_a_loop
async def test_each_refusal_without_a_valid_id_gets_its_own() -> None:
    shedder = LoadShedder(["/classify"], full, log_requests=False)
    responses = [shedder(b"/classify", [(b"x-request-id", b"no good\n")]) for _ in range(3)]
    found = {orjson.loads(response.body)["error"]["request_id"] for response in responses if response}
    assert len(found - {"no good\n", ""}) == 3


@pytest.mark.parametrize(
    ("admit", "target"), [(free, b"/classify"), (full, b"/model"), (full, b"/classify/"), (full, b"")]
)
@in_a_loop
async def test_requests_with_a_free_place_or_to_other_paths_are_admitted(admit: Any, target: bytes) -> None:
    assert LoadShedder(["/classify"], admit, log_requests=False)(target, []) is None


@in_a_loop
async def test_of_simultaneous_requests_only_as_many_are_admitted_as_fit() -> None:
    places = 3

    def admit(count: int, ahead: int) -> None:
        if ahead + count > places:
            raise QueueFullError(ahead, places, retry_after=1)

    shedder = LoadShedder(["/classify"], admit, log_requests=False)
    for _ in range(2):
        assert [shedder(b"/classify", []) is None for _ in range(5)] == [True, True, True, False, False]
        await asyncio.sleep(0)


@in_a_loop
async def test_a_place_that_becomes_free_is_given_in_the_next_turn() -> None:
    waiting, asked = 1, 0

    def admit(count: int, ahead: int) -> None:
        nonlocal asked
        asked += 1
        if waiting:
            raise QueueFullError(waiting, 1, retry_after=1)

    shedder = LoadShedder(["/classify"], admit, log_requests=False)
    assert [shedder(b"/classify", []) is None for _ in range(3)] == [False, False, False]
    waiting = 0
    await asyncio.sleep(0)
    assert shedder(b"/classify", []) is None
    assert asked == 2, "once in each turn, in which nothing changes"


def test_while_draining_the_application_answers() -> None:
    draining.started.set()
    try:
        assert LoadShedder(["/classify"], full, log_requests=False)(b"/classify", []) is None
    finally:
        draining.started.clear()


@in_a_loop
async def test_it_reports_shedding_for_a_while_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.shedding.SHEDDING_SECONDS", 0.05)
    shedder = LoadShedder(["/classify"], full, log_requests=False)
    assert not shedder.is_shedding
    shedder(b"/classify", [])
    assert shedder.is_shedding
    await asyncio.sleep(0.06)
    assert not shedder.is_shedding


@in_a_loop
async def test_refusals_are_counted_and_logged_in_aggregate(caplog: pytest.LogCaptureFixture) -> None:
    counted: list[tuple[str, int, int]] = []
    taken = 0.0

    def count(path: str, status: int, seconds: list[float]) -> None:
        nonlocal taken
        counted.append((path, status, len(seconds)))
        taken += sum(seconds)

    before, started = metrics.REJECTED.labels("overloaded")._value.get(), time.perf_counter()
    shedder = LoadShedder(["/classify", "/classify/batch"], full, log_requests=True, count=count)
    quiet = LoadShedder(["/classify"], full, log_requests=False)
    with caplog.at_level(logging.INFO):
        for target in (b"/classify", b"/classify/batch", b"/classify"):
            shedder(target, [])
        quiet(b"/classify", [])
        await asyncio.sleep(3 * REPORT_SECONDS)
        shedder(b"/classify", [])
        quiet(b"/classify", [])
        await asyncio.sleep(3 * REPORT_SECONDS)
    assert metrics.REJECTED.labels("overloaded")._value.get() - before == 6
    assert counted == [("/classify", 429, 2), ("/classify/batch", 429, 1), ("/classify", 429, 1)]
    assert 0 < taken < time.perf_counter() - started
    assert [(record.path, record.requests) for record in caplog.records if record.message == "requests"] == [  # type: ignore[attr-defined]  # by extra
        ("/classify", 2),
        ("/classify/batch", 1),
        ("/classify", 1),
    ]
