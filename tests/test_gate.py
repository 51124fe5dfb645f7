"""The gate lets an equal model through and stops a worse one."""

from __future__ import annotations

import copy
import json

import pytest

from model.store import SHIPPED
from tests.toy import run
from train.gate import judge

CARD = json.loads((SHIPPED / "card.json").read_text())["metrics"]


def failures(new: dict[str, object], slowdown: float = 1.0) -> list[str]:
    return [what for what, found, limit in judge(new, CARD, slowdown) if found > limit]


def test_the_shipped_model_is_as_good_as_itself() -> None:
    assert "| NO |" not in run("train.gate", SHIPPED, SHIPPED)


@pytest.mark.parametrize(
    ("runtime", "figure", "change", "failure"),
    [
        ("onnx-int8", "accuracy", -0.01, "loss of accuracy"),
        ("onnx-int8", "ece", 0.02, "loss of calibration (ECE)"),
        ("onnx", "accuracy", 0.01, "accuracy lost by INT8"),
    ],
)
def test_a_worse_model_is_stopped(runtime: str, figure: str, change: float, failure: str) -> None:
    worse = copy.deepcopy(CARD)
    worse[runtime][figure] += change
    assert failure in failures(worse)


def test_a_slower_model_is_stopped() -> None:
    assert failures(CARD, slowdown=1.2) == ["time of a batch, new / old"]
