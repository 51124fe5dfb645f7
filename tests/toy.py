"""A made-up data set of other classes and another size than the shipped model's, and commands run on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from model.preprocess import Pixels

CLASSES = ("disc", "frame", "stripes")
SIDE = 24
RECIPE = ("--epochs", 6, "--batch-size", 32, "--widths", "8,32", "--depth", 2, "--lr", 0.1)
"""A few seconds of training."""
ROOT = Path(__file__).parent.parent


def draw(name: str, rng: np.random.Generator) -> Pixels:
    """One noisy SIDE x SIDE picture of the class, in colours that tell nothing of it."""
    background, colour = rng.integers(0, 256, (2, 3))
    image = np.full((SIDE, SIDE, 3), background, np.uint8)
    x, y = (int(v) for v in rng.integers(9, SIDE - 9, 2))
    paint = tuple(int(v) for v in colour)
    if name == "disc":
        cv2.circle(image, (x, y), 7, paint, -1)
    elif name == "frame":
        cv2.rectangle(image, (x - 7, y - 7), (x + 7, y + 7), paint, 2)
    else:
        image[:, x % 4 :: 4] = colour
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def make_folder(root: Path, per_class: int = 80, seed: int = 0, zoom: int = 1) -> Path:
    """``root/<class>/<n>.png`` for each class, with one file that is no image."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            image = cv2.resize(draw(name, rng), None, fx=zoom, fy=zoom)
            cv2.imwrite(str(root / name / f"{index:03}.png"), image)
    (root / CLASSES[0] / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    return root


def run(module: str, *arguments: object, code: int = 0) -> str:
    """``python -m module arguments``; returns what it printed, after checking its exit status."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
