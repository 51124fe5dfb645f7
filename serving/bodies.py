"""The request bodies that a worker holds, bounded in total: many large ones at once must not exhaust its memory."""

from __future__ import annotations

from starlette.types import Message, Receive

from serving.errors import OVERLOADED, too_many

SMALL = 2**16
"""Bytes of a request accepted no matter how many are held: stalled large uploads must not keep small images out."""


class Bodies:
    """Counts the bytes of bodies held; a request that sends more than ``limit`` leaves room for is answered 429."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def meter(self, receive: Receive) -> Meter:
        """A context manager around ``receive`` that counts the bytes it delivers as held until the block ends."""
        return Meter(self, receive)


class Meter:
    """``Bodies.meter`` for one request."""

    def __init__(self, bodies: Bodies, receive: Receive) -> None:
        self._bodies, self._receive, self._held = bodies, receive, 0

    def __enter__(self) -> Receive:
        return self

    async def __call__(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        bodies = self._bodies
        if bodies.held + size > bodies.limit and self._held + size > SMALL:
            reason = f"{bodies.held} bytes of requests are held; expected at most {bodies.limit}: try again in 1 s"
            self._release()  # at once: the reply comes later, and until then all others would be refused as well
            raise too_many(OVERLOADED, reason, retry_after=1)
        bodies.held += size
        self._held += size
        return message

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        self._bodies.held -= self._held
        self._held = 0
