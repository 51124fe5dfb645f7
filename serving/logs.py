"""Logging of a worker process: one JSON line per event, with the request's id, and never an image's content.

Console: ``LOG_LEVEL`` and above. ``LOG_DIRECTORY``: WARNING and above, rotating. ``SMTP_HOST``: CRITICAL by mail, sent
from a thread of its own so that a slow mail server never holds up a request.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import ssl
import sys
import time
from collections.abc import Iterator
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler, SMTPHandler
from typing import Any

from pythonjsonlogger.orjson import OrjsonFormatter

from serving.context import request_id
from settings import Settings

ROTATE_BYTES, ROTATE_FILES = 10 * 2**20, 5
SMTP_TIMEOUT = 10.0
INTERVAL_SECONDS = 60.0


def add_request_id(record: logging.LogRecord) -> bool:
    """A logging filter that passes every record."""
    record.request_id = request_id.get()
    return True


class RateLimitedLogger:
    """Logs a problem that may recur with every request, at most once a minute, with the number of times."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger, self._times, self._next = logger, 0, 0.0

    def error(self, message: str, **fields: Any) -> None:
        self._log(logging.ERROR, message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        self._log(logging.WARNING, message, fields)

    def _log(self, level: int, message: str, fields: dict[str, Any]) -> None:
        self._times += 1
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + INTERVAL_SECONDS
            self._logger.log(level, message, extra={**fields, "times": self._times})
            self._times = 0


def mute_native_code() -> None:
    """Discard what native code prints to file descriptor 2; what Python writes to standard error goes where it did.

    Codecs print there what they find wrong with an image, so that anyone could fill the log.
    """
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def configure(settings: Settings, process_name: str) -> None:
    """Replace every log handler of this process by ours; ``process_name`` identifies its lines and its file."""
    formatter = OrjsonFormatter(
        "{asctime}{levelname}{name}{message}{request_id}",
        style="{",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        static_fields={"process": process_name, "pid": os.getpid()},
        datefmt="%Y-%m-%dT%H:%M:%S%z",
    )
    root = logging.getLogger()
    root.setLevel(min(logging.getLevelNamesMapping()[settings.log_level], logging.WARNING))
    root.handlers.clear()
    for handler in _handlers(settings, process_name):
        handler.setFormatter(formatter)
        handler.addFilter(add_request_id)
        root.addHandler(handler)
    # The server's own loggers come with handlers of their own; their lines belong in the same stream.
    for name in ("bentoml", "uvicorn.error", "circus"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # These report failures in callbacks and detached tasks; BentoML disables every logger that it does not know.
    for name in ("asyncio", "concurrent.futures"):
        logging.getLogger(name).disabled = False
    # The gateway writes a line per request, with the request's id and its error code.
    logging.getLogger("uvicorn.access").disabled = True


def _handlers(settings: Settings, process_name: str) -> Iterator[logging.Handler]:
    console = logging.StreamHandler()
    console.setLevel(settings.log_level)
    yield console
    if settings.log_directory:
        # One file per process: two processes rotating one file lose lines.
        path = settings.log_directory / f"{process_name}.log"
        file = RotatingFileHandler(path, maxBytes=ROTATE_BYTES, backupCount=ROTATE_FILES, encoding="utf-8")
        file.setLevel(logging.WARNING)
        yield file
    if settings.smtp_host:
        yield _mail(settings)


def _mail(settings: Settings) -> logging.Handler:
    assert settings.smtp_host
    assert settings.smtp_to
    password = settings.smtp_password.get_secret_value() if settings.smtp_password else ""
    mail = SMTPHandler(
        (settings.smtp_host, settings.smtp_port),
        settings.smtp_from,
        settings.smtp_to.split(","),
        "CRITICAL: classifier",
        credentials=(settings.smtp_user, password) if settings.smtp_user else None,
        # No client key or certificate; the context verifies the server's, which is not the default.
        secure=(None, None, ssl.create_default_context()) if settings.smtp_user else None,  # type: ignore[arg-type]
        timeout=SMTP_TIMEOUT,
    )
    waiting: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = QueueListener(waiting, mail)
    listener.start()
    atexit.register(listener.stop)
    handler = QueueHandler(waiting)
    handler.setLevel(logging.CRITICAL)
    return handler
