"""``/docs.json``: every endpoint, request format, error and header as they really are, in OpenAPI 3.1.

BentoML's own document knows one request format and only its own errors, so nothing of it is kept but the version.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from serving.access import GUARDED
from serving.errors import ERROR_HEADER, Failure
from serving.replies import Batch, Classification, Explanation

Document = dict[str, Any]
JSON = "application/json"

ERRORS = {
    HTTPStatus.BAD_REQUEST: "invalid_request, or invalid_image: missing, malformed or undecodable",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large or too_many_pixels",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type: not a type of request or image that is accepted",
    HTTPStatus.TOO_MANY_REQUESTS: "overloaded: the queue is full; Retry-After says how long to wait",
    HTTPStatus.INTERNAL_SERVER_ERROR: "internal: an error in the server",
    HTTPStatus.SERVICE_UNAVAILABLE: "not_ready",
    HTTPStatus.GATEWAY_TIMEOUT: "deadline_exceeded",
}
"""The error codes that go with each status."""
NO_EVIDENCE = {HTTPStatus.NOT_FOUND: "no_evidence: the model's network does not tell places of an image apart"}
"""Errors added for explanations."""
KEY_ERRORS = {
    HTTPStatus.UNAUTHORIZED: "unauthorized: no API key, or an unknown one",
    HTTPStatus.FORBIDDEN: "forbidden: the API key has expired, or is not for this path",
}
"""Errors added where API keys are required."""
LIMIT_ERRORS = {
    HTTPStatus.TOO_MANY_REQUESTS: "overloaded: the queue is full; rate_limited or quota_exceeded: too many images were "
    "sent with this API key; Retry-After says how long to wait",
}
"""Replaces the 429 of ``ERRORS`` where images are sent with an API key, which has limits."""
KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def _header(description: str, **schema: Any) -> Document:
    return {"description": description, "required": True, "schema": schema}


REQUEST_ID = {"X-Request-ID": _header("The caller's, or a new one.", type="string", pattern="^[A-Za-z0-9._-]{1,64}$")}
SERVER_TIMING = {"Server-Timing": _header("Stages in milliseconds (W3C).", type="string")}
ERROR_CODE = {ERROR_HEADER: _header("The error's code.", type="string")}
HEADERS = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": _header("Bearer.", type="string")},
    HTTPStatus.TOO_MANY_REQUESTS: {"Retry-After": _header("Seconds.", type="integer", minimum=1)},
}
SHARE = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
PARAMETERS = [
    {"name": name, "in": place, "description": description, "schema": schema}
    for name, place, description, schema in (
        ("prediction_set", "query", "Confidence level of a prediction set to add to the reply, such as 0.99.", SHARE),
        ("abstain_below", "query", "Abstain below this confidence.", SHARE),
        (
            "abstain_foreign",
            "query",
            "Abstain if the image does not resemble the training images.",
            {"type": "boolean"},
        ),
        (
            "top",
            "query",
            "List this many of the most probable classes, by name, instead of the probabilities of all.",
            {"type": "integer", "minimum": 1},
        ),
        (
            "X-Request-ID",
            "header",
            "Request id to use, if it is 1 to 64 letters, digits, dots, hyphens and underscores.",
            {"type": "string"},
        ),
        (
            "X-Request-Timeout",
            "header",
            "Deadline in seconds; after that, 504.",
            {"type": "number", "exclusiveMinimum": 0},
        ),
    )
]
IMAGE = {"type": "string", "format": "binary", "description": "A JPEG, PNG, WebP, BMP, GIF or TIFF file."}
OVERLAY = {"type": "string", "format": "binary", "description": "The image, overlaid with the evidence."}
ENCODED = {"type": "string", "format": "base64-image", "description": "Base64 (RFC 4648) or a data URL (RFC 2397)."}
MODELS: list[tuple[type[BaseModel], JsonSchemaMode]] = [
    (model, "serialization") for model in (Classification, Explanation, Batch, Failure)
]
INFRASTRUCTURE = {
    "/livez": "200 while the process runs.",
    "/healthz": "The same as /livez, for BentoML's own tools.",
    "/readyz": "200 once this worker has reproduced the reference outputs, else 503.",
    "/metrics": "Prometheus metrics of all workers.",
}


def _reply(description: str, schemas: dict[str, Document]) -> Document:
    """A reply whose ``schemas`` are by content type."""
    content = {content_type: {"schema": schema} for content_type, schema in schemas.items()}
    return {"description": description, "headers": REQUEST_ID, "content": content}


def _ref(name: str) -> Document:
    return {"$ref": f"#/components/schemas/{name}"}


def _failures(errors: dict[HTTPStatus, str]) -> Document:
    """Error replies by status, described by their error codes."""
    failures = {}
    for status, codes in errors.items():
        reply = _reply(codes, {JSON: _ref("Failure")})
        failures[str(status.value)] = {**reply, "headers": {**REQUEST_ID, **ERROR_CODE, **HEADERS.get(status, {})}}
    return failures


def _post(summary: str, field: str, form: Document, encoded: Document, reply: Document, **raw: Document) -> Document:
    """An operation that takes images: as ``form`` in multipart, as ``encoded`` in JSON, or as they are (``raw``)."""

    def with_field(schema: Document) -> Document:
        return {"schema": {"type": "object", "required": [field], "properties": {field: schema}}}

    content = {"multipart/form-data": with_field(form), JSON: with_field(encoded), **raw}
    return {
        "description": summary,
        "parameters": PARAMETERS,
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {**reply, "headers": {**REQUEST_ID, **SERVER_TIMING}}, **_failures(ERRORS)},
    }


def _get(summary: str, schemas: dict[str, Document]) -> Document:
    return {"description": summary, "responses": {"200": _reply(summary, schemas)}}


def _paths() -> Document:
    raw = {"image/*": {"schema": IMAGE}}
    classification = _reply("The verdict.", {JSON: _ref("Classification")})
    explanation = _reply(
        "A PNG overlay, or the evidence as numbers for callers that accept JSON.",
        {"image/png": OVERLAY, JSON: _ref("Explanation")},
    )
    several = {"type": "array", "minItems": 1, "items": ENCODED}
    files = {"type": "array", "minItems": 1, "items": IMAGE}
    batch = _reply("The verdicts in order; an invalid image gives an error.", {JSON: _ref("Batch")})
    explain = _post("Explain the verdict on one image.", "image", IMAGE, ENCODED, explanation, **raw)
    explain["responses"].update(_failures(NO_EVIDENCE))
    card = {"type": "object", "required": ["name", "version", "classes", "input_size", "runtime", "topology"]}
    text = {"text/plain": {"type": "string"}}
    return {
        "/classify": {"post": _post("Classify one image.", "image", IMAGE, ENCODED, classification, **raw)},
        "/classify/batch": {"post": _post("Classify several images.", "images", files, several, batch)},
        "/explain": {"post": explain},
        "/model": {"get": _get("The model card: what is served, and its measured figures.", {JSON: card})},
        "/docs.json": {"get": _get("This document.", {JSON: {"type": "object"}})},
        "/schema.json": {"get": _get("The schema that BentoML's clients read.", {JSON: {"type": "object"}})},
        **{path: {"get": _get(summary, text)} for path, summary in INFRASTRUCTURE.items()},
    }


def _ask_for_keys(document: Document) -> None:
    document["components"]["securitySchemes"] = KEY_SCHEMES
    for path in set(GUARDED) & set(document["paths"]):
        for method, operation in document["paths"][path].items():
            operation["security"] = [{name: []} for name in KEY_SCHEMES]
            operation["responses"].update(_failures(KEY_ERRORS))
            if method == "post":  # a GET sends no images, and has no limits
                operation["responses"].update(_failures(LIMIT_ERRORS))


def describe(version: str, asks_for_keys: bool) -> Document:
    """The OpenAPI document of the whole API."""
    _, schemas = models_json_schema(MODELS, ref_template="#/components/schemas/{model}")
    not_ready = {HTTPStatus.SERVICE_UNAVAILABLE: ERRORS[HTTPStatus.SERVICE_UNAVAILABLE]}
    document: Document = {
        "openapi": "3.1.0",
        "info": {"title": "classifier", "version": version, "description": "Image classification."},
        "paths": _paths(),
        "components": {"schemas": schemas["$defs"]},
    }
    document["paths"]["/readyz"]["get"]["responses"].update(_failures(not_ready))
    if asks_for_keys:
        _ask_for_keys(document)
    return document
