"""The upper bound on this machine: the service's own decoding and inference, without HTTP, one process per core."""

from __future__ import annotations

import multiprocessing
import os
import time
from functools import cache
from multiprocessing.synchronize import Barrier

import numpy as np

from model import runtimes
from model.artifact import ONNX_INT8, Artifact
from model.classifier import Classifier
from model.preprocess import preprocess
from model.store import SHIPPED
from tests.benchmark.workloads import Workload

BATCHES = (1, 4, 8, 16, 32)


def measure(workloads: list[Workload], seconds: float) -> dict[str, dict[int, float]]:
    """Images per second over all cores, by workload and batch size."""
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    with context.Pool(cores, _prepare, (context.Barrier(cores),)) as pool:
        rates: dict[str, dict[int, float]] = {}
        for workload in workloads:
            images = [image for request in workload.requests for image in request]
            of = {size: sum(pool.starmap(_rate, [(images, size, seconds)] * cores, 1)) for size in BATCHES}
            print(f"ceiling, {workload.name}: {max(of.values()):.0f} images/s", flush=True)
            rates[workload.name] = of
    return rates


def _prepare(barrier: Barrier) -> None:
    global _together
    _together = barrier


@cache
def _engine() -> tuple[Classifier, runtimes.Runtime]:
    artifact = Artifact.load(SHIPPED)
    return Classifier(artifact.config, artifact.reference(ONNX_INT8)), runtimes.create(ONNX_INT8, artifact)


def _rate(images: list[bytes], size: int, seconds: float) -> float:
    """Images per second of one core, in batches of ``size``. A barrier makes all cores start at the same moment."""
    classifier, runtime = _engine()
    _together.wait()
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        batch = [preprocess(images[(done + i) % len(images)], classifier.config.input_size) for i in range(size)]
        classifier(runtime(np.stack(batch)))
        done += size
    return done / elapsed
