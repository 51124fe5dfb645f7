"""Measurements of engines on this machine: which format is fastest here is not known before."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import numpy as np

from model.artifact import ONNX, ONNX_INT8
from model.classifier import VerificationError, verify
from model.ensemble import Ensemble
from model.preprocess import Pixels
from model.runtimes import Runtime, RuntimeUnavailableError

BATCH = 8
BATCHES = (4, 8, 16, 32, 64)
ROUNDS = 5
"""Repetitions of each measurement."""
LONG_SECONDS = 0.05
"""A batch that takes longer ends the search: larger ones gain nothing more, and requests would wait for them."""
HANDOVER_SECONDS = 0.0005
"""What a batch costs a busy worker besides: its threads wait for a core, for the interpreter and for each other."""
GOOD_ENOUGH = 0.97
"""Share of the best rate that a smaller batch must reach to be preferred: it answers sooner."""


class Comparison(NamedTuple):
    images_per_second: dict[str, float]
    """Of each runtime that can be had here and is right."""
    failed: dict[str, str]
    """What is wrong with the others."""

    @property
    def fastest(self) -> str:
        return max(self.images_per_second, key=self.images_per_second.__getitem__)


def seconds_of(runtime: Runtime, images: Pixels, clock: Callable[[], float] = time.perf_counter) -> float:
    """How long ``runtime`` takes for one batch of ``images`` (N, H, W, 3)."""
    started = clock()
    runtime(images)
    return clock() - started


def images_per_second(runtime: Runtime, images: Pixels, clock: Callable[[], float] = time.perf_counter) -> float:
    """The rate of ``runtime`` on one batch of ``images`` (N, H, W, 3), by the median time."""
    return len(images) / float(np.median([seconds_of(runtime, images, clock) for _ in range(ROUNDS)]))


def compare(ensemble: Ensemble, threads: int = 1, names: Iterable[str] = (ONNX, ONNX_INT8)) -> Comparison:
    """Time the runtimes ``names`` on this machine; raises ``RuntimeUnavailableError`` where none is right."""
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
    return Comparison(rates, failed)


async def measure_batches(
    measure: Callable[[Pixels], Awaitable[float]], images: Pixels, until_idle: Callable[[], Awaitable[None]]
) -> dict[int, float]:
    """Seconds of a batch of each size of ``BATCHES`` made of ``images`` (N, H, W, 3), by ``measure``, when idle.

    The least of ``ROUNDS`` counts: what else the machine does only ever adds to it.
    """
    batches = {size: np.resize(images, (size, *images.shape[1:])) for size in BATCHES}
    least: dict[int, float] = {}
    for _ in range(ROUNDS):  # over all sizes each, so that a bad moment hits none of them in all rounds
        for size, batch in batches.items():
            if 2 * least.get(size // 2, 0) > LONG_SECONDS:
                break
            await until_idle()
            least[size] = min(least.get(size, math.inf), await measure(batch))
    return least


def best_batch(seconds: dict[int, float]) -> int:
    """The smallest batch whose images per second are as good as the best; ``seconds`` are those of one batch."""
    rates = {size: size / (taken + HANDOVER_SECONDS) for size, taken in seconds.items()}
    return min(size for size, rate in rates.items() if rate >= GOOD_ENOUGH * max(rates.values()))
