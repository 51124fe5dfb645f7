"""Our own Prometheus metrics; BentoML's ``/metrics`` exposes them, added up over the worker processes."""

from __future__ import annotations

import time
from functools import cache

from prometheus_client import Counter, Gauge, Histogram

from serving import metric_files

metric_files.prepare()  # before any metric exists

STAGE_SECONDS = Histogram(
    "classifier_stage_seconds",
    "Time in one stage of a request: read, decode, classify (queue and engine) or reply; infer is one batch.",
    ["stage"],
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
BATCH_IMAGES = Histogram(
    "classifier_batch_images", "Images in one batch of an engine.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
)
IMAGES = Counter("classifier_images_total", "Images classified, by verdict.", ["class_name"])
CONFIDENCE = Histogram(
    "classifier_confidence",
    "Calibrated probability of the verdict.",
    buckets=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1),
)
FOREIGN_IMAGES = Counter(
    "classifier_foreign_images_total", "Images classified that do not resemble the training images."
)
ABSTAINED_IMAGES = Counter("classifier_abstained_images_total", "Images left without a verdict, as the caller asked.")
SHADOW_IMAGES = Counter(
    "classifier_shadow_images_total",
    "Images shown to the shadow model: its verdict was the same or different, or it was dropped or failed.",
    ["outcome"],
)
DRIFT_IMAGES = Counter(
    "classifier_drift_images_total",
    "Images by bin of a feature: class and confidence of the verdict, brightness, contrast, sharpness and colour.",
    ["feature", "bin"],
)
EXPECTED_SHARE = Gauge(
    "classifier_drift_expected_share",
    "Share of images like those of the training in that bin.",
    ["feature", "bin"],
    multiprocess_mode="livemax",
)
REJECTED = Counter("classifier_rejected_total", "Requests and images answered with an error, by its code.", ["reason"])
REASONS = (
    *("invalid_request", "invalid_image", "too_large", "too_many_pixels", "unsupported_media_type"),
    *("overloaded", "deadline_exceeded", "caller_deadline", "not_ready", "internal"),
    *("unauthorized", "forbidden", "rate_limited", "quota_exceeded"),
    *("not_found", "no_evidence", "method_not_allowed", "disconnected"),
)
for _reason in REASONS:  # Prometheus sees no increase when a series appears at 1, so each starts at 0
    REJECTED.labels(_reason)
DECODER_DEATHS = Counter(
    "classifier_decoder_deaths_total",
    "Decoders that an image crashed, that took too much time or memory for it, or that could not be started.",
)
KEY_IMAGES = Counter("classifier_key_images_total", "Images charged to each API key.", ["key"])
QUEUE_IMAGES = Gauge("classifier_queue_images", "Images that wait for an engine.", multiprocess_mode="livesum")
BATCH_LIMIT = Gauge("classifier_batch_limit_images", "Images that one batch may hold.", multiprocess_mode="livemax")
WORKERS = Gauge("classifier_workers", "API workers that the server should have.", multiprocess_mode="livemax")
WORKER_ALIVE = Gauge(
    "classifier_worker_alive_timestamp_seconds",
    "When the event loop of a worker last turned, in seconds since 1970.",
    ["process"],
    multiprocess_mode="all",
)
MODEL_INFO = Gauge(
    "classifier_model_info",
    "Constant 1; the labels say what is served.",
    ["model", "version", "runtime", "topology"],
    multiprocess_mode="livemax",
)


@cache
def _seconds(stage: str) -> Histogram:
    """``STAGE_SECONDS`` of one stage, cached to save a lookup by label for every image."""
    return STAGE_SECONDS.labels(stage)


class Timer:
    """Observes how long its block takes as one stage of a request, and adds that to ``entries`` of ``Server-Timing``.

    A class, because a generator with ``contextmanager`` takes three times as long.
    """

    def __init__(self, stage: str, entries: list[str] | None = None) -> None:
        self._stage, self._entries = stage, entries

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._started
        _seconds(self._stage).observe(seconds)
        if self._entries is not None:
            self._entries.append(f"{self._stage};dur={1000 * seconds:.3f}")


class Stages:
    """The timed stages of one request, to be reported to its caller."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._entries: list[str] = []

    def timed(self, stage: str) -> Timer:
        return Timer(stage, self._entries)

    def headers(self) -> dict[str, str]:
        """``Server-Timing`` (W3C), in milliseconds, with the total so far."""
        total = f"total;dur={1000 * (time.perf_counter() - self._started):.3f}"
        return {"server-timing": ", ".join((*self._entries, total))}
