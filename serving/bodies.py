"""What a worker holds of request bodies, all requests together: many large ones at once are no way to its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from starlette.types import Message, Receive

from serving.errors import ApiError


class Bodies:
    """Counts the bytes of bodies that are held; who sends more than ``limit`` leaves room for is answered 429."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0

    @contextmanager
    def meter(self, receive: Receive) -> Iterator[Receive]:
        """``receive``, with what comes through it counted as held until the end of the block."""
        held = 0

        async def metered() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            if self._held + size > self._limit:
                raise ApiError(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    "overloaded",
                    f"{self._held} bytes of requests are held; expected at most {self._limit}: try again in 1 s",
                    {"retry-after": "1"},
                )
            self._held += size
            held += size
            return message

        try:
            yield metered
        finally:
            self._held -= held
