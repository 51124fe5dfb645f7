"""Requests without a server."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import Message, Receive


def request(
    content_type: str | bytes | None, body: bytes | Sequence[bytes] | Receive, query: bytes = b"", **headers: str
) -> Request:
    """A POST as the server would pass it on. The body is sent whole, in chunks, or as a function sends it.

    Headers are spelled with underscores instead of hyphens.
    """
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    if content_type is not None:
        kind = content_type if isinstance(content_type, bytes) else content_type.encode("latin-1")
        pairs.append((b"content-type", kind))
    scope = {"type": "http", "method": "POST", "path": "/classify", "headers": pairs, "query_string": query}
    return Request(scope, body if callable(body) else sending([body] if isinstance(body, bytes) else body))


def sending(chunks: Sequence[bytes], end: Message | None = None) -> Receive:
    """What the application receives of a body: its chunks, and then ``end``, by default that of a complete body."""
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    waiting = iter([*messages, end or {"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        return next(waiting)

    return receive
