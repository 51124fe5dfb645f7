"""What is checked and recorded of a request besides answering it: key, usage, audit line, images for review.

If none of it is configured there is no accounting, and all a request pays for is an ``if``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from model.classifier import Prediction
from serving import metrics
from serving.access import GUARDED, Key
from serving.audit import Audit
from serving.context import request_id
from serving.errors import ApiError
from serving.keys import Keys, authorize
from serving.requests import Item
from serving.review import Review
from serving.usage import Usage
from settings import Settings

Verdict = Prediction | ApiError
"""The outcome for one image."""
LARGE_BYTES = 65_536
"""From this size on, hashing takes longer than handing it to a thread."""


@dataclass(frozen=True)
class Accounting:
    """What the settings ask for; ``model`` is the tag of the model that answers."""

    model: str
    keys: Keys | None
    usage: Usage | None
    audit: Audit | None
    review: Review | None

    @classmethod
    def open(
        cls, settings: Settings, model: str, keys: Keys | None, usage: Usage | None, process_name: str
    ) -> Accounting | None:
        """The accounting of the worker called ``process_name``, or None if nothing is configured."""
        audit = Audit(settings.audit_directory, process_name) if settings.audit_directory else None
        review = Review(settings) if settings.review_directory else None
        return cls(model, keys, usage, audit, review) if keys or audit or review else None

    def begin(self, scope: Scope) -> RequestRecord | None:
        """A record for a request to the guarded API, None for any other."""
        if scope["path"] not in GUARDED:
            return None
        record = RequestRecord(self, scope["path"], _address(scope))
        _current.set(record)
        return record


@dataclass(eq=False)
class RequestRecord:
    """One request, from its key to its audit line."""

    _accounting: Accounting
    _path: str
    _client: str | None
    _name: str | None = None
    """Name of the key; None if keys are not required."""
    _key: Key | None = None
    _images: list[dict[str, Any]] = field(default_factory=list)

    def authorize(self, headers: Headers) -> None:
        """Raises ``ApiError`` 401 or 403."""
        if self._accounting.keys:
            self._name, self._key = self._accounting.keys.identify(headers)
            authorize(self._name, self._key, self._path)

    async def charge(self, items: Sequence[Item]) -> None:
        """Charge the images to the key, and hash them for the audit log, before any is decoded.

        Raises ``ApiError`` 413 or 429.
        """
        if self._accounting.usage and self._name and self._key:
            await self._accounting.usage.charge(self._name, self._key, len(items))
            metrics.KEY_IMAGES.labels(self._name).inc(len(items))
        if self._accounting.audit:
            small = sum(len(item) for item in items if isinstance(item, bytes)) < LARGE_BYTES
            self._images = _hash(items) if small else await asyncio.to_thread(_hash, items)

    def add_verdicts(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> None:
        """Record the verdicts on the images, and offer the images for review."""
        for entry, verdict in zip(self._images, verdicts, strict=False):  # no entries without an audit log
            entry.update(_summary(verdict))
        if self._accounting.review:
            about = {"request_id": request_id.get(), "key": self._name, "model": self._accounting.model}
            for item, verdict in zip(items, verdicts, strict=True):
                if isinstance(item, bytes) and isinstance(verdict, Prediction):
                    self._accounting.review.offer(item, verdict, about)

    def end(self, status: int, code: str) -> None:
        """Write the audit line."""
        if self._accounting.audit:
            self._accounting.audit.write(
                time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                request_id=request_id.get(),
                key=self._name,
                client=self._client,
                path=self._path,
                status=status,
                code=code or None,
                model=self._accounting.model,
                images=self._images,
            )


def _address(scope: Scope) -> str | None:
    """The client's IP address, or None if a trusted proxy forwarded something else."""
    try:
        return str(ip_address(scope["client"][0]))
    except (TypeError, ValueError):
        return None


_current: ContextVar[RequestRecord | None] = ContextVar("record", default=None)


async def charge(items: Sequence[Item]) -> None:
    """``RequestRecord.charge`` for the current request, if it has a record."""
    if record := _current.get():
        await record.charge(items)


def add_verdicts(items: Sequence[Item], verdicts: Sequence[Verdict]) -> None:
    """``RequestRecord.add_verdicts`` for the current request, if it has a record."""
    if record := _current.get():
        record.add_verdicts(items, verdicts)


def _hash(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [{"sha256": hashlib.sha256(item).hexdigest()} if isinstance(item, bytes) else {} for item in items]


def _summary(verdict: Verdict) -> dict[str, Any]:
    if isinstance(verdict, ApiError):
        return {"code": verdict.code}
    return {"class": verdict.class_name, "confidence": verdict.confidence}
