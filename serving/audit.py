"""The audit log: one JSON line per request to the guarded API, without anything that the images show.

    {"time", "request_id", "key", "client", "path", "status", "code", "model",
     "images": [{"sha256", "class", "confidence"}, ...]}

An image that failed within a batch has ``code`` instead of a verdict. A thread appends the lines to a rotating file
that belongs to this process alone. Replicas may share the folder.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import queue
from itertools import count
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import orjson

from serving.logs import RateLimitedLogger

logger = logging.getLogger("classifier.audit")

ROTATE_BYTES, ROTATE_FILES = 64 * 2**20, 15
"""The current file and 15 older ones: 1 GiB per process, or three million requests for one image each."""
WAITING_LINES = 10_000
"""Lines that may wait for a slow disk; any more are lost, and the service's log says so."""


class Audit:
    """Appends to ``directory/audit-<process_name>.jsonl``, or ``-2`` and so on if another replica holds that one."""

    def __init__(self, directory: Path, process_name: str) -> None:
        lines: queue.Queue[logging.LogRecord] = queue.Queue(WAITING_LINES)
        path, self._lock = _claim(directory, process_name)
        file = _File(path, maxBytes=ROTATE_BYTES, backupCount=ROTATE_FILES, encoding="utf-8")
        self._queue = _Queue(lines)
        listener = QueueListener(lines, file)
        listener.start()
        atexit.register(listener.stop)

    def write(self, **fields: Any) -> None:
        self._queue.handle(logging.makeLogRecord({"msg": orjson.dumps(fields).decode()}))


def _claim(directory: Path, process_name: str) -> tuple[Path, TextIO]:
    """A file, and the open lock that makes it ours until we exit: two processes rotating one file would lose lines."""
    for number in count(1):
        name = process_name if number == 1 else f"{process_name}-{number}"
        lock = (directory / f".{name}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return directory / f"audit-{name}.jsonl", lock
    raise AssertionError  # count never ends


class _Complaining(logging.Handler):
    """Reports lost lines in the service's log, now and then; the standard library would print a traceback."""

    _limited_logger = RateLimitedLogger(logger)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the standard library's name
        self._limited_logger.error("audit lines are lost")


class _File(_Complaining, RotatingFileHandler):
    pass


class _Queue(_Complaining, QueueHandler):
    pass
