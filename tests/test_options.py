"""What callers can request besides the verdict: prediction sets, abstaining, explanations."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from model.artifact import ONNX_INT8, SHIPPED, Artifact
from tests.golden import IMAGES, TYPICAL, judge
from tests.live import Server, assert_error, encode, picture, samples, total
from tests.snippets import of_the_example
from train.foreign import KINDS

ARTIFACT = Artifact.load(SHIPPED)
FAMILIAR, CLASS = TYPICAL.read_bytes(), TYPICAL.stem


def made() -> Iterator[bytes]:
    """Images that show nothing."""
    rng = np.random.default_rng(0)
    return (encode(Image.fromarray(make(rng, ARTIFACT.config.input_size))) for make in KINDS.values())


FOREIGN = next((image for image in made() if not judge(ARTIFACT, ONNX_INT8, [image])[0].in_distribution), b"")
needs_foreign = pytest.mark.skipif(
    not FOREIGN, reason="the shipped model finds nothing foreign, as one of few images may"
)


def blends() -> Iterator[bytes]:
    """One picture blended more and more into another."""
    for one, other in combinations(IMAGES[:4], 2):
        for share in (0.3, 0.4, 0.5, 0.6, 0.7):
            yield encode(Image.blend(*(Image.open(path).convert("RGB") for path in (one, other)), share))


DOUBTFUL = min(blends(), key=lambda image: judge(ARTIFACT, ONNX_INT8, [image])[0].confidence)


def classify(server: Server, data: bytes, path: str = "/classify", **query: Any) -> requests.Response:
    return requests.post(f"{server.url}{path}", params=query, files={"image": data}, timeout=60)


def test_a_set_grows_with_its_level_and_starts_with_the_verdict(server: Server) -> None:
    plain = classify(server, FAMILIAR).json()
    assert "prediction_set" not in plain
    sets = [classify(server, FAMILIAR, prediction_set=level).json()["prediction_set"] for level in (0.5, 0.99, 0.99999)]
    assert sets[0][0] == CLASS
    assert set(sets[0]) <= set(sets[1]) <= set(sets[2])
    assert len(sets[2]) == len(ARTIFACT.config.classes)  # more than 2,500 validation images can guarantee


def test_abstaining_only_removes_the_verdict(server: Server) -> None:
    plain = classify(server, DOUBTFUL).json()
    before = total(samples(server.url), "classifier_abstained_images_total")
    sure = classify(server, FAMILIAR, abstain_below=0.01).json()
    unsure = classify(server, DOUBTFUL, abstain_below=0.999999).json()
    assert (sure["abstained"], sure["class_name"]) == (False, CLASS)
    assert (unsure["abstained"], unsure["class_name"], unsure["predicted_class"]) == (True, None, None)
    assert unsure["all_probabilities"] == plain["all_probabilities"]
    assert total(samples(server.url), "classifier_abstained_images_total") == before + 1


@needs_foreign
def test_foreign_images_are_flagged_counted_and_refused_on_request(server: Server) -> None:
    assert classify(server, FAMILIAR).json()["in_distribution"] is True
    before = total(samples(server.url), "classifier_foreign_images_total")
    assert classify(server, FOREIGN).json()["in_distribution"] is False
    assert classify(server, FAMILIAR, abstain_foreign="true").json()["abstained"] is False
    assert classify(server, FOREIGN, abstain_foreign="True").json()["class_name"] is None  # as Python spells it
    assert total(samples(server.url), "classifier_foreign_images_total") == before + 2


@needs_foreign
def test_options_apply_to_every_image_of_a_batch(server: Server) -> None:
    parts = [("images", image) for image in (FAMILIAR, b"no image", FOREIGN)]
    query = {"prediction_set": "0.9", "abstain_foreign": "true"}
    reply = requests.post(f"{server.url}/classify/batch", params=query, files=parts, timeout=60).json()
    good, bad, foreign = reply["results"]
    assert good["prediction_set"][0] == good["class_name"] == CLASS
    assert bad["error"]["code"] == "unsupported_media_type"
    assert foreign["abstained"] is True
    assert foreign["prediction_set"]


def test_the_most_probable_classes_replace_the_probabilities_of_all(server: Server) -> None:
    plain = classify(server, DOUBTFUL).json()
    every = classify(server, DOUBTFUL, top=11).json()["top"]
    assert {str(each["class_index"]): each["probability"] for each in every} == plain["all_probabilities"]
    assert [each["class_name"] for each in every] == [ARTIFACT.config.classes[each["class_index"]] for each in every]
    assert every == sorted(every, key=lambda each: -each["probability"])
    reply = classify(server, DOUBTFUL, top=3).json()
    assert reply["top"] == every[:3]
    assert (reply["class_name"], reply["confidence"]) == (every[0]["class_name"], every[0]["probability"])
    assert "all_probabilities" not in reply


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"prediction_set": "1"}, "prediction_set='1'; expected a number between 0 and 1"),
        ({"prediction_set": "nan"}, "expected a number between 0 and 1"),
        ({"abstain_below": "-0.5"}, "expected a number between 0 and 1"),
        ({"abstain_foreign": "yes"}, "abstain_foreign='yes'; expected true or false"),
        ({"top": "0"}, "top='0'; expected a whole number from 1 on"),
        ({"top": "2.0"}, "top='2.0'; expected a whole number from 1 on"),
        ({"top": 5000 * "9"}, "expected a whole number from 1 on"),
        ({"prediction_set": ["2", "0.9"]}, "expected a number between 0 and 1"),
        ({"prediction_set": ["0.8", "0.9"]}, "query parameter 'prediction_set' is given twice; expected it once"),
        ({"abstain_bellow": "0.9"}, "query parameter 'abstain_bellow'; expected one of"),
    ],
)
@pytest.mark.parametrize("path", ["/classify", "/explain"])
def test_an_invalid_option_is_refused(server: Server, path: str, query: dict[str, Any], expected: str) -> None:
    response = classify(server, FAMILIAR, path, **query)
    assert_error(response, 400, "invalid_request")
    assert expected in response.json()["error"]["message"]


def test_an_explanation_is_an_overlay_of_the_image_sent(server: Server) -> None:
    photo = picture(3, 480, 640)
    response = classify(server, encode(photo, "JPEG"), "/explain")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["X-Request-ID"]
    shown = Image.open(io.BytesIO(response.content))
    assert shown.size == photo.size
    assert np.corrcoef(np.asarray(shown).mean(axis=2).ravel(), np.asarray(photo).mean(axis=2).ravel())[0, 1] > 0.3


@of_the_example
@pytest.mark.parametrize("accept", ["application/json", "image/avif, Application/JSON;q=0.9"])
def test_an_explanation_in_numbers_comes_with_its_verdict(server: Server, accept: str) -> None:
    response = requests.post(f"{server.url}/explain", files={"image": FAMILIAR}, headers={"Accept": accept}, timeout=60)
    reply = response.json()
    evidence = np.array(reply["evidence"])
    assert reply["class_name"] == CLASS
    assert evidence.shape == ARTIFACT.config.input_size
    assert evidence.min() >= 0
    assert evidence.sum() == pytest.approx(1, abs=1e-3)
    assert evidence.max() > 2 * evidence.mean()  # some places count more than others


def test_an_image_that_cannot_be_explained_gets_the_usual_error(server: Server) -> None:
    assert classify(server, b"no image", "/explain").status_code == 415
    assert classify(server, FAMILIAR[:-200], "/explain").status_code == 400
