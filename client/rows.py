"""One row per image, from a reply of the service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Reply = dict[str, Any]
"""One of the results of ``/classify/batch``: a verdict, or ``{"error": {"code", "message"}}``."""
Row = dict[str, Any]
Classify = Callable[[list[bytes]], list[Reply]]
"""Maps images to their replies, in order; called from several threads. Raises ``ClientError`` if it cannot work."""


def failure(code: str, message: str) -> Reply:
    return {"error": {"code": code, "message": message}}


def columns(with_set: bool, with_probabilities: bool) -> tuple[str, ...]:
    """The names of the columns, in order."""
    verdict = ("path", "predicted_class", "class_name", "confidence", "in_distribution")
    asked = ("prediction_set",) * with_set + ("probabilities",) * with_probabilities
    return (*verdict, *asked, "model", "error_code", "error_message")


def row(name: str, reply: Reply, wanted: tuple[str, ...]) -> Row:
    """The columns ``wanted`` for one image; what the reply lacks is null."""
    error = reply.get("error", {})
    probabilities = reply.get("all_probabilities", {})
    told = {
        **reply,
        "path": name,
        "probabilities": [probabilities[key] for key in sorted(probabilities, key=int)] or None,
        "error_code": error.get("code"),
        "error_message": error.get("message"),
    }
    return {column: told.get(column) for column in wanted}
