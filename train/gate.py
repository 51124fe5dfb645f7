"""Is a new model at least as good as the one it replaces? Exit status 1 means no.

    python -m train.gate runs/NAME/artifact model/pretrained [--data SOURCE]

Accuracy and calibration come from the cards (written by `train.evaluate`); speed is measured here for both. If the base
has figures for corrupted images (`train.robustness`), so must the candidate: what a recipe without corruptions loses
shows nowhere else. Figures on different test images cannot be compared: a base trained on other data is measured again
on those of SOURCE, the candidate's data, corrupted ones included if its card has figures for them. The base may have
been trained on some of them, which makes the gate no easier to pass.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from model import runtimes
from model.artifact import ONNX, ONNX_INT8, Artifact
from model.tables import markdown
from model.tuning import seconds_of
from train.command import CommandError, run
from train.data import load
from train.evaluate import figures
from train.measure import THREADS, load_own_data, run_runtime
from train.metrics import Reliability, calibration_error_by_chance, int8_tolerance, tolerance, within
from train.robustness import IMAGES, robustness, sample

RUNTIME = ONNX_INT8
"""The runtime that serves on a CPU; accuracy and calibration are compared on it."""
ACCURACY_LOSS = 0.005
"""Or one and a half test images, if that is more."""
CALIBRATION_LOSS = 0.01
"""Or the calibration error expected by chance, if that is more, as it is with few test images."""
ROBUSTNESS_LOSS = 0.01
"""Loss allowed on corrupted images: larger than on clean ones, because they are fewer and chance moves it more."""
SLOWDOWN = 1.1
BATCH, ROUNDS = 32, 40

Row = tuple[str, float, float]
"""Name of a figure, by how much the new model is worse, and by how much it may be worse."""


def judge(new: dict[str, Any], old: dict[str, Any], slowdown: float) -> list[Row]:
    """The rows for the metrics of two cards."""
    for card, names in ((new, (RUNTIME, ONNX)), (old, (RUNTIME,))):
        if missing := [name for name in names if name not in card]:
            raise CommandError(f"a card has no figures of {' and '.join(missing)}; run train.evaluate first")
    int8_loss = new[ONNX]["accuracy"] - new[RUNTIME]["accuracy"]
    found, base, images = new[RUNTIME], old[RUNTIME], new[RUNTIME]["images"]
    by_chance = calibration_error_by_chance(Reliability.of(found))
    return [
        ("loss of accuracy", base["accuracy"] - found["accuracy"], tolerance(ACCURACY_LOSS, images)),
        *robustness_rows(new, old),
        ("loss of calibration (ECE)", found["ece"] - base["ece"], max(CALIBRATION_LOSS, by_chance)),
        ("accuracy lost by INT8", int8_loss, int8_tolerance(images)),
        ("time of a batch, new / old", slowdown, SLOWDOWN),
    ]


def robustness_rows(new: dict[str, Any], old: dict[str, Any]) -> list[Row]:
    """The row for corrupted images; none for a base without figures for them.

    Raises ``CommandError`` if the two cards were measured on different images.
    """
    if "robustness" not in old:
        return []
    if "robustness" not in new:
        raise CommandError("the new card has no figures of corrupted images, as the old one has; run train.robustness")
    found, base = new["robustness"], old["robustness"]
    for name in ("runtime", "images", "seed"):
        if found[name] != base[name]:
            raise CommandError(
                f"corrupted images: {name} {found[name]} in the new card; expected {base[name]}, as in the old one; "
                "run train.robustness"
            )
    return [("loss of accuracy on corrupted images", base["accuracy"] - found["accuracy"], ROBUSTNESS_LOSS)]


def comparable(new: Artifact, old: Artifact, source: str | None) -> dict[str, Any]:
    """The metrics of ``old`` on the test images of ``new``: those of its card, or measured on ``source``."""
    if old.card["training"]["data_sha256"] == new.card["training"]["data_sha256"]:
        return old.metrics
    if source is None:
        raise CommandError(f"{new.path} and {old.path} are of different data; expected --data, that of the first")
    if old.config.classes != new.config.classes:
        raise CommandError(f"{old.path}: classes {list(old.config.classes)}; expected {list(new.config.classes)}")
    data = load_own_data(new, source)
    if old.config.input_size != new.config.input_size:
        data = load(source, old.config.input_size)
    print(f"{old.path} was trained on other data: it is measured on the test images of {source}")
    runtime = runtimes.create(RUNTIME, old, THREADS)
    metrics = {RUNTIME: figures(run_runtime(runtime, data.test.images), data.test, old, RUNTIME)}
    if "robustness" in old.metrics:
        metrics["robustness"] = robustness(runtime, sample(data.test, IMAGES))
    return metrics


def slowdown(new: Artifact, old: Artifact) -> float:
    """Processor time of the fastest batch, new over old, measured in turns so that other load hardly matters."""
    new_engine, old_engine = (runtimes.create(RUNTIME, artifact) for artifact in (new, old))
    new_images, old_images = (np.zeros((BATCH, *a.config.input_size, 3), np.uint8) for a in (new, old))
    new_seconds, old_seconds = [], []
    for _ in range(ROUNDS):
        new_seconds.append(seconds_of(new_engine, new_images, time.process_time))
        old_seconds.append(seconds_of(old_engine, old_images, time.process_time))
    return min(new_seconds) / min(old_seconds)


def table(name: str, rows: list[Row]) -> str:
    cells = (
        (what, f"{found:.4f}", f"{limit:.4g}", "yes" if within(found, limit) else "NO") for what, found, limit in rows
    )
    return markdown((name, "found", "allowed", "passes"), cells) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--data", metavar="SOURCE", help="data of the candidate, for a base of other data")
    parser.add_argument("--summary", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    new, old = Artifact.load(arguments.candidate), Artifact.load(arguments.base)
    rows = judge(new.metrics, comparable(new, old, arguments.data), slowdown(new, old))
    judged = table(new.config.name, rows)
    print(judged)
    if arguments.summary:
        with arguments.summary.open("a") as file:
            file.write(judged)
    if not all(within(found, limit) for _, found, limit in rows):
        raise CommandError("the new model is worse than the old one")


if __name__ == "__main__":
    run(main)
