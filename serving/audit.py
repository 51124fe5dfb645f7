"""The audit log: a JSON line for each request to the guarded API, and nothing of what the images show.

    {"time", "request_id", "key", "client", "path", "status", "code", "model",
     "images": [{"sha256", "class", "confidence"}, ...]}

An image of a batch that failed has ``code`` in place of a verdict. The lines are appended to a file of this process
alone, which rotates; a thread writes them. Replicas may share the folder.
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

from serving.logs import Seldom

logger = logging.getLogger("classifier.audit")

ROTATE_BYTES, ROTATE_FILES = 64 * 2**20, 15
"""The current file and 15 older ones: 1 GiB a process, three million requests for one image each."""
WAITING_LINES = 10_000
"""Lines that may wait for a slow disk; more are lost, and the log of the service says so."""


class Audit:
    """Appends to ``directory/audit-<process_name>.jsonl``, or ``-2`` and so on where another replica has that one."""

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
    """A file and the open lock that makes it ours until we end: two processes that rotate one file would lose lines."""
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
    """Says in the log of the service, now and then, that lines are lost; the standard library prints a traceback."""

    _complaints = Seldom(logger)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the standard library's name
        self._complaints.error("audit lines are lost")


class _File(_Complaining, RotatingFileHandler):
    pass


class _Queue(_Complaining, QueueHandler):
    pass
