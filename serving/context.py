"""What everything that runs on behalf of a request may know of it: its id, and whether its client still waits."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextvars import ContextVar

from starlette.types import Receive, Scope

REQUEST_ID_HEADER = b"x-request-id"

request_id: ContextVar[str] = ContextVar("request_id", default="")

_connection: ContextVar[object] = ContextVar("connection", default=None)

_ACCEPTABLE = re.compile(r"[A-Za-z0-9._-]{1,64}")


def choose_request_id(sent: str | None) -> str:
    """The caller's ``X-Request-ID`` where it is short and harmless in a log, else a fresh one."""
    if sent and _ACCEPTABLE.fullmatch(sent):
        return sent
    return f"{random.getrandbits(128):032x}"  # no secret: the system's own randomness would take a system call


def header(scope: Scope, name: bytes) -> str | None:
    """A header of a request, by its name in small letters. Starlette's mapping decodes and raises on the way there."""
    for found, value in scope["headers"]:
        if found == name:
            return str(value, "latin-1")
    return None


def watch(receive: Receive) -> None:
    """Remember the connection of the request at hand, of which ``receive`` is a method where uvicorn serves."""
    _connection.set(getattr(receive, "__self__", None))


def client_waits() -> Callable[[], bool]:
    """Tells at any later moment whether the client is still there; asking ``receive`` would take a task a request."""
    connection = _connection.get()
    return lambda: not getattr(connection, "disconnected", False)
