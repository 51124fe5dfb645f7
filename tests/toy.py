"""A synthetic data set whose classes and image size differ from the shipped model's, and commands run on it."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

import cv2
import numpy as np

from model.preprocess import Pixels

CLASSES = ("disc", "frame", "stripes")
SIDE = 24
RECIPE = ("--epochs", 6, "--batch-size", 32, "--widths", "8,32", "--depth", 2, "--lr", 0.1)
"""Trains within a few seconds."""
ROOT = Path(__file__).parent.parent


def draw(name: str, rng: np.random.Generator) -> Pixels:
    """One noisy SIDE x SIDE picture of a class; its colours say nothing about the class."""
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
    """Write ``root/<class>/<n>.png`` for each class, and one file that is no image."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            image = cv2.resize(draw(name, rng), None, fx=zoom, fy=zoom)
            cv2.imwrite(str(root / name / f"{index:03}.png"), image)
    (root / CLASSES[0] / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    return root


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch.export._trace", "onnxscript.function_libs.torch_lib.ops", "bentoml.models", "cv2", "pydantic_settings"]
)


def run(module: str, *arguments: object, code: int = 0, env: Mapping[str, str] | None = None) -> str:
    """Run ``python -m module arguments``, check its exit status and return what it printed.

    Runs in a fork of a process that has already imported what takes long: torch would otherwise cost each command three
    seconds, its compiler, which its optimisers import, two more; the exporter to ONNX takes two, BentoML most of one.
    None has looked at its environment by then, which is ``env`` or that of the caller.
    """
    with NamedTemporaryFile() as output:
        chosen = dict(os.environ if env is None else env)
        process = FORKS.Process(
            target=_main, args=(module, list(map(str, arguments)), output.name, chosen), daemon=True
        )
        process.start()
        process.join(300)
        printed = Path(output.name).read_text()
    assert process.exitcode == code, printed
    return printed


def _main(module: str, arguments: Sequence[str], output: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with Path(output).open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
