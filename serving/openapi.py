"""``/docs.json`` as it really is: BentoML describes one form and its own errors; this adds ours."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

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
REQUEST_ID = {"X-Request-ID": {"description": "As sent, or made.", "schema": {"type": "string"}}}
RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
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


def describe(spec: Document) -> Document:
    """BentoML's OpenAPI document, changed in place to name every form, error and header of our endpoints."""
    failure = {"$ref": "#/components/schemas/Failure"}
    errors = {
        str(status.value): {
            "description": codes,
            "headers": {**REQUEST_ID, **(RETRY_AFTER if status == HTTPStatus.TOO_MANY_REQUESTS else {})},
            "content": _json(failure),
        }
        for status, codes in ERRORS.items()
    }
    several = {"type": "array", "minItems": 1, "items": ENCODED}
    for path, field, body in (
        ("/classify", "image", ENCODED),
        ("/classify/batch", "images", several),
        ("/explain", "image", ENCODED),
    ):
        operation = spec["paths"][path]["post"]
        success = next(reply for status, reply in operation["responses"].items() if str(status) == "200")
        operation["responses"] = {"200": {**success, "headers": REQUEST_ID}, **errors}
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
    return spec
