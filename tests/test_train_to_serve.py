"""Another classifier from end to end: trained on synthetic classes, stored, served and queried."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import requests
from PIL import Image

from model.artifact import Artifact
from tests import toy
from tests.live import encode, serve, store_model


def test_a_classifier_of_other_classes_is_served(toy_artifact: Artifact, tmp_path: Path) -> None:
    store_model(tmp_path, toy_artifact.path)
    folder = toy_artifact.path.parent / "folder"
    rng = np.random.default_rng(99)
    names = [toy.CLASSES[i % 3] for i in range(30)]
    parts = [("images", encode_pixels(name, rng)) for name in names]
    with serve("embedded", tmp_path, MODEL="toy", WORKERS=1) as url:
        card = requests.get(f"{url}/model", timeout=30).json()
        replies = requests.post(f"{url}/classify/batch", files=parts, timeout=30).json()["results"]
        measured = accuracy(toy.run("train.evaluate", toy_artifact.path, folder, "--url", url))
    itself = shutil.copytree(toy_artifact.path, tmp_path / "artifact")
    assert measured == accuracy(toy.run("train.evaluate", itself, folder, "--runtime", "onnx-int8"))
    assert card["classes"] == list(toy.CLASSES)
    assert card["input_size"] == [toy.SIDE, toy.SIDE]
    assert card["version"] == toy_artifact.version
    assert replies[0]["model"] == f"toy:{toy_artifact.version}"
    assert list(replies[0]["all_probabilities"]) == ["0", "1", "2"]
    assert sum(reply["class_name"] == name for reply, name in zip(replies, names, strict=True)) >= 27


def accuracy(printed: str) -> str:
    """The accuracy as a command printed it, with its interval and the number of images."""
    return re.findall(r"accuracy [^)]+\)", printed)[-1]


def encode_pixels(name: str, rng: np.random.Generator) -> bytes:
    return encode(Image.fromarray(toy.draw(name, rng)[..., ::-1]))
