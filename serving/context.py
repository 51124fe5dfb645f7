"""What any code that serves a request can know about it: its id, and whether its client is still waiting."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from contextvars import ContextVar

from starlette.types import Receive

REQUEST_ID_HEADER = b"x-request-id"

request_id: ContextVar[str] = ContextVar("request_id", default="")

_connection: ContextVar[object] = ContextVar("connection", default=None)

_ACCEPTABLE = re.compile(r"[A-Za-z0-9._-]{1,64}")


def choose_request_id(sent: str | None) -> str:
    """The caller's ``X-Request-ID`` if it is short and harmless in a log, else a new one."""
    if sent and _ACCEPTABLE.fullmatch(sent):
        return sent
    return f"{random.getrandbits(128):032x}"  # not a secret: the system's randomness would take a system call


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    """A header by its lower-case name. Starlette's mapping encodes the name each time and raises on a miss."""
    for found, value in headers:
        if found == name:
            return str(value, "latin-1")
    return None


def watch(receive: Receive) -> None:
    """Remember the current request's connection; under uvicorn, ``receive`` is one of its methods."""
    _connection.set(getattr(receive, "__self__", None))


def client_waits() -> Callable[[], bool]:
    """A function that tells later whether the client still waits; asking ``receive`` would cost each request a task."""
    connection = _connection.get()
    return lambda: not getattr(connection, "disconnected", False)
