"""Decisions derived from measured batch times."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest

from model.preprocess import Pixels
from model.tuning import BATCHES, LONG_SECONDS, ROUNDS, best_batch, images_per_second, measure_batches


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({4: 0.04, 8: 0.03, 16: 0.08}, 8),
        ({4: 0.0400, 8: 0.0795, 16: 0.158}, 4),  # a smaller batch answers sooner
        ({4: 0.04, 64: 0.07}, 64),
        ({4: 0.0010, 8: 0.0020, 16: 0.0040}, 16),  # if computing takes almost no time, the largest
    ],
)
def test_the_smallest_of_the_best_batches_is_chosen(seconds: dict[int, float], best: int) -> None:
    assert best_batch(seconds) == best


def test_a_rate_is_the_batch_size_over_the_median_time() -> None:
    class Engine:
        """Takes 0.02 s, and half a second once, on a clock that only it advances."""

        name = "fake"
        calls, now = 0, 0.0

        def __call__(self, images: Pixels) -> np.ndarray:
            self.calls += 1
            self.now += 0.5 if self.calls == 2 else 0.02
            return np.zeros((len(images), 3), np.float32)

        def evidence(self, images: Pixels) -> np.ndarray:
            raise NotImplementedError

    engine = Engine()
    assert images_per_second(engine, np.zeros((8, 4, 4, 3), np.uint8), lambda: engine.now) == pytest.approx(400)


def test_batches_are_measured_while_idle_and_the_least_time_counts() -> None:
    """The engine's first batch of 8 meets a bad moment, and its batches of 32 and more would take long."""
    measured: Counter[int] = Counter()
    idle = False

    async def until_idle() -> None:
        nonlocal idle
        idle = True

    async def measure(images: Pixels) -> float:
        nonlocal idle
        assert idle, "requests come first"
        idle = False
        assert set(map(int, images[:, 0, 0, 0])) == {1, 2, 3}, "of all images that there are"
        measured[len(images)] += 1
        seconds_per_image = LONG_SECONDS / 20
        return 9.0 if measured == {4: 1, 8: 1} else len(images) * seconds_per_image

    images = np.tile(np.array([1, 2, 3], np.uint8).reshape(3, 1, 1, 1), (1, 4, 4, 3))
    seconds = asyncio.run(measure_batches(measure, images, until_idle))
    assert seconds == pytest.approx({size: size * LONG_SECONDS / 20 for size in (4, 8, 16)})
    assert measured == {4: ROUNDS, 8: ROUNDS, 16: ROUNDS - 1}, "not 16 after a bad moment of 8"
    assert max(BATCHES) > 16
