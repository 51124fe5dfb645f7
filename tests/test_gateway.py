"""The outermost layer, where it can be tested without a server. Over HTTP: test_service.py."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from starlette.types import Message

from serving.bodies import Bodies
from serving.gateway import Gateway
from serving.static import Page


def test_a_request_cancelled_at_shutdown_gets_a_proper_error() -> None:
    """uvicorn cancels requests that outlast the grace period, and would answer them with a plain-text 500."""
    sent: list[Message] = []

    async def endless(*_: Any) -> None:
        await asyncio.sleep(3600)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def stop() -> None:
        gateway = Gateway(endless, ["/classify"], Page(), log_requests=False, bodies=Bodies(2**20))
        scope = {"type": "http", "method": "POST", "path": "/classify", "headers": [], "query_string": b""}
        request = asyncio.create_task(gateway(scope, receive, send))
        await asyncio.sleep(0)
        request.cancel()
        await request

    asyncio.run(stop())
    start, body = sent
    assert start["status"] == 503
    assert orjson.loads(body["body"])["error"]["code"] == "not_ready"
