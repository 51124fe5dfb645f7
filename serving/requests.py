"""From requests to image bytes, in three formats: bounded while reading; no temporary files, no URLs fetched.

multipart/form-data   field ``image``, or ``images`` once for each image of a batch
image/*               the body is the image
application/json      {"image": "<base64 or data URL>"} or {"images": [...]}
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from typing import Any

import orjson
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from serving.context import header
from serving.errors import ApiError, bad_request, from_exception, too_large, unsupported_media_type
from serving.pacing import without_blocking
from settings import Settings

JSON, MULTIPART = "application/json", "multipart/form-data"
IDENTITY = "identity"
"""The content coding that means none."""
Item = bytes | ApiError
"""One image of a batch, or what is wrong with it."""
OTHER_VALUES = 100_000
"""Values that a JSON body may hold besides its images. None is used, yet each takes some 64 bytes when parsed."""
WHITESPACE = b" \t\n\v\f\r"
ESCAPES = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "\n", "%0D": "\r"}
"""What URL encoding makes of base64 and its line breaks. Fixed, because pieces of a text that is all escapes take 30
times its size."""


async def read_image(request: Request, settings: Settings) -> bytes:
    """The one image of a ``/classify`` request; raises ``ApiError``."""
    media_type, options = _content_type(request)
    if media_type.startswith("image/"):
        return await _read_body(request, min(settings.max_image_bytes, settings.max_body_bytes))
    body = await _read_body(request, settings.max_body_bytes)
    if media_type == MULTIPART:
        images = _multipart(body, options, "image", limit=1)
        if not images:
            raise bad_request("the form has no file field 'image'")
        return bounded(images[0], settings.max_image_bytes)
    return _bounded_base64(_json_field(body, "image", limit=1), settings.max_image_bytes)


async def read_images(request: Request, settings: Settings) -> list[Item]:
    """The images of a ``/classify/batch`` request, in order; one invalid image does not spoil the others."""
    media_type, options = _content_type(request)
    if media_type.startswith("image/"):
        raise _unsupported(media_type, JSON, MULTIPART)
    body = await _read_body(request, settings.max_body_bytes)
    limit, most_bytes = settings.max_request_images, settings.max_image_bytes
    if media_type == MULTIPART:
        images = [_attempt(bounded, file, most_bytes) for file in _multipart(body, options, "images", limit)]
    else:
        values = _json_field(body, "images", limit)
        if not isinstance(values, list):
            raise bad_request(f"'images' is {_kind(values)}; expected a list of base64 strings or data URLs")
        _check_count(len(values), limit)
        # Text with characters beyond ASCII is four times the size of the body: each goes as soon as it is decoded.
        del body
        values.reverse()
        each = without_blocking(values.pop() for _ in range(len(values)))
        images = [_attempt(_bounded_base64, value, most_bytes) async for value in each]
    if not images:
        raise bad_request("the request has no images; expected at least one in 'images'")
    return images


def _content_type(request: Request) -> tuple[str, dict[str, str]]:
    encoding = header(request.scope["headers"], b"content-encoding") or IDENTITY
    if encoding.lower() != IDENTITY:
        raise unsupported_media_type(f"content-encoding {encoding[:40]!r}; expected a body without one")
    media_type, options = parse_options_header(header(request.scope["headers"], b"content-type") or "")
    if media_type not in (JSON, MULTIPART) and not media_type.startswith("image/"):
        raise _unsupported(media_type, JSON, MULTIPART, "image/*")
    return media_type, options


def _unsupported(media_type: str, *expected: str) -> ApiError:
    return unsupported_media_type(f"content-type {media_type[:80]!r}; expected one of {', '.join(expected)}")


async def _read_body(request: Request, limit: int) -> bytes:
    """The body; raises ``ApiError`` as soon as it is known to exceed ``limit`` bytes."""
    announced = (header(request.scope["headers"], b"content-length") or "")[:19]
    if announced.isascii() and announced.isdigit() and int(announced) > limit:
        raise too_large(f"the body has {announced} bytes; expected at most {limit}")
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size > limit:
            raise too_large(f"the body has more than {limit} bytes")
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _multipart(body: bytes, options: dict[str, str], field: str, limit: int) -> list[bytes]:
    """The contents of every part called ``field``, in order."""
    boundary = options.get("boundary")
    if not boundary:
        raise bad_request("the content-type has no boundary")
    parts: list[bytes] = []
    chunks: list[bytes] | None = None
    """Content of the part being parsed, if it is one of those wanted."""
    try:
        # File names are not used and may be in any encoding: Latin-1 accepts every byte.
        with PushMultipartParser(
            boundary, max_segment_count=limit + 16, max_header_size=8192, header_charset="latin-1"
        ) as parser:
            for event in parser.parse(body):
                if isinstance(event, MultipartSegment):
                    chunks = [] if event.name == field else None
                    if chunks is not None:
                        _check_count(len(parts) + 1, limit)
                elif chunks is not None:
                    if event is None:  # the end of the part
                        parts.append(b"".join(chunks))
                    else:
                        chunks.append(bytes(event))
    except ParserLimitReached as error:
        raise too_large(f"the form is too large: {error}") from error
    except (MultipartError, ValueError) as error:
        # The message comes first; what follows may be the sender's bytes.
        raise bad_request(f"the form is malformed: {str(error.args[0])[:100]}") from error
    return parts


def _check_count(count: int, limit: int) -> None:
    if count > limit:
        raise too_large(f"the request has more than {limit} images; expected at most {limit}")


def _json_field(body: bytes, field: str, limit: int) -> object:
    """``field`` of a body for ``limit`` images. Millions of small values would take 30 times its size as objects."""
    most = OTHER_VALUES + 2 * limit
    if _has_more(body, b"[{,", most):
        raise too_large(f"the JSON body has more than {most} brackets and commas; expected {limit} images at most")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error}") from error
    if not isinstance(document, dict) or field not in document:
        raise bad_request(f"the JSON body has no field {field!r}")
    return document[field]


def _has_more(body: bytes, marks: bytes, most: int) -> bool:
    """Whether ``body`` has more than ``most`` of the bytes ``marks``; faster than counting where they are few."""
    found = 0
    for mark in marks:
        place = body.find(mark)
        while place >= 0:
            found += 1
            if found > most:
                return True
            place = body.find(mark, place + 1)
    return False


def _base64(value: object) -> bytes:
    """Base64 (RFC 4648), line breaks allowed, or a data URL (RFC 2397). Any other URL is refused, never fetched."""
    if not isinstance(value, str):
        raise bad_request(f"an image is {_kind(value)}; expected base64 or a data URL")
    if value[:5].lower() == "data:":
        head, comma, value = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise bad_request("the data URL is not of the form data:<type>;base64,<data>")
        if "%" in value:
            value = _unescaped(value)
    try:
        return binascii.a2b_base64(value.encode("ascii").translate(None, WHITESPACE), strict_mode=True)
    except ValueError as error:
        raise bad_request(f"the image is not base64: {error}") from error


def _unescaped(base64: str) -> str:
    for escape, character in ESCAPES.items():
        base64 = base64.replace(escape, character).replace(escape.lower(), character)
    return base64


def _bounded_base64(value: object, limit: int) -> bytes:
    return bounded(_base64(value), limit)


def _kind(value: object) -> str:
    return {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }.get(type(value), "an object")


def bounded(image: bytes, limit: int) -> bytes:
    """``image``; raises ``ApiError`` if it has more than ``limit`` bytes."""
    if len(image) > limit:
        raise too_large(f"the image has {len(image)} bytes; expected at most {limit}")
    return image


def _attempt(read: Callable[..., bytes], *arguments: Any) -> Item:
    """What ``read`` returns, or the ``ApiError`` that it raises."""
    try:
        return read(*arguments)
    except ApiError as error:
        return from_exception(error)
