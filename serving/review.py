"""Images that the model was unsure of, kept for people to label and for retraining. Off by default.

Each is stored as sent, named after its SHA-256, with a JSON line beside it that records the answer. A sampling rate, an
age and a size limit what is kept, across all processes that share the directory. A thread does all the work and drops
what it cannot keep: no request ever waits or fails.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import queue
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import orjson

from model.classifier import Prediction
from model.headers import read_header
from serving.logs import RateLimitedLogger
from settings import Settings

logger = logging.getLogger("classifier.review")

SWEEP_SECONDS = 600.0
"""Interval at which images that are too old are removed."""
SWEEP_TO = 0.9
"""Share of the maximum size that a sweep leaves once it is reached, so that not every image lists the directory."""
BLOCK = 4096
"""Disk block size: a file takes whole blocks, and there are many small files."""
DAY_SECONDS = 86_400
NAME = re.compile("[0-9a-f]{64}")
"""Stem of a kept file: the image's SHA-256."""
LEDGER = ".bytes"
"""File with the number of bytes kept; whoever changes the directory holds its lock."""


class ReviewCandidate(NamedTuple):
    """An image as sent, and its prediction; ``about`` goes into its JSON line too."""

    data: bytes
    prediction: Prediction
    about: dict[str, str | None]


class Review:
    """Keeps a sample of the low-confidence images in the directory that the settings name."""

    def __init__(self, settings: Settings) -> None:
        assert settings.review_directory
        self._directory = settings.review_directory
        self._share, self._below = settings.review_share, settings.review_below
        self._max_age, self._max_bytes = settings.review_days * DAY_SECONDS, settings.review_bytes
        self._limited_logger = RateLimitedLogger(logger)
        # Bytes that wait in memory for the thread; images beyond them are dropped. Those of a whole request fit: with
        # less room, only the first images of each batch would ever be kept.
        self._max_waiting_bytes, self._waiting_bytes = settings.max_body_bytes, 0
        self._waiting_lock = threading.Lock()
        self._waiting: queue.SimpleQueue[ReviewCandidate] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="review", daemon=True).start()

    def offer(self, data: bytes, prediction: Prediction, about: dict[str, str | None]) -> None:
        """Keep the image if the model is unsure of it, it is drawn for the sample, and the thread is not behind."""
        if prediction.confidence < self._below and random.random() < self._share and self._count(len(data)):
            self._waiting.put(ReviewCandidate(data, prediction, about))

    def _count(self, size: int) -> bool:
        """Count ``size`` bytes as waiting, or no longer if negative; False if there is no room for them."""
        with self._waiting_lock:
            has_room = self._waiting_bytes + size <= self._max_waiting_bytes
            self._waiting_bytes += size if has_room else 0
            return has_room

    def _work(self) -> None:
        next_sweep = 0.0
        while True:
            try:
                if time.monotonic() >= next_sweep:
                    next_sweep = time.monotonic() + SWEEP_SECONDS
                    with self._ledger() as ledger:
                        _note(ledger, self._sweep(self._max_bytes))
                candidate = self._waiting.get(timeout=max(0.0, next_sweep - time.monotonic()))
                self._count(-len(candidate.data))
                self._keep(candidate)
            except queue.Empty:
                pass
            except Exception as error:  # a full disk or a removed directory must not stop the service
                self._limited_logger.error("images for review are not kept", reason=repr(error))

    def _keep(self, candidate: ReviewCandidate) -> None:
        name = hashlib.sha256(candidate.data).hexdigest()
        image = self._directory / f"{name}.{read_header(candidate.data).format.lower()}"
        line = orjson.dumps(_describe(candidate, name)) + b"\n"
        size = _on_disk(len(candidate.data)) + _on_disk(len(line))
        if size > self._max_bytes:
            return
        with self._ledger() as ledger:
            if image.exists():  # sent before
                return
            held = int(ledger.read() or 0)
            if held + size > self._max_bytes:
                held = self._sweep(min(SWEEP_TO * self._max_bytes, self._max_bytes - size))
            _note(ledger, held + size)  # first: a failure below then never lets too much in
            _write({image: candidate.data, image.with_suffix(".json"): line})

    def _sweep(self, max_bytes: float) -> int:
        """Remove images that are too old, then the oldest down to ``max_bytes`` at most; returns the bytes left."""
        kept = self._kept()
        held = sum(size for _, size, _ in kept)
        oldest = time.time() - self._max_age
        for modified, size, files in kept:
            if modified >= oldest and held <= max_bytes:
                break
            held -= size
            for file in files:
                file.unlink(missing_ok=True)
        return held

    def _kept(self) -> list[tuple[float, int, list[Path]]]:
        """Time, size and files of each image with its JSON line, oldest first."""
        pairs: dict[str, list[Path]] = {}
        for file in self._directory.iterdir():
            if NAME.fullmatch(file.stem):  # whatever else is there is not ours to remove
                pairs.setdefault(file.stem, []).append(file)
        states = [([file.stat() for file in files], files) for files in pairs.values()]
        return sorted(
            (max(s.st_mtime for s in state), sum(_on_disk(s.st_size) for s in state), files) for state, files in states
        )

    @contextmanager
    def _ledger(self) -> Iterator[TextIO]:
        file = self._directory / LEDGER
        file.touch()
        with file.open("r+") as ledger:
            fcntl.flock(ledger, fcntl.LOCK_EX)  # until it is closed
            yield ledger


def _describe(candidate: ReviewCandidate, name: str) -> dict[str, Any]:
    prediction = candidate.prediction
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **candidate.about,
        "sha256": name,
        "class": prediction.class_name,
        "confidence": prediction.confidence,
        "in_distribution": prediction.in_distribution,
        "probabilities": prediction.rounded,
    }


def _note(ledger: TextIO, size: int) -> None:
    """Write the size over the old one, at a fixed width: a full disk then keeps the old one, not an empty file."""
    ledger.seek(0)
    ledger.write(f"{size:20}")
    ledger.flush()


def _write(contents: dict[Path, bytes]) -> None:
    """Write all of the files or none."""
    try:
        for path, content in contents.items():
            path.write_bytes(content)
    except OSError:
        for path in contents:
            path.unlink(missing_ok=True)
        raise


def _on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
