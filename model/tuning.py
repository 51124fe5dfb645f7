"""Measure engines on this machine: which format and batch size are fastest here is not known in advance."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import numpy as np

from model.artifact import ONNX, ONNX_INT8
from model.ensemble import Ensemble
from model.preprocess import Pixels
from model.runtimes import Runtime, RuntimeUnavailableError
from model.verification import VerificationError, verify

BATCH = 8
BATCHES = (4, 8, 16, 32, 64)
ROUNDS = 5
"""Repetitions of each measurement."""
LONG_SECONDS = 0.05
"""A batch that takes longer ends the search: larger ones gain nothing more, and requests would wait for them."""
HANDOVER_SECONDS = 0.0005
"""Overhead of a batch in a busy worker, whose threads wait for a core, for the interpreter and for each other."""
GOOD_ENOUGH = 0.97
"""Share of the best rate at which a smaller batch is preferred, because it answers sooner."""


class Comparison(NamedTuple):
    images_per_second: dict[str, float]
    """Rate of each runtime that is available here and passes verification."""
    failed: dict[str, str]
    """Why each of the others failed."""

    @property
    def fastest(self) -> str:
        return max(self.images_per_second, key=self.images_per_second.__getitem__)


def seconds_of(runtime: Runtime, images: Pixels, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time that ``runtime`` takes for one batch of ``images`` (N, H, W, 3)."""
    started = clock()
    runtime(images)
    return clock() - started


def images_per_second(runtime: Runtime, images: Pixels, clock: Callable[[], float] = time.perf_counter) -> float:
    """Rate of ``runtime`` on one batch of ``images`` (N, H, W, 3), from the median time of ``ROUNDS``."""
    return len(images) / float(np.median([seconds_of(runtime, images, clock) for _ in range(ROUNDS)]))


def compare(ensemble: Ensemble, threads: int = 1, names: Iterable[str] = (ONNX, ONNX_INT8)) -> Comparison:
    """Time the runtimes ``names`` on this machine; raises ``RuntimeUnavailableError`` if none passes verification."""
    rates: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            runtime = ensemble.engine(name, threads)
            reference = ensemble.reference(name)
            verify(runtime, reference)
        except (RuntimeUnavailableError, VerificationError) as error:
            failed[name] = str(error)
            continue
        batch = np.resize(reference.images, (BATCH, *reference.images.shape[1:]))
        rates[name] = round(images_per_second(runtime, batch), 1)
    if not rates:
        raise RuntimeUnavailableError(f"RUNTIME='fastest'; expected one that works: {failed}")
    return Comparison(rates, failed)


async def measure_batches(
    measure: Callable[[Pixels], Awaitable[float]], images: Pixels, until_idle: Callable[[], Awaitable[None]]
) -> dict[int, float]:
    """Seconds per batch for each size in ``BATCHES``, filled with ``images`` (N, H, W, 3) and timed by ``measure``.

    Each batch waits for ``until_idle``. The minimum of ``ROUNDS`` counts: other load only ever adds to it.
    """
    batches = {size: np.resize(images, (size, *images.shape[1:])) for size in BATCHES}
    least: dict[int, float] = {}
    for _ in range(ROUNDS):  # each over all sizes, so that a bad moment spoils no size in every round
        for size, batch in batches.items():
            if 2 * least.get(size // 2, 0) > LONG_SECONDS:
                break
            await until_idle()
            least[size] = min(least.get(size, math.inf), await measure(batch))
    return least


def best_batch(seconds: dict[int, float]) -> int:
    """The smallest batch size whose rate is nearly the best (``GOOD_ENOUGH``); ``seconds`` per batch, by size."""
    rates = {size: size / (taken + HANDOVER_SECONDS) for size, taken in seconds.items()}
    return min(size for size, rate in rates.items() if rate >= GOOD_ENOUGH * max(rates.values()))
