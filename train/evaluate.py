"""Measure an artifact on its test images, through the same code that serves.

    python -m train.evaluate model/pretrained SOURCE [--runtime torch --runtime onnx --runtime onnx-int8]
    python -m train.evaluate model/pretrained SOURCE --url http://localhost:3000

The first form prints, for every runtime, accuracy with a 95 % interval, recall per class, the confusion matrix, the
calibration error and the speed on one CPU core, and writes the figures into the artifact's card. The second sends the
test images to a running service, and only prints; set the environment variable CLASSIFIER_API_KEY if the service
requires a key. Test images are only for commands that, like this one, measure a finished artifact.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from client.errors import ClientError
from client.remote import Remote
from client.rows import Reply
from model.artifact import RUNTIMES, TORCH, Artifact, Labels, Outputs
from model.classifier import Classifier, Probabilities, calibrated
from model.gpus import cuda_devices
from model.runtimes import create
from model.tables import NAMED_CLASSES
from model.tuning import images_per_second
from train import command
from train.command import CommandError
from train.data import Data, Split, test_files
from train.measure import THREADS, load_own_data, run_runtime, write_figures
from train.metrics import accuracy_line, confusion_matrix, expected_calibration_error, proportion, reliability

BATCH = 100
PATIENCE_SECONDS = 60.0
"""Longest wait for a service that is overloaded or restarting."""
SET_LEVELS = (0.9, 0.95, 0.99)
SPEED_BATCH = 8
INTEGER_INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "i8mm", "asimddp")
"""Extensions of x86, then of ARM, the best first: the speed of INT8 differs several times between them."""


def figures(outputs: Outputs, split: Split, artifact: Artifact, runtime: str) -> dict[str, Any]:
    """The metrics of one runtime, as stored in the card."""
    config = artifact.config
    probabilities = calibrated(outputs, config.temperature)
    matrix = confusion_matrix(probabilities.argmax(axis=1), split.labels, len(config.classes))
    per_class = np.diag(matrix) / np.maximum(1, matrix.sum(axis=1))
    return {
        "images": len(split),
        **proportion(int(np.trace(matrix)), len(split)),
        "ece_raw": round(expected_calibration_error(calibrated(outputs, 1.0), split.labels), 4),
        "ece": round(expected_calibration_error(probabilities, split.labels), 4),
        "reliability": {
            name: values.round(4).tolist()
            for name, values in reliability(probabilities, split.labels)._asdict().items()
        },
        "prediction_sets": prediction_sets(probabilities, split.labels, artifact, runtime),
        "per_class": {name: round(float(share), 4) for name, share in zip(config.classes, per_class, strict=True)},
        "confusion": matrix.tolist(),
    }


def prediction_sets(
    probabilities: Probabilities, labels: Labels, artifact: Artifact, runtime: str
) -> dict[str, dict[str, float]]:
    """For each level, how often the prediction set holds the true class, and its mean size in classes."""
    classifier = Classifier(artifact.config, artifact.reference(runtime))
    result = {}
    for level in SET_LEVELS:
        sets = [classifier.prediction_set(row, level) for row in probabilities]
        result[str(level)] = {
            "coverage": round(float(np.mean([label in s for label, s in zip(labels.tolist(), sets, strict=True)])), 4),
            "size": round(float(np.mean([len(s) for s in sets])), 3),
        }
    return result


def evaluate(artifact: Artifact, data: Data, runtimes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures by runtime, on the test split of ``data``."""
    result = {}
    for name in runtimes:
        runtime = create(name, artifact, THREADS)
        outputs = run_runtime(runtime, data.test.images)
        result[name] = figures(outputs, data.test, artifact, name)
        result[name]["speed"] = {
            "images_per_s": round(images_per_second(create(name, artifact), data.test.images[:SPEED_BATCH])),
            "batch": SPEED_BATCH,
            **device(name),
        }
        print_report(name, result[name], artifact)
    return result


def device(runtime: str) -> dict[str, Any]:
    """The device that ``runtime`` uses here: a GPU if ``torch`` finds one, otherwise one CPU core."""
    if runtime == TORCH and cuda_devices():
        import torch

        return {"gpu": torch.cuda.get_device_name()}
    return {"threads": 1, "cpu": cpu_name()}


def cpu_name(cpuinfo: str | None = None) -> str:
    """The processor and its best integer instructions, as named in ``/proc/cpuinfo``."""
    if cpuinfo is None:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*: (.+)", cpuinfo, re.MULTILINE)
    able = re.search(r"^(?:flags|Features)\s*: (.+)", cpuinfo, re.MULTILINE)
    best = next((one for one in INTEGER_INSTRUCTIONS if able and one in able[1].split()), None)
    return (name[1] if name else platform.machine()) + (f" ({best})" if best else "")


def evaluate_service(artifact: Artifact, source: str, url: str) -> None:
    """Send the test images of ``source`` to the service at ``url`` and print its accuracy."""
    files = test_files(source)
    classes = list(artifact.config.classes)
    replies: list[Reply] = []
    try:
        service = Remote(url, PATIENCE_SECONDS)
        if (served := service.card().get("classes")) != classes:
            raise CommandError(f"{url}: serves classes {served}; expected {classes}")
        started = time.perf_counter()
        for start in tqdm(range(0, len(files), BATCH), desc=url, unit="batch", leave=False, disable=None):
            replies += service([content for _, content in files[start : start + BATCH]])
    except ClientError as error:
        raise CommandError(error) from None
    seconds = time.perf_counter() - started
    hits = sum(reply.get("class_name") == name for (name, _), reply in zip(files, replies, strict=True))
    line = accuracy_line({"images": len(files), **proportion(hits, len(files))})
    print(f"{url}, model {replies[0].get('model')}: {line}, {len(files) / seconds:.0f} images/s")


def print_report(name: str, metrics: dict[str, Any], artifact: Artifact) -> None:
    speed = metrics["speed"]
    where = speed.get("gpu", "one core")
    print(
        f"\n{name}: {accuracy_line(metrics)}, "
        f"calibration error {metrics['ece_raw']:.2%} raw, {metrics['ece']:.2%} at temperature "
        f"{artifact.config.temperature}, {speed['images_per_s']} images/s in batches of {SPEED_BATCH} on {where}"
    )
    for level, found in metrics["prediction_sets"].items():
        print(f"  prediction sets of {float(level):.0%}: coverage {found['coverage']:.2%}, {found['size']:.2f} classes")
    width = max(map(len, artifact.config.classes))
    recalls, confusion = list(metrics["per_class"].items()), metrics["confusion"]
    if len(recalls) > NAMED_CLASSES:
        print(f"  the {NAMED_CLASSES} lowest of {len(recalls)} classes; the card has all:")
        recalls, confusion = sorted(recalls, key=itemgetter(1))[:NAMED_CLASSES], [[]] * NAMED_CLASSES
    for (class_name, recall), counts in zip(recalls, confusion, strict=True):
        print(f"  {class_name:{width}} {recall:7.2%} ", *(f"{count:5}" for count in counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("source")
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="repeatable; all by default")
    parser.add_argument("--url", help="measure a running service instead")
    options = parser.parse_args()
    artifact = Artifact.load(options.artifact)
    if options.url:
        evaluate_service(artifact, options.source, options.url.rstrip("/"))
        return
    metrics = evaluate(artifact, load_own_data(artifact, options.source), options.runtime or artifact.runtimes)
    sealed = write_figures(artifact, metrics)
    validation = json.dumps(artifact.card["validation"])
    print(f"\n{options.artifact}: version {sealed.version}, figures written to its card", validation)


if __name__ == "__main__":
    command.run(main)
