"""The sending side of a client's connection."""

from __future__ import annotations

import asyncio
from typing import Any

Buffer = bytes | memoryview


class CoalescingTransport:
    """A transport that writes the head of a reply together with its body, which saves a system call and a packet."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: Buffer = b""
        self.written = 0
        """Bytes of all replies so far."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: Buffer) -> None:
        """Hold ``data`` back until more comes, or until the event loop's next turn."""
        self.written += len(data)
        if self._held:
            data, self._held = b"".join((self._held, data)), b""
            self._write(data)
        else:
            self._held = data
            self._loop.call_soon(self.flush)

    def write_through(self, data: Buffer) -> None:
        """Write a complete reply at once."""
        self.flush()
        self.written += len(data)
        self._write(data)

    def flush(self) -> None:
        if self._held:
            data, self._held = self._held, b""
            self._write(data)

    def _write(self, data: Buffer) -> None:
        if not self._transport.is_closing():  # the client may have gone; uvicorn tells only its last request
            self._transport.write(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()
