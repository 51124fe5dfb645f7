"""A second model that sees what the served one sees: its disagreements are counted, its answers never sent."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from model.artifact import Outputs
from model.classifier import verdicts
from model.preprocess import Pixels
from model.runtimes import Runtime
from serving import metrics

logger = logging.getLogger("classifier.shadow")
LOWEST_PRIORITY = 19


class Shadowed:
    """An engine that shows every batch to a shadow engine too, as long as that one keeps up.

    The shadow computes one batch at a time, in a thread of the lowest priority. Batches that arrive meanwhile are
    counted as ``dropped``, so that the served engine never waits for it.
    """

    def __init__(self, engine: Runtime, shadow: Runtime) -> None:
        self._engine, self._shadow = engine, shadow
        self._thread = ThreadPoolExecutor(1, "shadow", initializer=_yield_to_others)
        self._comparison: Future[None] | None = None

    def __call__(self, images: Pixels) -> Outputs:
        outputs = self._engine(images)
        if self._comparison is None or self._comparison.done():
            self._comparison = self._thread.submit(self._compare, images, outputs)
        else:
            metrics.SHADOW_IMAGES.labels("dropped").inc(len(images))
        return outputs

    def _compare(self, images: Pixels, outputs: Outputs) -> None:
        try:
            shadowed = self._shadow(images)
        except Exception:
            logger.exception("the shadow failed")
            metrics.SHADOW_IMAGES.labels("failed").inc(len(images))
            return
        same = int((verdicts(shadowed) == verdicts(outputs)).sum())
        metrics.SHADOW_IMAGES.labels("same").inc(same)
        metrics.SHADOW_IMAGES.labels("different").inc(len(images) - same)


def _yield_to_others() -> None:
    # On Linux each thread has its own priority.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
