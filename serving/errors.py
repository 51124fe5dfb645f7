"""The one form of every error: ``{"error": {"code", "message", "request_id"}}``, whatever layer it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

import orjson
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from model.batching import GoneError, QueueFullError
from model.headers import ImageError, TooManyPixelsError, UnsupportedFormatError
from serving.context import REQUEST_ID_HEADER, choose_request_id, header, request_id

ERROR_HEADER = "x-error-code"
"""Set on every error reply of ours; an error reply without it comes from another layer and is rewritten."""

INTERNAL = "the server failed; see its log"
OVERLOADED = "overloaded"
REFUSAL_SECONDS = 0.1
"""Delay before a client is told that it is refused for overload. A few clients that retry at once could otherwise do so
thousands of times a second, enough to keep a server overloaded (a metastable failure: Bronson et al., HotOS 2021)."""


# What ``ApiError.body`` makes, for ``/docs.json``, where a docstring would appear.
class Problem(BaseModel):
    code: str
    message: str
    request_id: str


class Failure(BaseModel):
    error: Problem


class ApiError(Exception):
    """An error for the caller: a stable ``code``, a message that names the value, and an HTTP status."""

    def __init__(self, status: HTTPStatus, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

    def body(self) -> dict[str, object]:
        return {"error": {"code": self.code, "message": self.message, "request_id": request_id.get()}}

    def response(self) -> Response:
        headers = {**self.headers, ERROR_HEADER: self.code}
        return Response(orjson.dumps(self.body()), self.status, headers, "application/json")


def bad_request(message: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, "invalid_request", message)


def forbidden(message: str) -> ApiError:
    return ApiError(HTTPStatus.FORBIDDEN, "forbidden", message)


def too_large(message: str) -> ApiError:
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", message)


def unsupported_media_type(message: str) -> ApiError:
    return ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)


def no_evidence(model: str) -> ApiError:
    message = f"the network of {model} does not tell which places of an image its verdict comes from"
    return ApiError(HTTPStatus.NOT_FOUND, "no_evidence", message)


def not_ready(message: str) -> ApiError:
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "not_ready", message)


def deadline_exceeded(seconds: float) -> ApiError:
    message = f"the request was not answered within {seconds:g} s; try a later deadline, or fewer images at once"
    return ApiError(HTTPStatus.GATEWAY_TIMEOUT, "deadline_exceeded", message)


def too_many(code: str, message: str, retry_after: int) -> ApiError:
    """``message`` also says when to try again: in ``retry_after`` seconds."""
    return ApiError(HTTPStatus.TOO_MANY_REQUESTS, code, message, {"retry-after": str(retry_after)})


def from_exception(error: Exception) -> ApiError:
    """``error`` as the caller sees it; anything unexpected is a 500 that reveals nothing."""
    match error:
        case ApiError():
            # Its frames hold the request and, where it was raised from a variable, the error itself: a reference cycle
            # that keeps both in memory until the garbage collector finds it. Its cause may hold a whole text.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            return error
        case TooManyPixelsError():
            return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_many_pixels", str(error))
        case UnsupportedFormatError():
            return unsupported_media_type(str(error))
        case ImageError():
            return ApiError(HTTPStatus.BAD_REQUEST, "invalid_image", str(error))
        case QueueFullError():
            return too_many(OVERLOADED, str(error), error.retry_after)
        case ClientDisconnect() | GoneError():
            return ApiError(HTTPStatus.BAD_REQUEST, "disconnected", "the connection ended before the request did")
        case _:
            return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", INTERNAL)


def from_status(status: int) -> ApiError:
    """The error for another layer's reply, of which only the status is trusted."""
    match HTTPStatus(status):
        case HTTPStatus.SERVICE_UNAVAILABLE:
            return not_ready("the service is not ready")
        case HTTPStatus.INTERNAL_SERVER_ERROR as known:
            return ApiError(known, "internal", INTERNAL)
        case known:
            return ApiError(known, known.name.lower(), known.description or known.phrase)


def standalone(error: ApiError, headers: Iterable[tuple[bytes, bytes]]) -> Response:
    """The complete reply to a request with these headers that no layer of the application has seen."""
    chosen = choose_request_id(header(headers, REQUEST_ID_HEADER))
    token = request_id.set(chosen)  # for the body of the reply
    response = error.response()
    request_id.reset(token)
    response.raw_headers.append((REQUEST_ID_HEADER, chosen.encode()))
    return response
