"""What all peers share: OpenCV decodes and ONNX Runtime infers, in one worker per core.

Only the framework differs, except for large JPEGs: the bundle decodes them at a fraction of their size
(``model/preprocess.py``), the peers at full size, as anyone would without special code. BentoML itself decodes with
Pillow.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import orjson

MODEL = Path(os.environ["MODEL_DIRECTORY"])
CONFIG = json.loads((MODEL / "config.json").read_text())
HEIGHT, WIDTH = CONFIG["input_size"]
MAX_BATCH = 32
WORKERS = len(os.sched_getaffinity(0))
cv2.setNumThreads(1)


@cache
def session() -> onnxruntime.InferenceSession:
    """Created on first use, so that a forking server forks first. One thread, because there is one process per core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(MODEL / "model.int8.onnx", options, providers=["CPUExecutionProvider"])


def decode(data: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise ValueError("not an image")
    return cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)


def infer(images: np.ndarray) -> list[dict[str, Any]]:
    """Classify (N, H, W, 3) uint8 pixels; one reply per image."""
    (outputs,) = session().run(["outputs"], {"images": images})
    scaled = outputs[:, : len(CONFIG["classes"])] / CONFIG["temperature"]
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return [_reply(row) for row in exponentials / exponentials.sum(axis=1, keepdims=True)]


def _reply(probabilities: np.ndarray) -> dict[str, Any]:
    best = int(probabilities.argmax())
    return {
        "predicted_class": best,
        "class_name": CONFIG["classes"][best],
        "confidence": round(float(probabilities[best]), 6),
        "all_probabilities": {str(i): round(p, 6) for i, p in enumerate(probabilities.tolist())},
    }


def classify(images: list[bytes]) -> list[dict[str, Any]]:
    """Classify image files in batches of at most ``MAX_BATCH``; one reply per image."""
    pixels = np.stack([decode(image) for image in images])
    return [reply for i in range(0, len(pixels), MAX_BATCH) for reply in infer(pixels[i : i + MAX_BATCH])]


def classify_json(images: list[bytes]) -> bytes:
    return orjson.dumps({"results": classify(images)})
