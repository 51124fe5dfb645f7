"""Ray Serve: one replica per core, its own batching. ``python -m tests.benchmark.peers.rayserve_app PORT``"""

from __future__ import annotations

import signal
import sys
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request

from tests.benchmark.peers import common

QUIET = {"enable_access_log": False}


@serve.deployment(
    num_replicas=common.WORKERS,
    max_ongoing_requests=256,
    ray_actor_options={"num_cpus": 0.5},
    logging_config=QUIET,
)
class Classifier:
    def __init__(self) -> None:
        common.session()

    @serve.batch(max_batch_size=common.MAX_BATCH, batch_wait_timeout_s=0.001)
    async def infer(self, images: list[np.ndarray]) -> list[dict[str, Any]]:
        return common.infer(np.stack(images))

    async def __call__(self, request: Request) -> dict[str, Any]:
        form = await request.form()
        return await self.infer(common.decode(await form["image"].read()))


if __name__ == "__main__":
    ray.init(include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config=QUIET)
    serve.run(Classifier.bind(), route_prefix="/classify")
    signal.pause()
