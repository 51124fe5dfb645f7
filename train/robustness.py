"""Measure an artifact on corrupted test images, and on photographs like those that users send.

    python -m train.robustness ARTIFACT SOURCE [--images 2000] [--runtime onnx-int8] [--photos PHOTOGRAPHS]

A seeded sample of the test images, the same share of each class, goes through every corruption of
``train.corruptions`` at five severities. PHOTOGRAPHS is a folder or tar archive of ``<class>/*``, with images of any
size; folders with other names are ignored. The photographs go through the service's preprocessing, and must never have
been trained on. The figures are written into the card.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model.artifact import RUNTIMES, Artifact
from model.classifier import verdicts
from model.preprocess import Pixels
from model.runtimes import Runtime, create
from model.tables import with_interval
from train import command
from train.command import CommandError
from train.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from train.data import Split, in_batches, read_photos
from train.measure import THREADS, load_own_data, run_runtime, write_figures
from train.metrics import Z_95, accuracy_interval, accuracy_line, proportion
from train.splits import stratified

IMAGES = 2000
SEED = 0
BATCH = 250

Hits = NDArray[np.bool_]


def sample(split: Split, images: int) -> Split:
    """About ``images`` images of ``split``, the same share of each class, always the same ones."""
    if images >= len(split):
        return split
    chosen = stratified(split.labels.tolist(), images / len(split))
    return Split(split.images[chosen], split.labels[chosen])


def corrupted(images: Pixels, name: str, severity: int) -> Pixels:
    """``corrupt`` in batches, to save memory; its random numbers depend only on the corruption and its severity."""
    rng = np.random.default_rng([SEED, list(CORRUPTIONS).index(name), severity])
    return np.concatenate([corrupt(images[batch], name, severity, rng) for batch in in_batches(images, BATCH)])


def robustness(runtime: Runtime, split: Split) -> dict[str, Any]:
    """The figures of ``runtime`` on corrupted images of ``split``, as stored in the card."""
    hits: dict[str, Hits] = {}
    for name in tqdm(CORRUPTIONS, unit="corruption", leave=False, disable=None):
        hits[name] = np.stack(
            [_hits(runtime, corrupted(split.images, name, severity), split) for severity in SEVERITIES]
        )
    families: dict[str, list[str]] = {}
    for name, corruption in CORRUPTIONS.items():
        families.setdefault(corruption.family, []).append(name)
    by_family = {family: np.mean([hits[name] for name in names], axis=0) for family, names in families.items()}
    benchmark = [hits[name] for name, corruption in CORRUPTIONS.items() if not corruption.extra]
    return {
        "runtime": runtime.name,
        "images": len(split),
        "seed": SEED,
        "clean": proportion(int(_hits(runtime, split.images, split).sum()), len(split)),
        **_mean(np.mean(list(by_family.values()), axis=0)),
        "benchmark_15": _mean(np.mean(benchmark, axis=0)),
        "families": {
            family: {**_mean(scores), "by_severity": scores.mean(axis=1).round(4).tolist()}
            for family, scores in by_family.items()
        },
        "corruptions": {
            name: {"family": CORRUPTIONS[name].family, "by_severity": of_one.mean(axis=1).round(4).tolist()}
            for name, of_one in hits.items()
        },
    }


def _hits(runtime: Runtime, images: Pixels, split: Split) -> Hits:
    return np.asarray(verdicts(run_runtime(runtime, images)) == split.labels)


def _mean(scores: NDArray[Any]) -> dict[str, Any]:
    """Mean of (severities, N) ``scores`` and its 95 % interval; the versions of an image count as one observation."""
    by_image = scores.mean(axis=0)
    mean, error = float(by_image.mean()), float(by_image.std(ddof=1)) / math.sqrt(len(by_image))
    if error:
        low, high = max(0.0, mean - Z_95 * error), min(1.0, mean + Z_95 * error)
    else:  # a standard error of zero, such as when all are right, estimates nothing
        low, high = accuracy_interval(mean * len(by_image), len(by_image))
    return {"accuracy": round(mean, 4), "accuracy_95": [round(low, 4), round(high, 4)]}


def photographs(runtime: Runtime, artifact: Artifact, source: Path) -> dict[str, Any]:
    """The figures of ``runtime`` on the images of ``source`` in folders named after a class."""
    config = artifact.config
    photos = read_photos(source, config.input_size, lambda folder: folder in config.classes)
    if not photos.images:
        raise CommandError(f"{source}: no readable image in a folder named after a class, {', '.join(config.classes)}")
    labels = [config.classes.index(folder) for folder in photos.folders]
    right = verdicts(run_runtime(runtime, np.stack(photos.images))) == labels
    counts, hits = Counter(labels), Counter(np.asarray(labels)[right].tolist())
    return {
        "runtime": runtime.name,
        "source": source.name,
        "images": len(labels),
        "unreadable": photos.unreadable,
        "of_other_folders": photos.of_other_folders,
        **proportion(sum(hits.values()), len(labels)),
        "per_class": {
            config.classes[index]: {"images": counts[index], **proportion(hits[index], counts[index])}
            for index in sorted(counts)
        },
    }


def print_robustness(metrics: dict[str, Any]) -> None:
    print(f"{metrics['runtime']}, {metrics['images']} images; mean over the families: {with_interval(metrics)}")
    clean, fifteen = (with_interval(metrics[name]) for name in ("clean", "benchmark_15"))
    print(f"  clean {clean}; the fifteen of the benchmark {fifteen}")
    for family, figures in metrics["families"].items():
        print(f"  {family:22} {with_interval(figures)}")
        for name, one in metrics["corruptions"].items():
            if one["family"] == family:
                print(f"    {name:20} " + " ".join(f"{share:6.1%}" for share in one["by_severity"]))


def print_photographs(metrics: dict[str, Any]) -> None:
    print(f"photographs of {metrics['source']}: {accuracy_line(metrics)}; {metrics['unreadable']} unreadable")
    for name, figures in metrics["per_class"].items():
        print(f"  {name:12} {figures['accuracy']:7.2%} of {figures['images']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("source")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"test images to corrupt; default {IMAGES}")
    parser.add_argument("--runtime", choices=RUNTIMES, help="by default the one that serves on a CPU")
    parser.add_argument("--photos", type=Path, metavar="PHOTOGRAPHS", help="folder or tar archive of <class>/*")
    options = parser.parse_args()
    if options.images < 1:
        raise CommandError(f"--images {options.images}; expected at least 1")
    artifact = Artifact.load(options.artifact)
    data = load_own_data(artifact, options.source)
    runtime = create(options.runtime or artifact.cpu_runtime, artifact, THREADS)
    # The photographs first, so that errors in them show before the long part.
    metrics = {"photographs": photographs(runtime, artifact, options.photos)} if options.photos else {}
    metrics["robustness"] = robustness(runtime, sample(data.test, options.images))
    print_robustness(metrics["robustness"])
    if options.photos:
        print_photographs(metrics["photographs"])
    sealed = write_figures(artifact, metrics)
    print(f"{options.artifact}: version {sealed.version}, figures written to its card")


if __name__ == "__main__":
    command.run(main)
