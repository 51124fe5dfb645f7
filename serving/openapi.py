"""``/docs.json`` as it really is: BentoML describes one form and its own errors; this adds ours."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from serving.access import GUARDED

Document = dict[str, Any]

ERRORS = {
    HTTPStatus.BAD_REQUEST: "invalid_request, or invalid_image: missing, malformed or undecodable",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large or too_many_pixels",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type: not a type of request or image that is accepted",
    HTTPStatus.TOO_MANY_REQUESTS: "overloaded: the queue is full; Retry-After says for how long",
    HTTPStatus.INTERNAL_SERVER_ERROR: "internal: the server's fault",
    HTTPStatus.SERVICE_UNAVAILABLE: "not_ready",
    HTTPStatus.GATEWAY_TIMEOUT: "deadline_exceeded",
}
"""Status to the codes that go with it."""
KEY_ERRORS = {
    HTTPStatus.UNAUTHORIZED: "unauthorized: no API key, or an unknown one",
    HTTPStatus.FORBIDDEN: "forbidden: the API key has expired, or is not for this path",
    HTTPStatus.TOO_MANY_REQUESTS: "overloaded, as without keys; rate_limited or quota_exceeded: too many images were "
    "sent with this API key; Retry-After says for how long",
}
"""What comes to them where API keys are asked for."""
KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
REQUEST_ID = {"X-Request-ID": {"description": "As sent, or made.", "schema": {"type": "string"}}}
SERVER_TIMING = {"Server-Timing": {"description": "Stages in milliseconds (W3C).", "schema": {"type": "string"}}}
RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
AUTHENTICATE = {"WWW-Authenticate": {"description": "Bearer.", "schema": {"type": "string"}}}
HEADERS = {HTTPStatus.UNAUTHORIZED: AUTHENTICATE, HTTPStatus.TOO_MANY_REQUESTS: RETRY_AFTER}
BINARY = {"schema": {"type": "string", "format": "binary"}}
SHARE = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
OPTIONS = [
    {"name": name, "in": "query", "description": description, "schema": schema}
    for name, description, schema in (
        ("prediction_set", "Level of a set of classes to be sent along, such as 0.99.", SHARE),
        ("abstain_below", "No verdict under this confidence.", SHARE),
        ("abstain_foreign", "No verdict on images that do not resemble the training images.", {"type": "boolean"}),
    )
]
ENCODED = {"type": "string", "description": "Base64 (RFC 4648) or a data URL (RFC 2397)."}


def _json(schema: Document) -> Document:
    return {"application/json": {"schema": schema}}


def _object(name: str, schema: Document) -> Document:
    return {"type": "object", "required": [name], "properties": {name: schema}}


def _failures(errors: dict[HTTPStatus, str]) -> Document:
    """Replies by status, from the codes that go with it."""
    failure = _json({"$ref": "#/components/schemas/Failure"})
    return {
        str(status.value): {
            "description": codes,
            "headers": {**REQUEST_ID, **HEADERS.get(status, {})},
            "content": failure,
        }
        for status, codes in errors.items()
    }


def _ask_for_keys(spec: Document) -> None:
    spec["components"]["securitySchemes"] = KEY_SCHEMES
    for path in set(GUARDED) & set(spec["paths"]):
        for method, operation in spec["paths"][path].items():
            operation["security"] = [{name: []} for name in KEY_SCHEMES]
            operation["responses"].update(_failures(KEY_ERRORS))
            if method == "get":  # no images, no limits
                del operation["responses"]["429"]


def describe(spec: Document, asks_for_keys: bool) -> Document:
    """BentoML's OpenAPI document, changed in place to name every form, error and header of our endpoints."""
    errors = _failures(ERRORS)
    several = {"type": "array", "minItems": 1, "items": ENCODED}
    for path, field, body in (
        ("/classify", "image", ENCODED),
        ("/classify/batch", "images", several),
        ("/explain", "image", ENCODED),
    ):
        operation = spec["paths"][path]["post"]
        success = next(reply for status, reply in operation["responses"].items() if str(status) == "200")
        operation["responses"] = {"200": {**success, "headers": REQUEST_ID | SERVER_TIMING}, **errors}
        operation["requestBody"]["required"] = True
        content = operation["requestBody"]["content"]
        content.update(_json(_object(field, body)))
        if field == "image":
            content["image/*"] = BINARY
        operation["parameters"] = OPTIONS
    spec["paths"]["/explain"]["post"]["responses"]["200"]["content"]["image/png"] = BINARY
    card = {"description": "The model card.", "headers": REQUEST_ID, "content": _json({"type": "object"})}
    spec["paths"]["/model"] = {
        "get": {"description": "What is served, and how good it is.", "responses": {"200": card}}
    }
    spec["info"] = {"title": "classifier", "version": spec["info"]["version"], "description": "Image classification."}
    for unused in ("InvalidArgument", "NotFound", "InternalServerError", "TaskStatusResponse"):
        spec["components"]["schemas"].pop(unused, None)
    if asks_for_keys:
        _ask_for_keys(spec)
    return spec
