"""Image counts of each API key: rate and quota, enforced across all worker processes of a server.

The counts are in a small SQLite file that the workers share, and the event loop never waits for it. If the file fails,
or another process does not release it, nobody is limited for a while: that is logged, and the service goes on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sqlite3
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from serving.access import AccessError, Key
from serving.errors import ApiError, too_large, too_many
from serving.logs import RateLimitedLogger

logger = logging.getLogger("classifier.usage")

DAY_SECONDS = 86_400
PATIENCE_SECONDS = 1.0
"""Longest wait for another process to release the file, which needs it for well under a millisecond."""
BACKOFF_SECONDS = 10.0
"""Time for which a file that failed is left alone: otherwise requests would wait for it one after another."""
SET_UP = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS usage (name TEXT PRIMARY KEY, tokens REAL, updated REAL, day INTEGER, images INTEGER);
"""


class Account(NamedTuple):
    """What a key has left of its rate, and what it has used of its daily quota."""

    tokens: float = math.inf
    updated: float = 0.0
    day: int = 0
    images: int = 0

    def clamp_to_clock(self, now: float) -> Account:
        """The account, refilling from ``now`` on if the clock was set back, instead of once it has caught up."""
        return self._replace(updated=min(self.updated, now))

    def charge(self, key: Key, images: int, now: float) -> Account:
        """The account after ``images`` more at time ``now``; raises ``ApiError`` 413 or 429 if that is too many."""
        day = int(now // DAY_SECONDS)
        had = self.images if self.day == day else 0
        if key.images_per_day is not None and images > key.images_per_day:
            raise too_large(f"the request has {images} images; expected at most {key.images_per_day}, those of a day")
        if key.images_per_day is not None and had + images > key.images_per_day:
            raise _refusal(
                "quota_exceeded",
                f"{had} of {key.images_per_day} images a day were sent, and now {images}",
                (day + 1) * DAY_SECONDS - now,
            )
        return Account(self._spend(key, images, now), now, day, had + images)

    def _spend(self, key: Key, images: int, now: float) -> float:
        """Tokens left in a bucket of one second's images.

        A batch larger than the bucket is admitted when the bucket is full, and owes the rest: the rate holds, and a low
        one does not shut out large batches for ever.
        """
        if key.images_per_second is None:
            return math.inf
        rate = key.images_per_second
        tokens = min(rate, self.tokens + max(0.0, now - self.updated) * rate)
        wanted = min(images, rate)
        if tokens < wanted:
            message = f"more than {rate:g} images a second were sent"
            raise _refusal("rate_limited", message, (wanted - tokens) / rate)
        return tokens - images


class Usage:
    """The accounts of all keys, in ``file``.

    Raises ``AccessError`` at construction if the file cannot be used, unless the service ``is_running`` already: a
    restarted worker must not exit over an error that the others live with.

    Without ``file`` it makes a temporary one, which is removed when this process exits. This process is the parent of
    the workers, which get the path as their ``file``.
    """

    def __init__(self, file: Path | None, is_running: bool = False) -> None:
        if file is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="classifier-")
            file = Path(self._temporary.name) / "usage.sqlite"
        self.file = file
        self._thread = ThreadPoolExecutor(1, "usage")
        self._limited_logger = RateLimitedLogger(logger)
        self._backoff_until = 0.0
        self._database: sqlite3.Connection | None = None
        if not is_running:
            try:
                self._open().close()
            except sqlite3.Error as error:
                raise AccessError(f"USAGE_FILE={str(file)!r}: {error}") from None

    def _open(self) -> sqlite3.Connection:
        # Transactions are begun explicitly, because they read before they write.
        database = sqlite3.connect(self.file, timeout=PATIENCE_SECONDS, isolation_level=None)
        database.executescript(SET_UP)
        return database

    async def charge(self, name: str, key: Key, images: int) -> None:
        """Count ``images`` sent with a key; raises ``ApiError`` 413 or 429, and counts none, if they are too many."""
        if key.images_per_second is None and key.images_per_day is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._charge, name, key, images)
        except sqlite3.Error as error:
            self._limited_logger.error("API keys are not limited", reason=str(error))

    def _charge(self, name: str, key: Key, images: int) -> None:
        if time.monotonic() < self._backoff_until:
            return
        try:
            self._write(name, key, images)
        except sqlite3.Error:
            self._backoff_until = time.monotonic() + BACKOFF_SECONDS
            raise

    def _write(self, name: str, key: Key, images: int) -> None:
        """Count ``images``; raises ``ApiError`` if they are too many."""
        self._database = self._database or self._open()
        now = time.time()
        account = self._read(self._database, name)
        if account.updated <= now:
            # Refuses most of a flood by reading alone: if that wrote, other processes would wait for the file.
            account.charge(key, images, now)
        refusal = None
        with self._database as database:
            database.execute("BEGIN IMMEDIATE")
            now = time.time()
            account = self._read(database, name).clamp_to_clock(now)
            try:
                account = account.charge(key, images, now)
            except ApiError as error:
                refusal = error  # raised below: in the transaction, it would undo ``clamp_to_clock``
            database.execute("REPLACE INTO usage VALUES (?, ?, ?, ?, ?)", (name, *account))
        if refusal:
            raise refusal

    @staticmethod
    def _read(database: sqlite3.Connection, name: str) -> Account:
        row = database.execute("SELECT tokens, updated, day, images FROM usage WHERE name = ?", (name,)).fetchone()
        return Account(*row) if row else Account()


def _refusal(code: str, message: str, seconds: float) -> ApiError:
    retry = math.ceil(seconds)
    return too_many(code, f"{message}: try again in {retry} s", retry)
