"""What is made of measurements."""

from __future__ import annotations

import numpy as np
import pytest

from model.preprocess import Pixels
from model.tuning import best_batch, images_per_second


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({4: 0.04, 8: 0.03, 16: 0.08}, 8),
        ({4: 0.0400, 8: 0.0795, 16: 0.158}, 4),  # a smaller batch answers sooner
        ({4: 0.04, 64: 0.07}, 64),
        ({4: 0.0010, 8: 0.0020, 16: 0.0040}, 16),  # of what takes no time, many together: handing over takes some
    ],
)
def test_the_smallest_of_the_best_batches_is_taken(seconds: dict[int, float], best: int) -> None:
    assert best_batch(seconds) == best


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
