"""Golden predictions of the shipped artifact for the pictures in ``tests/images``, and limits on its figures.

        python -m tests.golden            # after shipping another model for the same data: writes new predictions
        python -m tests.golden SOURCE     # after shipping a model for other data: also writes new pictures and limits

The pictures are test images of SOURCE, re-encoded as JPEG, each named after its class. The committed ones come from
CIFAR-10 (Krizhevsky, 2009). The page at ``/`` offers them as samples. The limits stay unchanged when a model is
retrained, so that a worse one is noticed before it ships.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from model.artifact import CONFIG, ONNX, ONNX_INT8, SHIPPED, Artifact
from model.classifier import Classifier, Prediction
from model.config import ModelConfig
from model.preprocess import Pixels, preprocess
from model.runtimes import create
from serving.static import FOLDER as PAGE
from train import command
from train.command import CommandError
from train.gate import CALIBRATION_LOSS
from train.measure import load_own_data, run_runtime

FOLDER = Path(__file__).parent / "images"
IMAGES = sorted(FOLDER.glob("*.jpg"))
TYPICAL = IMAGES[len(IMAGES) // 2]
"""One of them, for tests that need a single image."""
SHIPPED_NAME = ModelConfig.load(SHIPPED / CONFIG).name
GOLDEN = FOLDER / "golden.json"
SAMPLES = PAGE / "samples"
MOST_SAMPLES = 20
"""The page shows every sample it has: 20 are enough even with a thousand classes."""
JPEG_QUALITY = 95
SPARE_BYTES = 1.2
"""A later artifact may be this many times larger."""


def predict(artifact: Artifact, runtime_name: str) -> dict[str, Prediction]:
    """Predictions of one runtime for every picture, by the picture's file name."""
    pictures = {path.stem: path.read_bytes() for path in sorted(FOLDER.glob("*.jpg"))}
    return dict(zip(pictures, judge(artifact, runtime_name, list(pictures.values())), strict=True))


def judge(artifact: Artifact, runtime_name: str, images: list[bytes]) -> list[Prediction]:
    """Predictions for image files."""
    pixels = np.stack([preprocess(image, artifact.config.input_size) for image in images])
    classifier = Classifier(artifact.config, artifact.reference(runtime_name))
    return classifier(run_runtime(create(runtime_name, artifact), pixels))


def size(artifact: Artifact) -> int:
    """Bytes of all files of the artifact."""
    return sum(path.stat().st_size for path in artifact.path.iterdir())


def choose(artifact: Artifact, source: str) -> None:
    """One test image per class: the median by confidence of those that both formats get right and find familiar."""
    data = load_own_data(artifact, source)
    images = [encode(image) for image in data.test.images]
    by_format = [judge(artifact, name, images) for name in (ONNX, ONNX_INT8)]
    chosen = {}
    for index, name in enumerate(artifact.config.classes):
        told = [
            (quantised.confidence, image)
            for full, quantised, label, image in zip(*by_format, data.test.labels, images, strict=True)
            if label == index == full.class_index == quantised.class_index
            and full.in_distribution
            and quantised.in_distribution
        ]
        if told:
            chosen[f"{name}.jpg"] = sorted(told)[len(told) // 2][1]
        else:
            print(f"no picture of {name!r}: the model tells none of its test images", file=sys.stderr)
    if not chosen:
        raise CommandError(f"{artifact.path}: expected a model that tells some of the test images of {source}")
    for path in FOLDER.glob("*.jpg"):
        path.unlink()
    for file, image in chosen.items():
        (FOLDER / file).write_bytes(image)


def offer() -> None:
    """Copy the pictures to the samples of the page."""
    SAMPLES.mkdir(exist_ok=True)
    for path in SAMPLES.iterdir():
        path.unlink()
    for path in sorted(FOLDER.glob("*.jpg"))[:MOST_SAMPLES]:
        shutil.copy(path, SAMPLES)


def encode(image: Pixels) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def limits(artifact: Artifact) -> Iterator[tuple[str, Any]]:
    """Limits for later models, derived from this model's figures."""
    fp32 = artifact.card["metrics"][ONNX]
    yield "images", fp32["images"]
    yield "accuracy", fp32["accuracy_95"][0]
    yield "ece", round(fp32["ece"] + CALIBRATION_LOSS, 4)
    yield "bytes", round(SPARE_BYTES * size(artifact))


def main() -> None:
    artifact, sources = Artifact.load(SHIPPED), sys.argv[1:]
    for source in sources:
        choose(artifact, source)
    offer()
    kept = dict(limits(artifact)) if sources else json.loads(GOLDEN.read_text())["limits"]
    golden = {name: p.probabilities.round(4).tolist() for name, p in predict(artifact, ONNX).items()}
    document = {"version": artifact.version, "limits": kept, "probabilities": golden}
    GOLDEN.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main)
