"""What a caller may ask for besides the verdict: options in the query string, a deadline in a header."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.requests import Request

from serving.context import header
from serving.errors import bad_request


@dataclass(frozen=True)
class Options:
    """What a caller may ask for in the query string."""

    prediction_set: float | None = None
    """Level of the prediction set to include in the reply, between 0 and 1."""
    abstain_below: float | None = None
    """Confidence below which no verdict is wanted."""
    abstain_foreign: bool = False
    """Whether no verdict is wanted on an image that does not resemble the training images."""
    top: int | None = None
    """How many classes to list, the most probable ones, instead of the probabilities of all."""

    @property
    def may_abstain(self) -> bool:
        return self.abstain_below is not None or self.abstain_foreign


NO_OPTIONS = Options()


def read_options(request: Request) -> Options:
    """The options of a request; raises ``ApiError`` for one that is unknown, repeated or invalid."""
    if not request.scope["query_string"]:
        return NO_OPTIONS
    readers = {"prediction_set": _share, "abstain_below": _share, "abstain_foreign": _flag, "top": _count}
    chosen: dict[str, float | bool | int] = {}
    for name, value in request.query_params.multi_items():
        if name not in readers:
            raise bad_request(f"query parameter {name[:40]!r}; expected one of {', '.join(readers)}")
        if name in chosen:
            raise bad_request(f"query parameter {name!r} is given twice; expected it once")
        chosen[name] = readers[name](name, value)
    return Options(**chosen)  # type: ignore[arg-type]  # the readers return the right types


def _share(name: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise bad_request(f"{name}={value[:40]!r}; expected a number between 0 and 1")
    return share


def _flag(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise bad_request(f"{name}={value[:40]!r}; expected true or false")
    return value.lower() == "true"


def _count(name: str, value: str) -> int:
    try:
        count = int(value)
    except ValueError:
        count = 0
    if count < 1:
        raise bad_request(f"{name}={value[:40]!r}; expected a whole number from 1 on")
    return count


def read_timeout(request: Request, limit: float) -> float:
    """Seconds that the caller will wait, from ``X-Request-Timeout``: at most ``limit``, and ``limit`` by default."""
    asked = header(request.scope["headers"], b"x-request-timeout")
    if asked is None:
        return limit
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise bad_request(f"X-Request-Timeout {asked[:40]!r}; expected a number of seconds above 0")
    return min(seconds, limit)
