"""Fuzz targets, as functions of bytes. They assert that any input gets a documented outcome."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.types import Message

from model.headers import ImageError
from model.preprocess import inspect, render
from model.sandbox import DecoderError, Sandbox
from serving.errors import ApiError
from serving.requests import read_image, read_images
from settings import Settings

SIZE = (32, 32)
MAX_PIXELS = 2**18
"""Small, so that the time goes into many images instead of large ones."""
SETTINGS = Settings(max_body_bytes=20_000, max_image_bytes=4_096, max_request_images=8)
ENDPOINTS = (read_image, read_images)


CONTAINED = Path("runs/fuzz/contained")
"""Where images that killed their decoder are kept."""

sandbox = cache(Sandbox)


def decoder(data: bytes) -> None:
    """Decode an image file as the service does: a plain one in this process, any other in the sandbox."""
    try:
        header = inspect(data, MAX_PIXELS)
        pixels = render(data, header, SIZE) if header.is_plain else sandbox().render(data, SIZE)
    except DecoderError:
        CONTAINED.mkdir(parents=True, exist_ok=True)
        (CONTAINED / hashlib.sha256(data).hexdigest()).write_bytes(data)
        return
    except ImageError as error:
        assert str(error)  # noqa: PT017  # not a test function
        assert " at 0x" not in str(error)  # noqa: PT017
        return
    assert pixels.shape == (*SIZE, 3)
    assert pixels.dtype == np.uint8


def parser(data: bytes) -> None:
    """Parse a content type, a line break and a request body. The parity of the body's length selects how it arrives."""
    content_type, _, body = data.partition(b"\n")
    for read in ENDPOINTS:
        try:
            found = _finish(read(_request(content_type, body), SETTINGS))
        except ApiError as error:
            assert error.status in (400, 413, 415)  # noqa: PT017
            assert error.message  # noqa: PT017
            continue
        items = found if isinstance(found, list) else [found]
        assert 1 <= len(items) <= SETTINGS.max_request_images
        assert all(isinstance(item, ApiError) or len(item) <= SETTINGS.max_image_bytes for item in items)


def _request(content_type: bytes, body: bytes) -> Request:
    half = len(body) // 2 if len(body) % 2 else len(body)
    messages: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]
    messages += [{"type": "http.request", "body": part, "more_body": True} for part in (body[half:], body[:half])]

    async def receive() -> Message:
        return messages.pop()

    return Request({"type": "http", "method": "POST", "headers": [(b"content-type", content_type)]}, receive)


def _finish(work: Awaitable[Any]) -> Any:
    """The result of an awaitable that never waits: an event loop per input would dominate the run time."""
    steps = work.__await__()
    while True:
        try:
            awaited = next(steps)
        except StopIteration as done:
            return done.value
        # None lets other tasks have their turn, as long work does, and any work does on a busy machine.
        assert awaited is None, "reading waits for what has been sent"


TARGETS: dict[str, Callable[[bytes], None]] = {"decoder": decoder, "parser": parser}
