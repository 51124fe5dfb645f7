"""API keys: who may call, by the keys in a file that is reread whenever it changes."""

from __future__ import annotations

import hmac
import logging
import time
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

from starlette.datastructures import Headers

from serving.access import AccessError, Key, read, sha256
from serving.errors import ApiError, forbidden

logger = logging.getLogger("classifier.keys")

CHECK_SECONDS = 1.0
"""Interval at which the file is checked for changes."""


class Keys:
    """The current keys of ``file``; a change takes effect a second later.

    Raises ``AccessError`` at construction, unless the service ``is_running`` already: a restarted worker must not exit
    over an error that the others live with. It knows no key until the file is fixed.
    """

    def __init__(self, file: Path, is_running: bool = False) -> None:
        self._file = file
        self._fingerprint, self._next_look = _fingerprint(file), 0.0
        self._keys: dict[str, Key] = {}
        try:
            self._keys = read(file)
        except AccessError as error:
            if not is_running:
                raise AccessError(f"API_KEYS: {error}") from None
            # In the message, because the format that shows other fields is configured later.
            logger.error("no API key is known: %s", error)

    def identify(self, headers: Headers) -> tuple[str, Key]:
        """Name and limits of the key that a request presents; raises ``ApiError`` 401."""
        self._refresh()
        name = self._find(extract_key(headers))
        if name is None:
            raise ApiError(
                HTTPStatus.UNAUTHORIZED,
                "unauthorized",
                "no known API key; expected one in 'Authorization: Bearer KEY' or 'X-API-Key: KEY'",
                {"www-authenticate": 'Bearer realm="classifier"'},
            )
        return name, self._keys[name]

    def _find(self, key: str) -> str | None:
        """The name of a key. Every known key is compared in constant time, so that timing reveals nothing about any."""
        digest, found = sha256(key), None
        for name, known in self._keys.items():
            if hmac.compare_digest(digest, known.sha256):
                found = name
        return found

    def _refresh(self) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + CHECK_SECONDS
        fingerprint = _fingerprint(self._file)
        if fingerprint == self._fingerprint:
            return
        self._fingerprint = fingerprint
        try:
            self._keys = read(self._file)
            logger.info("API keys read again", extra={"keys": len(self._keys)})
        except AccessError as error:
            logger.error("the API keys stay as they were", extra={"reason": str(error)})


def authorize(name: str, key: Key, path: str) -> None:
    """Raise ``ApiError`` 403 unless the key may call ``path`` today."""
    if key.expires and datetime.now(UTC).date() >= key.expires:
        raise forbidden(f"the API key {name!r} expired on {key.expires}")
    if key.paths is not None and path not in key.paths:
        raise forbidden(f"the API key {name!r} may not call {path}")


def extract_key(headers: Headers) -> str:
    """The key in a request's headers, or an empty string."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _fingerprint(file: Path) -> tuple[int, ...] | None:
    """A fingerprint that changes whenever the file does; None when the file cannot be reached."""
    with suppress(OSError):
        status = file.stat()
        return status.st_mtime_ns, status.st_ino, status.st_size
    return None
