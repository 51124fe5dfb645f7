"""Measure an artifact on its test images, through the very code that serves.

    python -m train.evaluate model/pretrained SOURCE [--runtime torch --runtime onnx --runtime onnx-int8]

Prints accuracy with a 95 % interval, each class, the confusion matrix and the calibration error, for every runtime, and
writes the figures into the artifact's card. This is the only command that looks at test images.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model.artifact import Artifact, Logits, seal
from model.classifier import Probabilities, calibrated
from model.preprocess import Pixels
from model.runtimes import RUNTIMES, Runtime, create
from train import command
from train.data import Data, DataError, Split, load

Labels = NDArray[np.int64]
BATCH = 100
ECE_BINS = 15
Z_95 = 1.959964


def accuracy_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927, JASA 22:209)."""
    share = hits / count
    centre = share + Z_95**2 / (2 * count)
    spread = Z_95 * math.sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    scale = 1 + Z_95**2 / count
    return (centre - spread) / scale, (centre + spread) / scale


def expected_calibration_error(probabilities: Probabilities, labels: Labels, bins: int = ECE_BINS) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Naeini et al., 2015; Guo et al., 2017)."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(float((right[index == b] - confidence[index == b]).sum())) for b in range(bins)]
    return sum(gaps) / len(labels)


def confusion_matrix(verdicts: Labels, labels: Labels, classes: int) -> NDArray[np.int64]:
    """(K, K) counts; rows are the true classes, columns the verdicts."""
    return np.bincount(labels * classes + verdicts, minlength=classes**2).reshape(classes, classes)


def run(runtime: Runtime, images: Pixels) -> Logits:
    """(N, K) logits of all ``images``, in batches, under a progress bar."""
    starts = tqdm(range(0, len(images), BATCH), desc=runtime.name, unit="batch", leave=False, disable=None)
    return np.concatenate([runtime(images[start : start + BATCH]) for start in starts])


def figures(logits: Logits, split: Split, artifact: Artifact) -> dict[str, Any]:
    """The metrics of one runtime as they stand in the card."""
    config = artifact.config
    verdicts = logits.argmax(axis=1)
    matrix = confusion_matrix(verdicts, split.labels, len(config.classes))
    hits = int(np.trace(matrix))
    low, high = accuracy_interval(hits, len(split))
    per_class = np.diag(matrix) / np.maximum(1, matrix.sum(axis=1))
    return {
        "images": len(split),
        "accuracy": round(hits / len(split), 4),
        "accuracy_95": [round(low, 4), round(high, 4)],
        "ece_raw": round(expected_calibration_error(calibrated(logits, 1.0), split.labels), 4),
        "ece": round(expected_calibration_error(calibrated(logits, config.temperature), split.labels), 4),
        "per_class": {name: round(float(share), 4) for name, share in zip(config.classes, per_class, strict=True)},
        "confusion": matrix.tolist(),
    }


def evaluate(artifact: Artifact, data: Data, runtimes: list[str]) -> dict[str, dict[str, Any]]:
    """Figures by runtime, on the test split of ``data``."""
    if data.classes != artifact.config.classes:
        raise DataError(f"{data.source}: classes {list(data.classes)}; expected {list(artifact.config.classes)}")
    result = {}
    for name in runtimes:
        runtime = create(name, artifact, threads=2)
        started = time.perf_counter()
        logits = run(runtime, data.test.images)
        seconds = time.perf_counter() - started
        result[name] = figures(logits, data.test, artifact)
        print_report(name, result[name], artifact, seconds)
    return result


def print_report(name: str, metrics: dict[str, Any], artifact: Artifact, seconds: float) -> None:
    low, high = metrics["accuracy_95"]
    print(
        f"\n{name}: accuracy {metrics['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}, n={metrics['images']}), "
        f"calibration error {metrics['ece_raw']:.2%} raw, {metrics['ece']:.2%} at temperature "
        f"{artifact.config.temperature}, {metrics['images'] / seconds:.0f} images/s"
    )
    width = max(map(len, artifact.config.classes))
    for index, (class_name, share) in enumerate(metrics["per_class"].items()):
        counts = " ".join(f"{count:5}" for count in metrics["confusion"][index])
        print(f"  {class_name:{width}} {share:7.2%}  {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("source")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="repeatable; all by default")
    options = parser.parse_args()
    artifact = Artifact.load(options.artifact)
    metrics = evaluate(artifact, load(options.source, artifact.config.input_size), options.runtime or list(RUNTIMES))
    card = {**artifact.card, "metrics": {**artifact.card.get("metrics", {}), **metrics}}
    sealed = seal(options.artifact, card)
    print(
        f"\n{options.artifact}: version {sealed.version}, figures written to its card", json.dumps(card["validation"])
    )


if __name__ == "__main__":
    command.run(main)
