"""The torch engine on a GPU, with and without CUDA graphs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from model.artifact import ONNX, SHIPPED, TORCH, Artifact
from model.preprocess import Pixels
from model.runtimes import GRAPHED_IMAGES, OnnxRuntime, TorchRuntime
from model.verification import TOLERANCE, verify
from tests import toy
from train.runs import RUN

SECONDS = 0.5


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    assert torch.cuda.is_available(), "no NVIDIA GPU that this torch can use"
    return Artifact.load(SHIPPED)


@pytest.fixture(scope="module")
def engine(artifact: Artifact) -> TorchRuntime:
    runtime = TorchRuntime(artifact)
    assert runtime._graphs, "no CUDA graphs were recorded"
    return runtime


def images(artifact: Artifact, count: int, seed: int = 0) -> Pixels:
    samples = artifact.reference(ONNX).images
    return samples[np.random.default_rng(seed).integers(0, len(samples), count)]


def test_the_engine_reproduces_the_reference_outputs(artifact: Artifact, engine: TorchRuntime) -> None:
    verify(engine, artifact.reference(ONNX))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 100, GRAPHED_IMAGES, GRAPHED_IMAGES + 1])
def test_every_batch_size_matches_onnx_runtime(count: int, artifact: Artifact, engine: TorchRuntime) -> None:
    """Compared with ONNX Runtime on the CPU, twice, to show that nothing is left over from the previous batch."""
    expected = OnnxRuntime(artifact.file(ONNX), ONNX, threads=4)
    for seed in range(2):
        batch = images(artifact, count, seed)
        assert np.abs(engine(batch) - expected(batch)).max() < TOLERANCE[TORCH]


def test_two_engines_can_replay_graphs_in_two_threads(artifact: Artifact, engine: TorchRuntime) -> None:
    """As a worker's engine and its shadow's do."""
    second = TorchRuntime(artifact)
    expected = OnnxRuntime(artifact.file(ONNX), ONNX, threads=4)
    batches = [images(artifact, count, count) for count in (1, 5, 64, 200)] * 10
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        answers = [(batch, one.submit(engine, batch), other.submit(second, batch)) for batch in batches]
        for batch, *pair in answers:
            right = expected(batch)
            for future in pair:
                assert np.abs(future.result() - right).max() < TOLERANCE[TORCH]


def test_evidence_matches_that_of_the_cpu(artifact: Artifact, engine: TorchRuntime) -> None:
    batch = images(artifact, 5)
    ours, theirs = engine.evidence(batch), OnnxRuntime(artifact.file(ONNX), ONNX, threads=4).evidence(batch)
    assert np.abs(ours.sum(axis=(1, 2)) - theirs.sum(axis=(1, 2))).max() < TOLERANCE[TORCH]


def test_training_on_a_gpu_learns(tmp_path: Path) -> None:
    folder = toy.make_folder(tmp_path / "folder")
    toy.run("train.fit", folder, "--name", "toy", "--out", tmp_path / "run", *toy.RECIPE)
    record = json.loads((tmp_path / "run" / RUN).read_text())
    assert (record["precision"], record["device"]) == ("float16", torch.cuda.get_device_name())
    assert record["history"][-1]["val_accuracy"] > 0.7


def rate(function: Callable[[Pixels], object], batch: Pixels) -> float:
    function(batch)
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < SECONDS:
        function(batch)
        done += len(batch)
    return done / elapsed


def test_graphs_are_faster_for_small_batches(
    artifact: Artifact, engine: TorchRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints a table. If graphs were slower for small batches, they would not be worth having."""
    rows = []
    for count in (1, 8, 32, GRAPHED_IMAGES):
        batch = images(artifact, count)
        rows.append(
            (
                count,
                rate(engine, batch),
                rate(lambda b: engine._run(partial(engine._eagerly, engine._network), b), batch),
            )
        )
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}\nimages in a batch, images/s with CUDA graphs, without")
        for row in rows:
            print("{:>4} {:>12,.0f} {:>12,.0f}".format(*row))
    # For large batches, the kernels take longer than launching them.
    assert all(graphed > (eager if count <= 8 else 0.9 * eager) for count, graphed, eager in rows)
