"""The shipped artifact on real pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from model import store
from model.artifact import Artifact
from model.runtimes import ONNX, ONNX_INT8, RUNTIMES, TORCH
from tests.golden import GOLDEN, IMAGES, predict

MAX_DIFFERENCE = {ONNX: 0.001, TORCH: 0.02, ONNX_INT8: 0.1}
"""In probability, from the FP32 predictions that were stored."""


@pytest.fixture(scope="module")
def shipped() -> Artifact:
    return Artifact.load(store.SHIPPED)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_shipped_model_still_says_what_it_said(runtime: str, shipped: Artifact) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["version"] == shipped.version
    found = predict(shipped, runtime)
    assert len(found) == len(IMAGES) == len(shipped.config.classes)
    for name, prediction in found.items():
        assert prediction.class_name == name
        assert np.abs(prediction.probabilities - golden["probabilities"][name]).max() < MAX_DIFFERENCE[runtime]


def test_no_worse_model_is_shipped(shipped: Artifact) -> None:
    """A floor under the figures of its card, measured by train.evaluate on the test images."""
    fp32, int8 = (shipped.card["metrics"][name] for name in (ONNX, ONNX_INT8))
    assert fp32["images"] == int8["images"] >= 8000
    assert fp32["accuracy"] >= 0.912
    assert int8["accuracy"] >= fp32["accuracy"] - 0.003
    assert fp32["ece"] <= 0.018


def test_the_shipped_files_are_small(shipped: Artifact) -> None:
    assert sum(path.stat().st_size for path in shipped.path.iterdir()) <= 20e6
