"""Measurements of engines on this machine: which format is fastest here is not known before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from model.artifact import ONNX, ONNX_INT8
from model.classifier import VerificationError, verify
from model.ensemble import Ensemble
from model.preprocess import Pixels
from model.runtimes import Runtime, RuntimeUnavailableError

BATCH = 8
BATCHES = (4, 8, 16, 32, 64)
ROUNDS = 5
"""Of each measurement."""
LONG_SECONDS = 0.05
"""For one batch. Larger ones are not tried: they gain nothing any more, and requests would wait for them."""
HANDOVER_SECONDS = 0.0005
"""What a batch costs a busy worker besides: its threads wait for a core, for the interpreter and for each other."""
GOOD_ENOUGH = 0.97
"""Of the best rate: a smaller batch answers sooner."""


def seconds_of(runtime: Runtime, images: Pixels, clock: Callable[[], float] = time.perf_counter) -> float:
    """How long ``runtime`` takes for one batch of ``images`` (N, H, W, 3)."""
    started = clock()
    runtime(images)
    return clock() - started


def images_per_second(runtime: Runtime, images: Pixels, clock: Callable[[], float] = time.perf_counter) -> float:
    """The rate of ``runtime`` on one batch of ``images`` (N, H, W, 3), by the median time."""
    return len(images) / float(np.median([seconds_of(runtime, images, clock) for _ in range(ROUNDS)]))


def compare(
    ensemble: Ensemble, threads: int = 1, names: Iterable[str] = (ONNX, ONNX_INT8)
) -> tuple[dict[str, float], dict[str, str]]:
    """Images per second of each runtime that can be had here and is right; and what is wrong with the others.

    Raises ``RuntimeUnavailableError`` where there is none.
    """
    rates: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in names:
        reference = ensemble.reference(name)
        try:
            runtime = ensemble.engine(name, threads)
            verify(runtime, reference)
        except (RuntimeUnavailableError, VerificationError) as error:
            failed[name] = str(error)
            continue
        batch = np.resize(reference.images, (BATCH, *reference.images.shape[1:]))
        rates[name] = round(images_per_second(runtime, batch), 1)
    if not rates:
        raise RuntimeUnavailableError(f"RUNTIME='fastest'; expected one that works: {failed}")
    return rates, failed


def best_batch(seconds: dict[int, float]) -> int:
    """The smallest batch whose images per second are as good as the best; ``seconds`` are those of one batch."""
    rates = {size: size / (taken + HANDOVER_SECONDS) for size, taken in seconds.items()}
    return min(size for size, rate in rates.items() if rate >= GOOD_ENOUGH * max(rates.values()))
