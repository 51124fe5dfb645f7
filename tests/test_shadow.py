"""What is counted of a shadow model, with engines of fixed outputs. On a server: test_several_models.py."""

from __future__ import annotations

import threading

import numpy as np

from model.artifact import Evidence, Outputs
from model.preprocess import Pixels
from serving import metrics
from serving.shadow import Shadowed

IMAGES = np.zeros((3, 1, 1, 3), np.uint8)
SERVED = np.array([[2, 1, 0], [1, 2, 0], [2, 1, 0]], np.float32)
"""Two classes, and the familiarity; the shadow has another verdict on the last image."""
OTHER = np.array([[3, 1, 0], [1, 3, 0], [1, 3, 0]], np.float32)
OUTCOMES = ("same", "different", "dropped", "failed")


class Fixed:
    """An engine with the same outputs for every batch, once it is ``free``; without any, it fails."""

    name = "fixed"

    def __init__(self, outputs: Outputs | None) -> None:
        self._outputs, self.free = outputs, threading.Event()
        self.free.set()

    def __call__(self, images: Pixels) -> Outputs:
        assert self.free.wait(10)
        if self._outputs is None:
            raise RuntimeError("the shadow broke")
        return self._outputs

    def evidence(self, images: Pixels) -> Evidence:
        raise NotImplementedError


def counts() -> dict[str, float]:
    return {name: metrics.SHADOW_IMAGES.labels(name)._value.get() for name in OUTCOMES}


def counted(shadow: Fixed, batches: int) -> dict[str, float]:
    """By how much each outcome is counted for some batches that come while the shadow is busy with the first."""
    before, shadowed = counts(), Shadowed(Fixed(SERVED), shadow)
    shadow.free.clear()
    for _ in range(batches):
        assert shadowed(IMAGES) is SERVED
    shadow.free.set()
    shadowed._thread.shutdown()
    return {name: count - before[name] for name, count in counts().items() if count > before[name]}


def test_verdicts_are_compared_and_only_the_served_ones_returned() -> None:
    assert counted(Fixed(OTHER), batches=1) == {"same": 2, "different": 1}


def test_batches_that_come_while_the_shadow_is_busy_are_dropped() -> None:
    assert counted(Fixed(SERVED), batches=3) == {"same": 3, "dropped": 6}


def test_a_shadow_that_fails_is_counted_and_fails_no_request() -> None:
    assert counted(Fixed(None), batches=1) == {"failed": 3}
