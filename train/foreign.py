"""Measure how well an artifact tells foreign (out-of-distribution) images from those of its test split.

    python -m train.foreign model/pretrained SOURCE [--photos FOLDER_OR_TAR]

The foreign images are of four synthetic kinds (noise, blobs, letters, waves) and, from ``--photos``, every image in a
folder not named after a class. The figures are for the runtime that serves on a CPU, and go into the artifact's card.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from model.artifact import Artifact, Outputs
from model.classifier import Classifier
from model.preprocess import Pixels
from model.runtimes import create
from train import command
from train.command import CommandError
from train.data import read_photos
from train.measure import THREADS, load_own_data, run_runtime, write_figures

SYNTHETIC_IMAGES = 500
"""Number of synthetic images of each kind."""
Maker = Callable[[np.random.Generator, tuple[int, int]], Pixels]


def auroc(ordinary: NDArray[np.float32], foreign: NDArray[np.float32]) -> float:
    """Probability that an ordinary image scores higher than a foreign one; ties count half (Hanley & McNeil, 1982)."""
    ranked = np.sort(ordinary)
    below, up_to = (np.searchsorted(ranked, foreign, side) for side in ("left", "right"))
    return float(1 - (below + up_to).mean() / (2 * len(ranked)))


def noise(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    return rng.integers(0, 256, (*size, 3), np.uint8)


def blobs(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    """Smooth patches of random colours."""
    coarse = rng.integers(0, 256, (*rng.integers(2, 9, 2), 3), np.uint8)
    return np.asarray(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC), np.uint8)


def letters(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    """A character in one colour on another."""
    height, width = size
    image = np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    character = str(rng.choice(list(string.ascii_letters + string.digits)))
    place = (int(rng.uniform(0.05, 0.4) * width), int(rng.uniform(0.7, 0.95) * height))
    colour, scale = rng.integers(0, 256, 3).tolist(), float(rng.uniform(0.7, 1.1)) * height / 32
    cv2.putText(image, character, place, int(rng.integers(0, 5)), scale, colour, max(1, height // 16), cv2.LINE_AA)
    return image


def waves(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    """A grating between two colours, with a little noise."""
    y, x = np.indices(size)
    frequency, phase = rng.uniform(0.2, 1.5, 2), rng.uniform(0, 2 * np.pi)
    share = (2 + np.sin(frequency[0] * x + phase) + np.sin(frequency[1] * y + phase))[..., None] / 4
    one, other = rng.integers(0, 256, (2, 3))
    mixed = share * one + (1 - share) * other + rng.normal(0, 6, (*size, 3))
    return np.asarray(mixed.clip(0, 255), np.uint8)


KINDS: dict[str, Maker] = {"noise": noise, "blobs": blobs, "letters": letters, "waves": waves}


def foreign_photos(source: str, classes: tuple[str, ...], size: tuple[int, int]) -> Pixels:
    """Every readable image of ``source`` in a folder not named after a class; raises ``CommandError`` without any."""
    images = read_photos(Path(source), size, lambda folder: folder not in classes).images
    if not images:
        raise CommandError(f"{source}: no image in a folder that is none of the classes {', '.join(classes)}")
    return np.stack(images)


def measure(classifier: Classifier, ordinary: Outputs, foreign: dict[str, Outputs]) -> dict[str, Any]:
    """AUROC of each kind, and the share that would be called foreign."""
    kinds = {
        kind: {
            "images": len(outputs),
            "auroc": round(auroc(ordinary[:, -1], outputs[:, -1]), 4),
            "told": round(share_foreign(classifier, outputs), 4),
        }
        for kind, outputs in foreign.items()
    }
    return {
        "images": len(ordinary),
        "told_wrongly": round(share_foreign(classifier, ordinary), 4),
        "auroc_mean": round(float(np.mean([kind["auroc"] for kind in kinds.values()])), 4),
        "kinds": kinds,
    }


def share_foreign(classifier: Classifier, outputs: Outputs) -> float:
    return float(np.mean([not prediction.in_distribution for prediction in classifier(outputs)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("source")
    parser.add_argument("--photos", help="folder or tar archive with photographs of other things")
    options = parser.parse_args()
    artifact = Artifact.load(options.artifact)
    config = artifact.config
    data = load_own_data(artifact, options.source)
    rng = np.random.default_rng(0)
    images = {
        kind: np.stack([make(rng, config.input_size) for _ in range(SYNTHETIC_IMAGES)]) for kind, make in KINDS.items()
    }
    if options.photos:
        images["photographs"] = foreign_photos(options.photos, config.classes, config.input_size)
    runtime = create(artifact.cpu_runtime, artifact, THREADS)
    classifier = Classifier(config, artifact.reference(artifact.cpu_runtime))
    ordinary = run_runtime(runtime, data.test.images)
    found = measure(classifier, ordinary, {kind: run_runtime(runtime, pixels) for kind, pixels in images.items()})
    print(f"{found['images']} test images, of which {found['told_wrongly']:.1%} are called foreign")
    for kind, figures in found["kinds"].items():
        print(
            f"  {kind:12} n={figures['images']:4}  AUROC {figures['auroc']:.3f}  called foreign {figures['told']:.1%}"
        )
    print(f"  mean AUROC {found['auroc_mean']:.3f}")
    if classifier.foreign_warning:
        print(f"  {classifier.foreign_warning}")
    write_figures(artifact, {"foreign": found})


if __name__ == "__main__":
    command.run(main)
