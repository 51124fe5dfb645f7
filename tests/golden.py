"""The predictions that the shipped artifact makes of the pictures in ``tests/images``.

    python -m tests.golden        # write them anew, after shipping another model

The pictures are CIFAR-10 test images (Krizhevsky, 2009), re-encoded as JPEG; each is named after its class.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from model import store
from model.artifact import Artifact
from model.classifier import Classifier, Prediction
from model.preprocess import preprocess
from model.runtimes import ONNX, ONNX_INT8, create

IMAGES = sorted((Path(__file__).parent / "images").glob("*.jpg"))
GOLDEN = Path(__file__).parent / "images" / "golden.json"


def predict(artifact: Artifact, runtime_name: str) -> dict[str, Prediction]:
    """Predictions of every picture by one runtime, by the picture's name."""
    pixels = np.stack([preprocess(path.read_bytes(), artifact.config.input_size) for path in IMAGES])
    classifier = Classifier(artifact.config, artifact.reference(runtime_name == ONNX_INT8))
    outputs = create(runtime_name, artifact)(pixels)
    return dict(zip((path.stem for path in IMAGES), classifier(outputs), strict=True))


def main() -> None:
    artifact = Artifact.load(store.SHIPPED)
    golden = {name: p.probabilities.round(4).tolist() for name, p in predict(artifact, ONNX).items()}
    GOLDEN.write_text(json.dumps({"version": artifact.version, "probabilities": golden}, indent=1) + "\n")


if __name__ == "__main__":
    main()
