"""The outermost layer, where it can be tested without a server. Over HTTP: test_service.py."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson
import pytest
from starlette.types import ASGIApp, Message, Send

from serving.bodies import Bodies
from serving.gateway import Gateway
from serving.static import Page


async def ask(app: ASGIApp, sent: list[Message], path: str = "/classify") -> None:
    """One request through the gateway to ``app``; its reply is added to ``sent``."""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    gateway = Gateway(app, ["/classify", "/readyz"], Page(), log_requests=True, bodies=Bodies(2**20))
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    await gateway(scope, receive, send)


def replying(status: int) -> ASGIApp:
    """An application that replies in pieces, and not in our format."""

    async def reply(scope: Any, receive: Any, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"bad ", "more_body": True})
        await send({"type": "http.response.body", "body": b"luck"})

    return reply


def assert_error(sent: list[Message], status: int, code: str) -> None:
    start, body = sent
    assert start["status"] == status
    assert orjson.loads(body["body"])["error"]["code"] == code


def test_a_request_cancelled_at_shutdown_gets_a_proper_error() -> None:
    """uvicorn cancels requests that outlast the grace period, and would answer them with a plain-text 500."""
    sent: list[Message] = []

    async def endless(*_: Any) -> None:
        await asyncio.sleep(3600)

    async def stop() -> None:
        request = asyncio.create_task(ask(endless, sent))
        await asyncio.sleep(0)
        request.cancel()
        await request

    asyncio.run(stop())
    assert_error(sent, 503, "not_ready")


@pytest.mark.parametrize(("status", "code"), [(400, "bad_request"), (503, "not_ready")])
def test_an_error_of_another_layer_is_replaced_however_many_pieces_it_has(status: int, code: str) -> None:
    sent: list[Message] = []
    asyncio.run(ask(replying(status), sent))
    assert_error(sent, status, code)


def test_a_bug_is_a_500_that_reveals_nothing_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Message] = []

    async def broken(*_: Any) -> None:
        raise RuntimeError("a secret")

    asyncio.run(ask(broken, sent))
    assert_error(sent, 500, "internal")
    assert b"secret" not in sent[1]["body"]
    assert "a secret" in caplog.text


def test_probes_are_not_logged_and_a_long_path_not_in_full(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for path in ("/readyz", "/" + 1000 * "x"):
            asyncio.run(ask(replying(200), [], path))
    (line,) = caplog.records
    assert line.__dict__["path"] == "/" + 199 * "x"
