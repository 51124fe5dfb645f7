"""LitServe: one worker per core, its own batching. ``python -m tests.benchmark.peers.litserve_app PORT``"""

import sys
from typing import Any

import litserve
import numpy as np

from tests.benchmark.peers import common


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        common.session()

    def decode_request(self, request) -> np.ndarray:  # noqa: ANN001 with an annotation LitServe would not pass the form
        return common.decode(request["image"].file.read())

    def predict(self, images: list[np.ndarray]) -> list[dict[str, Any]]:
        return common.infer(np.stack(images))

    def unbatch(self, replies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return replies

    def encode_response(self, reply: dict[str, Any]) -> dict[str, Any]:
        return reply


if __name__ == "__main__":
    api = Classifier(max_batch_size=common.MAX_BATCH, batch_timeout=0.001, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=common.WORKERS, fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
