"""The shipped artifact on real pictures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from model.artifact import SHIPPED, Artifact
from model.runtimes import ONNX, ONNX_INT8, RUNTIMES, TORCH
from tests.golden import GOLDEN, predict, size
from train import readme

MAX_DIFFERENCE = {ONNX: 0.001, TORCH: 0.02, ONNX_INT8: 0.1}
"""In probability, from the FP32 predictions that were stored."""


@pytest.fixture(scope="module")
def shipped() -> Artifact:
    return Artifact.load(SHIPPED)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(GOLDEN.read_text())
    return document


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_shipped_model_still_says_what_it_said(runtime: str, shipped: Artifact, golden: dict[str, Any]) -> None:
    assert golden["version"] == shipped.version
    found = predict(shipped, runtime)
    assert found
    assert found.keys() == golden["probabilities"].keys()
    for name, prediction in found.items():
        assert prediction.class_name == name
        assert np.abs(prediction.probabilities - golden["probabilities"][name]).max() < MAX_DIFFERENCE[runtime]


def test_no_worse_model_is_shipped(shipped: Artifact, golden: dict[str, Any]) -> None:
    """The figures of its card, measured by train.evaluate on the test images, against the limits set for its data."""
    limits = golden["limits"]
    fp32, int8 = (shipped.card["metrics"][name] for name in (ONNX, ONNX_INT8))
    assert fp32["images"] == int8["images"] >= limits["images"]
    assert fp32["accuracy"] >= limits["accuracy"]
    assert int8["accuracy"] >= fp32["accuracy"] - max(0.003, 1 / fp32["images"])
    assert fp32["ece"] <= limits["ece"]
    assert size(shipped) <= limits["bytes"]


def test_every_other_model_is_there_for_a_reason(golden: dict[str, Any]) -> None:
    """More accurate or faster; as good in INT8, right on the same pictures, and all of them small enough for Git."""
    first, *others = readme.shipped()
    for artifact in others:
        fp32, int8 = (artifact.card["metrics"][name] for name in (ONNX, ONNX_INT8))
        assert fp32["images"] >= golden["limits"]["images"]
        assert int8["accuracy"] >= fp32["accuracy"] - max(0.003, 1 / fp32["images"])
        default = first.card["metrics"][ONNX_INT8]
        faster = int8["speed"]["images_per_s"] > default["speed"]["images_per_s"]
        assert faster or int8["accuracy"] > default["accuracy"]
        assert [name for name, p in predict(artifact, ONNX_INT8).items() if p.class_name != name] == []
    assert sum(map(size, [first, *others])) <= 40e6
