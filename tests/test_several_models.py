"""Several models at once, through settings alone: an ensemble, and a shadow whose verdicts are never returned."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import requests

from model.artifact import ONNX_INT8, Artifact, seal
from model.ensemble import Ensemble
from model.runtimes import RuntimeUnavailableError
from model.tuning import compare
from model.verification import TOLERANCE, VerificationError, check
from tests import toy
from tests.golden import SHIPPED_NAME, judge
from tests.live import LOG, python, samples, serve, store_model, total


class Store(NamedTuple):
    """A BentoML home with two models trained on the same data: a good one, and one that has hardly learned."""

    home: Path
    good: str
    poor: str
    images: list[bytes]
    alone: list[np.ndarray]
    """The probabilities that each model gives these images by itself."""
    temperature: float
    """Of the ensemble of both."""


@pytest.fixture(scope="module")
def stored(toy_folder: Path, toy_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("several")
    recipe = ("--epochs", 1, "--batch-size", 64, "--widths", "8,32", "--depth", 2, "--seed", 7)
    toy.run("train.fit", toy_folder, "--name", "poor", "--out", root / "run", *recipe)
    toy.run("train.export", root / "run", toy_folder, "--out", root / "poor")
    tags = [store_model(root / "home", path) for path in (toy_artifact.path, root / "poor")]
    images = [path.read_bytes() for path in sorted(toy_folder.glob("*/00?.png"))]
    artifacts = [toy_artifact, Artifact.load(root / "poor")]
    alone = [np.stack([one.probabilities for one in judge(model, ONNX_INT8, images)]) for model in artifacts]
    return Store(root / "home", tags[0], tags[1], images, alone, Ensemble(artifacts).config.temperature)


def probabilities(url: str, images: list[bytes]) -> np.ndarray:
    reply = requests.post(f"{url}/classify/batch", files=[("images", i) for i in images], timeout=60).json()
    return np.array([list(result["all_probabilities"].values()) for result in reply["results"]])


@pytest.mark.parametrize("topology", ["embedded", "runner"])
def test_a_shadow_is_counted_and_changes_no_answer(topology: str, stored: Store, tmp_path: Path) -> None:
    home = shutil.copytree(stored.home, tmp_path / "home")
    with serve(topology, home, MODEL=stored.good, SHADOW=stored.poor, WORKERS=1) as url:
        answered = probabilities(url, stored.images)
        for image in stored.images:  # one by one, so that the shadow keeps up
            requests.post(f"{url}/classify", files={"image": image}, timeout=60)
            time.sleep(0.02)
        card = requests.get(f"{url}/model", timeout=60).json()
        counted = samples(url)
    np.testing.assert_allclose(answered, stored.alone[0], atol=1e-4)
    assert (card["name"], card["shadow"]) == ("toy", stored.poor)
    outcomes = {
        o: total(counted, "classifier_shadow_images_total", outcome=o) for o in ("same", "different", "dropped")
    }
    assert sum(outcomes.values()) >= 2 * len(stored.images)  # includes the reference images
    assert outcomes["same"] > 0
    assert outcomes["different"] > 0


@pytest.mark.parametrize("topology", ["embedded", "runner"])
def test_an_ensemble_returns_the_calibrated_mean(topology: str, stored: Store, tmp_path: Path) -> None:
    home = shutil.copytree(stored.home, tmp_path / "home")
    both = f"{stored.good},{stored.poor}"
    with serve(topology, home, MODEL=both, WORKERS=1) as url:
        together = probabilities(url, stored.images)
        card = requests.get(f"{url}/model", timeout=60).json()
        answer = requests.post(f"{url}/classify", files={"image": stored.images[0]}, timeout=60).json()
        explained = requests.post(f"{url}/explain", files={"image": stored.images[0]}, timeout=60)
    good, poor = stored.alone
    assert np.abs(good - poor).max() > 0.1
    expected = ((good + poor) / 2) ** (1 / stored.temperature)
    np.testing.assert_allclose(together, expected / expected.sum(axis=1, keepdims=True), atol=1e-4)
    assert np.abs(together - (good + poor) / 2).max() > 0.01
    assert [member["name"] for member in card["members"]] == ["toy", "poor"]
    assert answer["model"] == both
    assert explained.status_code == 200


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"MODEL": "toy,nope"}, "'nope' is not in the model store"),
        ({"MODEL": f"toy,{SHIPPED_NAME}"}, f"{SHIPPED_NAME} was trained on other data than toy"),
        ({"MODEL": "toy", "SHADOW": SHIPPED_NAME}, "expected those of the model"),
    ],
)
def test_incompatible_models_stop_the_start_with_one_line(
    settings: dict[str, str], expected: str, stored: Store
) -> None:
    said = python(stored.home, "-c", "import service", code=1, **settings).stderr
    assert expected in said
    assert "Traceback" not in said


def test_the_fastest_correct_runtime_serves_and_is_reported(stored: Store, tmp_path: Path) -> None:
    home = shutil.copytree(stored.home, tmp_path / "home")
    with serve("embedded", home, MODEL=stored.good, RUNTIME="fastest", WORKERS=2) as url:
        card = requests.get(f"{url}/model", timeout=60).json()
    rates = card["measured"]["images_per_second"]
    assert set(rates) == {"onnx", "onnx-int8"}
    assert card["runtime"] == max(rates, key=rates.__getitem__)
    assert f'"runtime":"{card["runtime"]}"' in (home / LOG).read_text()


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_outputs_right_in_each_model_are_right_in_their_mean(temperature: float, toy_artifact: Artifact) -> None:
    """Logits divided by a temperature below one, and their sums, differ more than the logits themselves.

    Divided by a high one they differ less, but familiarity does not.
    """
    model = replace(toy_artifact, config=toy_artifact.config.model_copy(update={"temperature": temperature}))
    both = Ensemble([model, model])
    outputs = toy_artifact.reference(ONNX_INT8).outputs
    error = np.full_like(outputs, 0.9 * TOLERANCE["onnx-int8"])
    error[np.arange(len(outputs)), outputs[:, :-1].argmax(axis=1)] *= -1
    reference = both.reference("onnx-int8")
    check(both.combine([outputs + error] * 2), reference, "onnx-int8")
    with pytest.raises(VerificationError):
        check(both.combine([np.roll(outputs, 1, axis=0)] * 2), reference, "onnx-int8")


def test_an_incorrect_runtime_is_never_the_fastest(toy_artifact: Artifact, tmp_path: Path) -> None:
    path = shutil.copytree(toy_artifact.path, tmp_path / "artifact")
    shutil.copyfile(toy_artifact.path / "model.onnx", path / "model.int8.onnx")  # its outputs differ from its reference
    with np.load(path / "reference.npz") as arrays:
        changed = dict(arrays)
    changed["outputs_int8"] = changed["outputs_int8"] + 1
    np.savez_compressed(path / "reference.npz", **changed)
    altered = Ensemble([seal(path, {key: value for key, value in toy_artifact.card.items() if key != "files"})])
    rates, failed = compare(altered, names=("onnx", "onnx-int8", "tpu"))
    assert list(rates) == ["onnx"]
    assert rates["onnx"] > 0
    assert "differs from the reference" in failed["onnx-int8"]
    assert "expected one of" in failed["tpu"]
    with pytest.raises(RuntimeUnavailableError, match=r"expected one that works: .*differs from the"):
        compare(altered, names=("onnx-int8", "tpu"))
