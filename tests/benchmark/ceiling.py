"""What this machine could do at most: the service's own decoding and inference in a process for each core, no HTTP."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier

import numpy as np

from model import runtimes
from model.artifact import Artifact
from model.classifier import predictions
from model.preprocess import preprocess
from model.store import SHIPPED

BATCHES = (1, 4, 8, 16, 32)


def images_per_second(images: list[bytes], batch: int, seconds: float) -> float:
    """Over all cores, of ``images`` in turn in batches of ``batch``."""
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    barrier = context.Barrier(cores)
    with context.Pool(cores, _prepare, (barrier,)) as pool:
        return sum(pool.starmap(_rate, [(images, batch, seconds)] * cores, chunksize=1))


def _prepare(barrier: Barrier) -> None:
    global _together
    _together = barrier


def _rate(images: list[bytes], batch: int, seconds: float) -> float:
    artifact = Artifact.load(SHIPPED)
    runtime = runtimes.create(runtimes.ONNX_INT8, artifact)
    batches = [[images[(i + j) % len(images)] for j in range(batch)] for i in range(0, max(len(images), batch), batch)]
    _together.wait()  # type: ignore[name-defined]
    return _measure(runtime, artifact, batches, seconds)


def _measure(runtime: runtimes.Runtime, artifact: Artifact, batches: list[list[bytes]], seconds: float) -> float:
    size = artifact.config.input_size
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        batch = batches[done // len(batches[0]) % len(batches)]
        predictions(runtime(np.stack([preprocess(image, size) for image in batch])), artifact.config)
        done += len(batch)
    return done / elapsed
