"""Is a new model at least as good as the one it replaces? Exit status 1 says no.

    python -m train.gate runs/NAME/artifact model/pretrained

Accuracy and calibration come from the cards (`train.evaluate` writes them), speed is measured here on both.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from model import runtimes
from model.artifact import Artifact
from train.command import CommandError, run

RUNTIME = runtimes.ONNX_INT8
"""What is served on a CPU; accuracy and calibration are judged on it."""
ACCURACY_LOSS = 0.005
CALIBRATION_LOSS = 0.01
INT8_LOSS = 0.003
SLOWDOWN = 1.1
BATCH, ROUNDS = 32, 40


def judge(new: dict[str, Any], old: dict[str, Any], slowdown: float) -> list[tuple[str, float, float]]:
    """What is compared, by how much the new one is worse, and how much worse it may be."""
    return [
        ("loss of accuracy", old[RUNTIME]["accuracy"] - new[RUNTIME]["accuracy"], ACCURACY_LOSS),
        ("loss of calibration (ECE)", new[RUNTIME]["ece"] - old[RUNTIME]["ece"], CALIBRATION_LOSS),
        ("accuracy lost by INT8", new[runtimes.ONNX]["accuracy"] - new[RUNTIME]["accuracy"], INT8_LOSS),
        ("time of a batch, new / old", slowdown, SLOWDOWN),
    ]


def slowdown(new: Artifact, old: Artifact) -> float:
    """Ratio of the processor times of the fastest batches, measured in turns: a busy machine does not count."""
    times: dict[int, list[float]] = {0: [], 1: []}
    engines = [runtimes.create(RUNTIME, artifact, 1, 0) for artifact in (new, old)]
    images = [np.zeros((BATCH, *a.config.input_size, 3), np.uint8) for a in (new, old)]
    for _ in range(ROUNDS):
        for which in (0, 1):
            started = time.process_time()
            engines[which](images[which])
            times[which].append(time.process_time() - started)
    return min(times[0]) / min(times[1])


def table(rows: list[tuple[str, float, float]]) -> str:
    lines = [f"| {what} | {found:.4f} | {limit} | {'yes' if found <= limit else 'NO'} |" for what, found, limit in rows]
    return "\n".join(["| | found | allowed | passes |", "| --- | --- | --- | --- |", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--summary", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    new, old = Artifact.load(arguments.candidate), Artifact.load(arguments.base)
    if not (new.card.get("metrics") and old.card.get("metrics")):
        raise CommandError("a card has no metrics; run train.evaluate first")
    rows = judge(new.card["metrics"], old.card["metrics"], slowdown(new, old))
    print(table(rows))
    if arguments.summary:
        with arguments.summary.open("a") as file:
            file.write(table(rows))
    if any(found > limit for _, found, limit in rows):
        raise CommandError("the new model is worse than the old one")


if __name__ == "__main__":
    run(main)
