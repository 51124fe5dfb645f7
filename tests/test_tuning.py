"""What is made of measurements."""

from __future__ import annotations

import numpy as np
import pytest

from model.preprocess import Pixels
from model.tuning import best_batch, images_per_second


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({4: 100.0, 8: 300.0, 16: 200.0}, 8),
        ({4: 295.0, 8: 300.0, 16: 301.0}, 4),  # a smaller batch answers sooner
        ({4: 100.0, 64: 900.0}, 64),
    ],
)
def test_the_smallest_of_the_best_batches_is_taken(rates: dict[int, float], best: int) -> None:
    assert best_batch(rates) == best


def test_a_rate_is_images_over_the_median_time() -> None:
    class Engine:
        """Takes 0.02 s, and once half a second, of a clock that only it moves."""

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
