"""The gate passes an equally good model and stops a worse one."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.artifact import Artifact, seal
from model.store import SHIPPED
from tests import toy
from tests.toy import run
from train.command import CommandError
from train.gate import ACCURACY_LOSS, RUNTIME, comparable, judge, table
from train.metrics import within

CORRUPTED = {"runtime": "onnx-int8", "images": 2000, "seed": 0, "accuracy": 0.87}


def of_many_images(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics as if measured on so many test images that chance plays no part, whichever model is shipped."""
    metrics = copy.deepcopy(metrics)
    for runtime in ("onnx", RUNTIME):
        found = metrics[runtime]
        times = math.ceil(8000 / found["images"])
        found["images"] *= times
        found["reliability"]["images"] = [count * times for count in found["reliability"]["images"]]
    return metrics


CARD = {**of_many_images(json.loads((SHIPPED / "card.json").read_text())["metrics"]), "robustness": CORRUPTED}


def failures(new: dict[str, object], slowdown: float = 1.0) -> list[str]:
    return [what for what, found, limit in judge(new, CARD, slowdown) if not within(found, limit)]


def test_the_shipped_model_passes_against_itself() -> None:
    assert "| NO |" not in run("train.gate", SHIPPED, SHIPPED)


def test_a_model_at_the_limit_passes_and_one_just_below_does_not() -> None:
    """Despite floating point: 0.914 - 0.909 is slightly more than 0.005."""
    for hundredths in range(5000, 10_000):
        old, new, worse = hundredths / 10_000, (hundredths - 50) / 10_000, (hundredths - 51) / 10_000
        assert within(old - new, ACCURACY_LOSS)
        assert not within(old - worse, ACCURACY_LOSS)
    assert "| 0.0050 | 0.005 | yes |" in table("it", [("loss of accuracy", 0.914 - 0.909, ACCURACY_LOSS)])


@pytest.mark.parametrize(("lost", "code"), [(0.005, 0), (0.0051, 1)])
def test_the_exit_status_follows_the_table(lost: float, code: int, tmp_path: Path) -> None:
    card = Artifact.load(SHIPPED).card
    card["metrics"] = of_many_images(card["metrics"])
    base = copy.deepcopy(card)
    for metrics in (card["metrics"], base["metrics"]):
        metrics[RUNTIME]["accuracy"] = metrics["onnx"]["accuracy"] = 0.914
    for name in (RUNTIME, "onnx"):
        card["metrics"][name]["accuracy"] = round(0.914 - lost, 4)
    paths = [tmp_path / "new", tmp_path / "old"]
    for path, told in zip(paths, (card, base), strict=True):
        seal(shutil.copytree(SHIPPED, path), told)
    (tmp_path / "summary").write_text("of an earlier step\n")
    printed = run("train.gate", *paths, "--summary", tmp_path / "summary", code=code)
    assert f"| {lost:.4f} | 0.005 | {'NO' if code else 'yes'} |" in printed
    earlier, table_of_figures = (tmp_path / "summary").read_text().split("\n", 1)
    assert earlier == "of an earlier step"
    assert table_of_figures in printed


@pytest.mark.parametrize(
    ("metrics", "figure", "change", "failure"),
    [
        ("onnx-int8", "accuracy", -0.01, "loss of accuracy"),
        ("onnx-int8", "ece", 0.02, "loss of calibration (ECE)"),
        ("robustness", "accuracy", -0.011, "loss of accuracy on corrupted images"),
        ("onnx", "accuracy", 0.05, "accuracy lost by INT8"),  # even with few test images
    ],
)
def test_a_worse_model_is_stopped(metrics: str, figure: str, change: float, failure: str) -> None:
    worse = copy.deepcopy(CARD)
    worse[metrics][figure] += change
    assert failure in failures(worse)


def test_a_slight_loss_on_corrupted_images_passes() -> None:
    assert failures({**CARD, "robustness": {**CORRUPTED, "accuracy": 0.861}}) == []


def test_a_candidate_without_figures_for_corrupted_images_is_one_clear_line() -> None:
    unmeasured = {name: figures for name, figures in CARD.items() if name != "robustness"}
    with pytest.raises(CommandError, match=r"no figures of corrupted images.*; run train\.robustness$"):
        judge(unmeasured, CARD, 1.0)
    assert not any("corrupted" in what for new in (CARD, unmeasured) for what, _, _ in judge(new, unmeasured, 1.0))


@pytest.mark.parametrize(("name", "other"), [("runtime", "torch"), ("images", 500), ("seed", 1)])
def test_figures_for_different_corrupted_images_are_not_compared(name: str, other: object) -> None:
    with pytest.raises(CommandError, match=f"{name} {other} in the new card; expected {CORRUPTED[name]}"):
        judge({**CARD, "robustness": {**CORRUPTED, name: other}}, CARD, 1.0)


@pytest.mark.parametrize("runtime", ["onnx", "onnx-int8"])
def test_a_card_without_a_runtime_is_one_clear_line(runtime: str) -> None:
    with pytest.raises(CommandError, match=f"no figures of {runtime}; run train.evaluate first"):
        judge({name: figures for name, figures in CARD.items() if name != runtime}, CARD, 1.0)


def test_a_base_without_int8_is_one_clear_line() -> None:
    with pytest.raises(CommandError, match=f"no figures of {RUNTIME}; run train.evaluate first"):
        judge(CARD, {name: figures for name, figures in CARD.items() if name != RUNTIME}, 1.0)


def test_a_single_image_among_few_is_noise() -> None:
    few = copy.deepcopy(CARD)
    for runtime in ("onnx", "onnx-int8"):
        few[runtime]["images"] = 24
    few["onnx"]["accuracy"] = few["onnx-int8"]["accuracy"] + 0.0417
    assert failures(few) == []
    few["onnx-int8"] |= {"accuracy": CARD["onnx-int8"]["accuracy"] - 0.0417, "ece": 0.05}
    few["onnx-int8"]["reliability"]["images"] = [0] * 13 + [12, 12]
    few["onnx"]["accuracy"] = few["onnx-int8"]["accuracy"]
    assert failures(few) == []
    few["onnx-int8"]["ece"] = 0.2
    assert failures(few) == ["loss of calibration (ECE)"]


def test_a_base_trained_on_other_data_is_measured_on_the_candidates_data(
    toy_artifact: Artifact, toy_folder: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(toy_artifact.path, tmp_path / "base")
    training = {**toy_artifact.card["training"], "data_sha256": "0" * 64}
    base = seal(path, {**toy_artifact.card, "training": training, "metrics": {RUNTIME: {"accuracy": 0.1}}})
    printed = run("train.gate", toy_artifact.path, path, code=1)
    assert "are of different data; expected --data" in printed
    assert comparable(toy_artifact, base, str(toy_folder))[RUNTIME]["accuracy"] >= 0.9
    assert "robustness" not in comparable(toy_artifact, base, str(toy_folder))
    assert Artifact.load(path).card["metrics"] == {RUNTIME: {"accuracy": 0.1}}
    with pytest.raises(CommandError, match="not the data of the training"):
        comparable(toy_artifact, base, str(toy.make_folder(tmp_path / "other", seed=1)))
    others = replace(base, config=base.config.model_copy(update={"classes": ("disc", "frame", "dots")}))
    with pytest.raises(CommandError, match=r"'dots'\]; expected \['disc', 'frame', 'stripes'\]"):
        comparable(toy_artifact, others, str(toy_folder))


def test_such_a_base_is_also_measured_on_the_candidates_corrupted_images(
    toy_artifact: Artifact, toy_folder: Path, tmp_path: Path
) -> None:
    new, path = (shutil.copytree(toy_artifact.path, tmp_path / name) for name in ("new", "base"))
    run("train.robustness", new, toy_folder)
    measured = Artifact.load(new).card["metrics"]["robustness"]
    training = {**toy_artifact.card["training"], "data_sha256": "0" * 64}
    base = seal(path, {**toy_artifact.card, "training": training, "metrics": {"robustness": {"accuracy": 0.1}}})
    assert comparable(Artifact.load(new), base, str(toy_folder))["robustness"] == measured


def test_a_slower_model_is_stopped() -> None:
    assert failures(CARD, slowdown=1.2) == ["time of a batch, new / old"]
