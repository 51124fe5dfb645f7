"""BentoML as its documentation shows it: one batchable service, and an API service that depends on a model service."""

from __future__ import annotations

from typing import Any

import bentoml
import numpy as np
from PIL.Image import Image

from tests.benchmark.peers import common

BATCHABLE: dict[str, Any] = {"batchable": True, "max_batch_size": common.MAX_BATCH, "max_latency_ms": 1000}
QUIET = {"access": {"enabled": False}}


def pixels(image: Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((common.WIDTH, common.HEIGHT)))


@bentoml.service(workers=common.WORKERS, logging=QUIET)
class Single:
    @bentoml.api(route="/classify", **BATCHABLE)
    def classify(self, images: list[Image]) -> list[dict[str, Any]]:
        return common.infer(np.stack([pixels(image) for image in images]))


@bentoml.service(workers=1, logging=QUIET)
class Model:
    @bentoml.api(**BATCHABLE)
    def infer(self, images: np.ndarray) -> list[dict[str, Any]]:
        return common.infer(images)


@bentoml.service(workers=common.WORKERS, logging=QUIET)
class Depends:
    model = bentoml.depends(Model)

    @bentoml.api(route="/classify")
    async def classify(self, image: Image) -> dict[str, Any]:
        (reply,) = await self.model.to_async.infer(pixels(image)[None])
        return reply
