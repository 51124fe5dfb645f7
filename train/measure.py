"""What the commands that measure an artifact share: the data it was trained on, the outputs of an engine, its card."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from tqdm import tqdm

from model.artifact import Artifact, Outputs, seal
from model.preprocess import Pixels
from model.runtimes import Runtime
from train.data import Data, in_batches
from train.runs import load_data_of

BATCH = 100
THREADS = len(os.sched_getaffinity(0))
"""Threads of an engine that classifies many images; its speed is measured with one."""


def load_own_data(artifact: Artifact, source: str) -> Data:
    """The data that ``artifact`` was trained on, from ``source``; raises ``CommandError`` if that holds other data."""
    return load_data_of(artifact.config, artifact.card["training"], source)


def run_runtime(runtime: Runtime, images: Pixels) -> Outputs:
    """(N, K + 1) outputs for all ``images``, in batches, with a progress bar."""
    batches = tqdm(in_batches(images, BATCH), desc=runtime.name, unit="batch", leave=False, disable=None)
    return np.concatenate([runtime(images[batch]) for batch in batches])


def write_figures(artifact: Artifact, metrics: dict[str, Any]) -> Artifact:
    """Write ``metrics`` into the artifact's card, keeping what other commands measured."""
    return seal(artifact.path, {**artifact.card, "metrics": {**artifact.metrics, **metrics}})
