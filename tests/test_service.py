"""The real server over real HTTP; tests run in both topologies unless there is a reason not to."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import statistics
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import requests
from PIL import Image

from model import runtimes
from model.artifact import ONNX_INT8, QUANTISED, REFERENCE, Artifact, seal
from model.classifier import Classifier, Prediction
from model.preprocess import preprocess
from model.store import SHIPPED
from serving.metrics import REASONS
from tests.faults.server import RUNNER, workers
from tests.live import (
    LIMITS,
    LOG,
    Server,
    assert_error,
    await_workers,
    command,
    encode,
    environment,
    failed_start,
    free_port,
    picture,
    png_header,
    processes,
    python,
    running,
    samples,
    serve,
    store_model,
    total,
)
from tests.snippets import of_the_example

TIMEOUT = 60
"""Seconds; generous for a busy machine, as replies take milliseconds."""
SAME = 1e-4
"""Maximum difference between probabilities of the same image. Measured: none, in INT8 and FP32, for batches of 1 to 64,
because integer sums are exact in any order. It allows for the reply's rounding and for float layers elsewhere."""

ARTIFACT = Artifact.load(SHIPPED)
CLASSIFIER = Classifier(ARTIFACT.config, ARTIFACT.reference(ONNX_INT8))
TAG = f"{ARTIFACT.config.name}:{ARTIFACT.version}"
JPEG = encode(picture(), "JPEG")


@cache
def engine() -> runtimes.Runtime:
    return runtimes.create(ONNX_INT8, ARTIFACT)


def predict(data: bytes) -> Prediction:
    """This process's own prediction for an image."""
    pixels = preprocess(data, ARTIFACT.config.input_size)
    return CLASSIFIER(engine()(pixels[None]))[0]


def post(url: str, path: str = "/classify", **options: Any) -> requests.Response:
    return requests.post(f"{url}{path}", timeout=TIMEOUT, **options)


def post_raw(url: str, data: bytes = JPEG, content_type: str = "image/jpeg", **headers: str) -> requests.Response:
    return post(url, data=data, headers={"Content-Type": content_type, **headers})


def files(images: list[bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(images)]


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def assert_says(result: dict[str, Any], data: bytes) -> None:
    """Check a result for the image ``data``: the whole contract, and the same answer as in this process."""
    classes = ARTIFACT.config.classes
    assert set(result) == {
        "predicted_class",
        "class_name",
        "confidence",
        "all_probabilities",
        "in_distribution",
        "model",
        "request_id",
    }
    assert result["in_distribution"] is predict(data).in_distribution
    probabilities = result["all_probabilities"]
    assert list(probabilities) == [str(i) for i in range(len(classes))]
    assert sum(probabilities.values()) == pytest.approx(1)  # to within a millionth
    assert all(0 <= p <= 1 for p in probabilities.values())
    assert result["confidence"] == max(probabilities.values()) == probabilities[str(result["predicted_class"])]
    assert result["class_name"] == classes[result["predicted_class"]]
    assert result["model"] == TAG
    np.testing.assert_allclose(list(probabilities.values()), predict(data).probabilities, atol=SAME)


# --- accepted requests ---

FORMS: dict[str, dict[str, Any]] = {
    "multipart": {"files": {"image": ("x.jpg", JPEG, "image/jpeg")}},
    "multipart with text": {"files": {"image": JPEG}, "data": {"note": "hello"}},
    "multipart of an unknown type": {"files": {"image": ("x", JPEG, "application/octet-stream")}},
    "raw": {"data": JPEG, "headers": {"Content-Type": "image/jpeg"}},
    "raw of another type": {"data": JPEG, "headers": {"Content-Type": "image/png"}},
    "chunked": {"data": iter([JPEG[:100], JPEG[100:]]), "headers": {"Content-Type": "image/jpeg"}},
    "base64": {"json": {"image": base64_of(JPEG)}},
    "base64 in lines": {"json": {"image": base64.encodebytes(JPEG).decode()}},
    "data url": {"json": {"image": f"data:image/jpeg;base64,{base64_of(JPEG)}"}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_request_form_gets_the_full_reply(server: Server, form: str) -> None:
    options = FORMS[form]
    if form == "chunked":
        options = {**options, "data": iter([JPEG[:100], JPEG[100:]])}
    response = post(server.url, **options)
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert_says(response.json(), JPEG)
    assert response.json()["request_id"] == response.headers["X-Request-ID"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_image_format_is_accepted(server: Server, kind: str) -> None:
    data = encode(picture(3, 120, 90), kind)
    response = post_raw(server.url, data)
    assert response.status_code == 200
    assert_says(response.json(), data)


def test_a_large_photograph_is_accepted(server: Server) -> None:
    data = encode(picture(4, 2000, 3000), "JPEG", quality=90)
    assert len(data) > 100_000
    assert_says(post_raw(server.url, data).json(), data)


@pytest.mark.parametrize("sent", ["a", "trace-1.2_3", "0" * 64])
def test_a_harmless_request_id_is_kept(server: Server, sent: str) -> None:
    for response in (
        post_raw(server.url, **{"X-Request-ID": sent}),
        post_raw(server.url, b"no image", **{"X-Request-ID": sent}),
        requests.get(f"{server.url}/nowhere", headers={"X-Request-ID": sent}, timeout=TIMEOUT),
    ):
        body = response.json()
        assert response.headers["X-Request-ID"] == sent
        assert body.get("error", body)["request_id"] == sent


@pytest.mark.parametrize("sent", ["", "x" * 65, "a b", 'a"b', "{}", "<script>", "../x", "%0a", "${jndi:x}", "é"])
def test_a_hostile_request_id_is_replaced(server: Server, sent: str) -> None:
    response = requests.post(
        f"{server.url}/classify",
        data=JPEG,
        headers={"Content-Type": "image/jpeg", "X-Request-ID": sent.encode()},
        timeout=TIMEOUT,
    )
    assert response.status_code == 200
    assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])
    assert response.json()["request_id"] == response.headers["X-Request-ID"]


def test_request_ids_differ(server: Server) -> None:
    assert len({post_raw(server.url).headers["X-Request-ID"] for _ in range(5)}) == 5


def test_a_batch_keeps_its_order_in_both_forms(server: Server) -> None:
    images = [encode(picture(i)) for i in range(10)]
    assert len({predict(image).probabilities.tobytes() for image in images}) == 10
    for options in ({"files": files(images)}, {"json": {"images": [base64_of(image) for image in images]}}):
        response = post(server.url, "/classify/batch", **options)
        assert response.status_code == 200, response.text
        results = response.json()["results"]
        assert len(results) == 10
        for result, image in zip(results, images, strict=True):
            assert_says(result, image)
            assert result["request_id"] == response.headers["X-Request-ID"]


def test_one_bad_image_among_64_fails_alone(server: Server) -> None:
    images = [encode(picture(i)) for i in range(64)]
    images[40] = images[40][: len(images[40]) // 2]
    results = post(server.url, "/classify/batch", files=files(images)).json()["results"]
    assert len(results) == 64
    for i, (result, image) in enumerate(zip(results, images, strict=True)):
        if i == 40:
            assert set(result) == {"error"}
            assert result["error"]["code"] == "invalid_image"
        else:
            assert_says(result, image)


def test_a_batch_of_only_bad_images_is_answered(server: Server) -> None:
    values = [
        "!",
        "http://127.0.0.1:9/x.png",
        base64_of(b"text"),
        base64_of(JPEG[:-20]),
        None,
        base64_of(png_header(60_000, 60_000)),
    ]
    response = post(server.url, "/classify/batch", json={"images": values})
    assert response.status_code == 200
    codes = [result["error"]["code"] for result in response.json()["results"]]
    assert codes == [
        "invalid_request",
        "invalid_request",
        "unsupported_media_type",
        "invalid_image",
        "invalid_request",
        "too_many_pixels",
    ]


def test_the_model_card_describes_the_served_model(server: Server) -> None:
    card = requests.get(f"{server.url}/model", timeout=TIMEOUT).json()
    config = ARTIFACT.config
    assert card["name"] == config.name
    assert card["version"] == ARTIFACT.version
    assert card["runtime"] == "onnx-int8"
    assert card["topology"] == server.topology
    assert card["classes"] == list(config.classes)
    assert card["input_size"] == list(config.input_size)
    assert {key: card[key] for key in ARTIFACT.card if key != "files"} == {
        key: value for key, value in ARTIFACT.card.items() if key != "files"
    }


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_health_checks_succeed(server: Server, path: str) -> None:
    assert requests.get(f"{server.url}{path}", timeout=TIMEOUT).status_code == 200


def test_the_api_description_names_both_endpoints(server: Server) -> None:
    paths = requests.get(f"{server.url}/docs.json", timeout=TIMEOUT).json()["paths"]
    for path, field in (("/classify", "image"), ("/classify/batch", "images")):
        content = paths[path]["post"]["requestBody"]["content"]
        assert field in json.dumps(content)


CLIENT = """
import json, sys
from pathlib import Path
import bentoml

url, first, *others = sys.argv[1:]
with bentoml.SyncHTTPClient(url) as client:
    answers = [
        client.classify(image=Path(first)),
        client.classify_batch(images=[Path(first), *map(Path, others)]),
        {"picture": client.explain(image=Path(first)).read_bytes().hex()},
    ]
print(json.dumps([a if isinstance(a, dict) else a.model_dump() for a in answers]))
"""


def test_bentomls_own_client_works(server: Server, tmp_path: Path) -> None:
    """In a process of its own, because it warns of its own deprecations and leaks a temporary folder."""
    first, second, broken = tmp_path / "a.jpg", tmp_path / "b.png", tmp_path / "c.png"
    first.write_bytes(JPEG)
    second.write_bytes(encode(picture(1)))
    broken.write_bytes(b"broken")
    single, several, explained = json.loads(python(tmp_path, "-c", CLIENT, server.url, first, second, broken).stdout)
    assert_says(single, JPEG)
    assert_says(several["results"][0], JPEG)
    assert_says(several["results"][1], second.read_bytes())
    assert several["results"][2]["error"]["code"] == "unsupported_media_type"
    assert Image.open(io.BytesIO(bytes.fromhex(explained["picture"]))).format == "PNG"


# --- refused requests ---


class Case(NamedTuple):
    """A request that must be refused, with the expected error."""

    status: int
    code: str
    options: Callable[[], dict[str, Any]]
    path: str = "/classify"


def raw(body: bytes, content_type: str, **headers: str) -> Callable[[], dict[str, Any]]:
    return lambda: {"data": body, "headers": {"Content-Type": content_type, **headers}}


def form(**parts: bytes) -> Callable[[], dict[str, Any]]:
    return lambda: {"files": parts}


def pieces(size: int) -> Iterator[bytes]:
    """A body without an announced length, in chunks."""
    for _ in range(size // 10_000):
        yield b"x" * 10_000


def chunked(size: int, content_type: str) -> Callable[[], dict[str, Any]]:
    return lambda: {"data": pieces(size), "headers": {"Content-Type": content_type}}


BODY, IMAGE, COUNT = LIMITS["MAX_BODY_BYTES"], LIMITS["MAX_IMAGE_BYTES"], LIMITS["MAX_REQUEST_IMAGES"]
BOUNDED = "multipart/form-data; boundary=b"
REQUEST, PICTURE, TYPE = "invalid_request", "invalid_image", "unsupported_media_type"
CASES = {
    "missing form field": Case(400, REQUEST, form(other=JPEG)),
    "form cut short": Case(
        400, REQUEST, raw(b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + JPEG, BOUNDED)
    ),
    "empty body": Case(400, REQUEST, raw(b"", "application/json")),
    "broken json": Case(400, REQUEST, raw(b'{"image": ', "application/json")),
    "bad base64": Case(400, REQUEST, lambda: {"json": {"image": "%%%"}}),
    "empty batch": Case(400, REQUEST, lambda: {"json": {"images": []}}, "/classify/batch"),
    "truncated jpeg": Case(400, PICTURE, raw(encode(picture(0, 300, 300), "JPEG")[:-500], "image/jpeg")),
    "truncated png": Case(400, PICTURE, form(image=encode(picture(0, 300, 300))[:-500])),
    "truncated large jpeg": Case(400, PICTURE, raw(encode(picture(0, 2000, 2000), "JPEG")[:-5000], "image/jpeg")),
    "empty raw body": Case(400, PICTURE, raw(b"", "image/jpeg")),
    "empty part": Case(400, PICTURE, form(image=b"")),
    "empty base64": Case(400, PICTURE, lambda: {"json": {"image": ""}}),
    "header without pixels": Case(400, PICTURE, raw(png_header(100, 100), "image/png")),
    "raw over the limit": Case(413, "too_large", raw(b"x" * (IMAGE + 1), "image/jpeg")),
    "form over the limit": Case(413, "too_large", raw(b"x" * (BODY + 1), BOUNDED)),
    "json over the limit": Case(413, "too_large", raw(b" " * (BODY + 1), "application/json")),
    "far over the limit": Case(413, "too_large", raw(b"x" * 10 * BODY, "image/jpeg")),
    "chunked raw over the limit": Case(413, "too_large", chunked(2 * IMAGE, "image/jpeg")),
    "chunked form over the limit": Case(413, "too_large", chunked(2 * BODY, BOUNDED)),
    "one part over the limit": Case(413, "too_large", form(image=b"x" * (IMAGE + 1))),
    "too many images": Case(413, "too_large", lambda: {"files": files([JPEG] * (COUNT + 1))}, "/classify/batch"),
    "too many in json": Case(413, "too_large", lambda: {"json": {"images": ["aGk="] * (COUNT + 1)}}, "/classify/batch"),
    "too many pixels": Case(413, "too_many_pixels", raw(png_header(60_000, 60_000), "image/png")),
    "too many pixels in a form": Case(413, "too_many_pixels", form(image=png_header(60_000, 60_000))),
    "text": Case(415, TYPE, raw(b"hello", "text/plain")),
    "no content type": Case(415, TYPE, lambda: {"data": b"hello"}),
    "urlencoded": Case(415, TYPE, lambda: {"data": {"image": "aGk="}}),
    "gzip": Case(415, TYPE, raw(zlib.compress(JPEG, wbits=31), "image/jpeg", **{"Content-Encoding": "gzip"})),
    "svg": Case(415, TYPE, raw(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml")),
    "pdf": Case(415, TYPE, form(image=b"%PDF-1.7\n1 0 obj\n")),
    "text called jpeg": Case(415, TYPE, raw(b"hello, world", "image/jpeg")),
    "raw image as a batch": Case(415, TYPE, raw(JPEG, "image/jpeg"), "/classify/batch"),
    "unknown path": Case(404, "not_found", raw(JPEG, "image/jpeg"), "/predict"),
    "path below": Case(404, "not_found", raw(JPEG, "image/jpeg"), "/classify/other"),
}


# Ways to get a form or a document wrong that end in the same error are in test_requests.py.
@pytest.mark.parametrize("name", CASES)
def test_every_mistake_gets_its_own_error_and_does_no_harm(server: Server, name: str) -> None:
    case = CASES[name]
    assert_error(post(server.url, case.path, **case.options()), case.status, case.code)
    assert post_raw(server.url).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/classify"), ("PUT", "/classify/batch"), ("POST", "/model")])
def test_other_methods_are_405_and_name_the_allowed_one(server: Server, method: str, path: str) -> None:
    response = requests.request(method, f"{server.url}{path}", timeout=TIMEOUT)
    assert_error(response, 405, "method_not_allowed")
    assert ("GET" if path == "/model" else "POST") in response.headers["Allow"]
    assert f"expected {response.headers['Allow']}" in response.json()["error"]["message"]


def test_urls_are_refused_and_never_fetched(server: Server) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.jpg"
        assert_error(post(server.url, json={"image": url}), 400, REQUEST)
        assert_error(post(server.url, files={"image": (None, url)}), 415, TYPE)
        assert_error(post(server.url, files={"image": ("x.jpg", url.encode(), "image/jpeg")}), 415, TYPE)
        assert_error(post_raw(server.url, url.encode()), 415, TYPE)
        assert_error(post(server.url, data={"image": url}), 415, TYPE)
        batch = post(server.url, "/classify/batch", json={"images": [url]}).json()
        assert batch["results"][0]["error"]["code"] == REQUEST
        batch = post(server.url, "/classify/batch", files=[("images", (None, url))]).json()
        assert batch["results"][0]["error"]["code"] == TYPE
        listener.settimeout(0.5)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_caller_that_hangs_up_is_not_a_server_error(server: Server) -> None:
    before = samples(server.url)
    port = int(server.url.rpartition(":")[2])
    for content_type in ("image/jpeg", "application/json", BOUNDED):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: 5000\r\n\r\n"
            connection.sendall(head.encode() + b"x" * 100)
            time.sleep(0.2)
    time.sleep(0.3)
    after = samples(server.url)
    assert total(after, "classifier_rejected_total", reason="internal") == total(
        before, "classifier_rejected_total", reason="internal"
    )
    assert post_raw(server.url).status_code == 200


# --- metrics and processes ---

FAMILIES = {
    "classifier_stage_seconds": "histogram",
    "classifier_batch_images": "histogram",
    "classifier_images_total": "counter",
    "classifier_confidence": "histogram",
    "classifier_rejected_total": "counter",
    "classifier_queue_images": "gauge",
    "classifier_model_info": "gauge",
    "bentoml_service_request_total": "counter",
    "bentoml_service_request_duration_seconds": "histogram",
}


def test_every_metric_family_is_exposed(server: Server) -> None:
    post_raw(server.url)
    post_raw(server.url, b"no image")
    text = requests.get(f"{server.url}/metrics", timeout=TIMEOUT).text
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert {name: types.get(name) for name in FAMILIES} == FAMILIES
    values = samples(server.url)
    stages = set(re.findall(r'classifier_stage_seconds_count\{stage="(\w+)"\}', text))
    assert stages == {"read", "decode", "classify", "infer", "reply"}
    labels = {
        "model": ARTIFACT.config.name,
        "version": ARTIFACT.version,
        "runtime": "onnx-int8",
        "topology": server.topology,
    }
    assert total(values, "classifier_model_info", **labels) == 1


def test_bentoml_counts_and_times_each_request_once(server: Server) -> None:
    """Whether it goes straight to its endpoint, as a POST does, or through BentoML's application."""
    before = samples(server.url)
    for _ in range(3):
        assert post_raw(server.url).status_code == 200
    for _ in range(2):
        assert post_raw(server.url, b"\x89PNG\r\n\x1a\n but no more").status_code == 400
    assert requests.get(f"{server.url}/classify", timeout=TIMEOUT).status_code == 405
    after = samples(server.url)
    for name in ("request_total", "request_duration_seconds_count"):
        for code, count in (("200", 3), ("400", 2), ("405", 1)):
            labels = {"endpoint": "/classify", "http_response_code": code, "runner_name": "classifier"}
            grown = total(after, f"bentoml_service_{name}", **labels) - total(
                before, f"bentoml_service_{name}", **labels
            )
            assert (name, code, grown) == (name, code, count)
    assert total(after, "bentoml_service_request_in_progress", endpoint="/classify") == 0


def test_counters_are_exposed_at_0_before_their_first_event(server: Server) -> None:
    """`increase()` of a counter that first appears at 1 is 0: an alert would miss the first event of its kind."""
    text = requests.get(f"{server.url}/metrics", timeout=TIMEOUT).text
    assert set(REASONS) <= set(re.findall(r'classifier_rejected_total\{reason="(\w+)"\}', text))
    assert set(re.findall(r'classifier_images_total\{class_name="([^"]+)"\}', text)) == set(ARTIFACT.config.classes)
    assert re.search(r'bentoml_service_request_total\{endpoint="/classify",http_response_code="503",.*\} 0\.0', text)
    expected = re.findall(r"classifier_drift_expected_share(\{.+?\})", text)
    assert set(re.findall(r"classifier_drift_images_total(\{.+?\})", text)) == set(expected)


def test_images_are_counted_exactly_across_all_workers(server: Server) -> None:
    before = samples(server.url)
    images = [encode(picture(i)) for i in range(48)]
    verdicts = Counter(predict(image).class_name for image in images)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda image: post_raw(server.url, image), images))
    assert [reply.status_code for reply in replies] == [200] * 48
    assert post(server.url, "/classify/batch", files=files([*images[:10], b"no image"])).status_code == 200
    verdicts.update(predict(image).class_name for image in images[:10])
    after = samples(server.url)

    def growth(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    for class_name in ARTIFACT.config.classes:
        assert growth("classifier_images_total", class_name=class_name) == verdicts[class_name]
    assert growth("classifier_confidence_count") == 58
    assert growth("classifier_batch_images_sum") == 58
    assert growth("classifier_stage_seconds_count", stage="read") == 49
    assert growth("classifier_stage_seconds_count", stage="decode") == 49
    assert growth("classifier_rejected_total", reason=TYPE) == 1
    assert total(after, "classifier_queue_images") == 0


def test_the_queue_is_measured_while_a_runner_hangs(tmp_path: Path) -> None:
    with serve("runner", tmp_path, WORKERS=1, MAX_BATCH=16) as url, ThreadPoolExecutor(4) as pool:
        (runner,) = workers(tmp_path, RUNNER)
        os.kill(runner, signal.SIGSTOP)
        replies = [pool.submit(post, url, "/classify/batch", files=files([JPEG] * 64)) for _ in range(4)]
        deadline, waiting = time.monotonic() + TIMEOUT, 0.0
        while waiting != 192 and time.monotonic() < deadline:  # the other 64 are at the runner, as four batches
            time.sleep(0.1)
            waiting = total(samples(url), "classifier_queue_images")
        os.kill(runner, signal.SIGCONT)
        assert waiting == 192
        assert [reply.result().status_code for reply in replies] == [200] * 4
        assert total(samples(url), "classifier_queue_images") == 0


def test_refusals_are_counted_by_reason(server: Server) -> None:
    before = samples(server.url)
    post(server.url, json={"image": 7})
    post_raw(server.url, JPEG[:-20])
    post_raw(server.url, png_header(60_000, 60_000))
    requests.get(f"{server.url}/nowhere", timeout=TIMEOUT)
    after = samples(server.url)
    for reason in (REQUEST, PICTURE, "too_many_pixels", "not_found"):
        name = "classifier_rejected_total"
        assert total(after, name, reason=reason) - total(before, name, reason=reason) == 1, reason


@pytest.mark.parametrize("prefix", ["/x", "/classify/", "/static_content/x", "/model/", "/metrics/", "//", "/%0a"])
def test_unknown_paths_create_no_metric_series(server: Server, prefix: str) -> None:
    """Otherwise a scan of paths could fill the memory of the server and of Prometheus."""
    requests.get(f"{server.url}{prefix}first", timeout=TIMEOUT)
    before = set(samples(server.url))
    for i in range(5):
        response = requests.get(f"{server.url}{prefix}{i}", timeout=TIMEOUT)
        assert_error(response, 404, "not_found")
    assert set(samples(server.url)) - before == set()


def test_no_process_loads_torch_or_uses_much_memory(server: Server) -> None:
    post_raw(server.url)
    family = processes(server.home)
    assert len(family) >= 1 + 2 + (server.topology == "runner")
    mapped = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in family}
    assert sum("onnxruntime" in text for text in mapped.values()) >= (2 if server.topology == "embedded" else 1)
    for pid, text in mapped.items():
        assert "libtorch" not in text, pid
        status = Path(f"/proc/{pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert resident
        assert int(resident[1]) < 300_000, pid


def test_simultaneous_connections_are_spread_over_the_workers(server: Server) -> None:
    """A worker keeps the connections that it accepts: without this, one worker and its core could be left idle.

    Where other work takes a worker's core, it gets none of a round's, so the median counts.
    """
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    together, fewest = 32, []
    for _ in range(9):
        clients = [socket.create_connection(address, TIMEOUT) for _ in range(together)]
        fewest.append(min(accepted_by_each_worker(server, clients)))
        for client in clients:
            client.close()
        time.sleep(0.2)
    assert statistics.median(fewest) >= together / 4, fewest


def accepted_by_each_worker(server: Server, clients: Sequence[socket.socket]) -> list[int]:
    """How many of ``clients`` each of two workers has accepted, once all are."""
    ports = {client.getsockname()[1] for client in clients}
    deadline = time.monotonic() + TIMEOUT
    while sum(taken := sorted(len(ports & peers(pid)) for pid in processes(server.home))[-2:]) < len(clients):
        assert time.monotonic() < deadline, taken
        time.sleep(0.1)
    return taken


def peers(pid: int) -> set[int]:
    """Remote ports of a process's TCP connections."""
    return {one.raddr.port for one in psutil.Process(pid).net_connections("tcp4") if one.raddr}


@pytest.mark.parametrize("topology", ["embedded", "runner"])
def test_every_worker_verifies_its_engine_unasked(topology: str, tmp_path: Path) -> None:
    with serve(topology, tmp_path, WORKERS=3):  # whose readiness check asks only one of them
        await_workers(tmp_path, 3)


def test_the_log_has_one_json_line_per_request(server: Server) -> None:
    sent = [f"log-test-{server.topology}-{i}" for i in range(5)]
    for request_id in sent:
        post_raw(server.url, **{"X-Request-ID": request_id})
    post_raw(server.url, b"no image", **{"X-Request-ID": f"{sent[0]}-bad"})
    time.sleep(0.5)
    # Not ours: the first line, by the process that starts the workers, and libpng's messages about broken images.
    lines = (server.home / LOG).read_text().splitlines()
    records = [json.loads(line) for line in lines if "[cli]" not in line and not line.startswith("libpng error: ")]
    # A worker's first request makes it verify its engine and log that.
    records = [r for r in records if r["logger"] not in ("classifier.service", "classifier.readiness")]
    for request_id in sent:
        (record,) = [r for r in records if r["request_id"] == request_id]
        assert (record["method"], record["path"], record["status"]) == ("POST", "/classify", 200)
        assert record["ms"] > 0
    (bad,) = [r for r in records if r["request_id"] == f"{sent[0]}-bad"]
    assert (bad["status"], bad["code"]) == (415, TYPE)


# --- concurrency and lifecycle ---


def test_five_hundred_requests_at_concurrency_sixteen_are_answered(server: Server) -> None:
    images = [encode(picture(i), "JPEG") for i in range(20)]
    with requests.Session() as session, ThreadPoolExecutor(16) as pool:
        session.mount("http://", requests.adapters.HTTPAdapter(pool_connections=16, pool_maxsize=16))

        def ask(number: int) -> requests.Response:
            return session.post(
                f"{server.url}/classify",
                data=images[number % 20],
                headers={"Content-Type": "image/jpeg"},
                timeout=TIMEOUT,
            )

        replies = list(pool.map(ask, range(500)))
    assert Counter(reply.status_code for reply in replies) == {200: 500}
    for number, reply in enumerate(replies):
        assert_says(reply.json(), images[number % 20])


def test_overload_is_answered_429_and_the_service_recovers(tmp_path: Path) -> None:
    images = files([encode(picture(i)) for i in range(8)])
    small = {"MAX_QUEUE": 8, "MAX_REQUEST_IMAGES": 8, "MAX_BATCH": 2}
    with serve("embedded", tmp_path, **small) as url:
        with ThreadPoolExecutor(32) as pool:
            replies = list(pool.map(lambda _: post(url, "/classify/batch", files=images), range(160)))
        assert set(Counter(reply.status_code for reply in replies)) == {200, 429}
        for reply in replies:
            if reply.status_code == 429:
                assert_error(reply, 429, "overloaded")
                assert 1 <= int(reply.headers["Retry-After"]) < 60
            else:
                assert all("error" not in result for result in reply.json()["results"])
        refused = sum(reply.status_code == 429 for reply in replies)
        for _ in range(10):
            assert post(url, "/classify/batch", files=images).status_code == 200
        values = samples(url)
        assert total(values, "classifier_rejected_total", reason="overloaded") == refused
        for name in ("request_total", "request_duration_seconds_count"):
            assert total(values, f"bentoml_service_{name}", http_response_code="429") == refused
        assert total(values, "classifier_queue_images") == 0
        assert total(values, "classifier_batch_limit_images") == small["MAX_BATCH"]
        # The views of an image that is explained are more than the queue holds.
        assert post(url, "/explain", files={"image": JPEG}).status_code == 200


def test_photographs_that_would_wait_too_long_are_429_while_small_images_pass(tmp_path: Path) -> None:
    photograph = encode(picture(4, 2000, 3000), "JPEG", quality=90)
    with serve("embedded", tmp_path, WORKERS=1, MAX_WAIT=0.3) as url, ThreadPoolExecutor(40) as pool:
        assert post_raw(url, photograph).status_code == 200
        replies = [pool.submit(post_raw, url, photograph) for _ in range(80)]
        beside = [post_raw(url) for _ in range(10)]
        statuses = Counter(reply.result().status_code for reply in replies)
        assert set(statuses) == {200, 429}
        assert {reply.status_code for reply in beside} == {200}
        assert total(samples(url), "classifier_rejected_total", reason="overloaded") == statuses[429]
        assert post_raw(url, photograph).status_code == 200


def test_a_burst_right_after_the_start_is_answered(tmp_path: Path) -> None:
    """Only one worker has answered the readiness check: the other must not refuse while it verifies its engine."""
    with serve("embedded", tmp_path, LOG_REQUESTS="false") as url:
        with ThreadPoolExecutor(64) as pool:
            replies = list(pool.map(lambda _: post_raw(url), range(256)))
        assert Counter(reply.status_code for reply in replies) == {200: 256}
    assert "/classify" not in (tmp_path / LOG).read_text()


def test_a_caller_may_request_a_shorter_deadline(embedded: Server) -> None:
    images = files([encode(picture(i, 600, 600), "JPEG") for i in range(32)])
    before = samples(embedded.url)
    late = post(embedded.url, "/classify/batch", files=images, headers={"X-Request-Timeout": "0.001"})
    assert_error(late, 504, "deadline_exceeded")
    assert "within 0.001 s" in late.json()["error"]["message"]
    assert post(embedded.url, "/classify/batch", files=images, headers={"X-Request-Timeout": "50"}).status_code == 200
    after = samples(embedded.url)
    for reason, count in (("caller_deadline", 1), ("deadline_exceeded", 0)):
        name = "classifier_rejected_total"
        assert total(after, name, reason=reason) - total(before, name, reason=reason) == count
    for nonsense in ("soon", "0", "-1", "nan"):
        refused = post(embedded.url, files={"image": JPEG}, headers={"X-Request-Timeout": nonsense})
        assert_error(refused, 400, "invalid_request")
        assert nonsense in refused.json()["error"]["message"]


def test_nothing_is_computed_for_a_client_that_hung_up(tmp_path: Path) -> None:
    """Its request was read, but waited while the engine was busy with a large batch."""
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(JPEG)
    large = files([JPEG] * 256)
    with serve("embedded", tmp_path, WORKERS=1, MAX_BATCH=256) as url, ThreadPoolExecutor(1) as background:
        port = int(url.rpartition(":")[2])
        for _ in range(20):
            answer = background.submit(post, url, "/classify/batch", files=large)
            time.sleep(0.05)
            for _ in range(8):
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(head + JPEG)
                time.sleep(0.005)
            assert answer.result().status_code == 200
            values = samples(url)
            if total(values, "classifier_rejected_total", reason="disconnected"):
                break
        assert total(values, "classifier_rejected_total", reason="disconnected") > 0


def test_a_missed_deadline_is_504(tmp_path: Path) -> None:
    with serve("embedded", tmp_path, REQUEST_TIMEOUT=0.0001) as url:
        images = files([encode(picture(i)) for i in range(64)])
        assert_error(post(url, "/classify/batch", files=images), 504, "deadline_exceeded")
        assert requests.get(f"{url}/readyz", timeout=TIMEOUT).status_code == 200
        time.sleep(0.5)
        values = samples(url)
        assert total(values, "classifier_rejected_total", reason="deadline_exceeded") == 1
        assert total(values, "classifier_queue_images") == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"RUNTIME": "tpu"}, "RUNTIME='tpu'; expected one of auto, fastest, torch, onnx, onnx-int8"),
        ({"MODEL": "nope:1"}, "MODEL='nope:1'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_settings_stop_the_start_with_one_line(
    tmp_path: Path, settings: dict[str, str], expected: str
) -> None:
    """One for the settings and one for the model: test_settings.py has the others."""
    (line,) = failed_start(tmp_path, **settings)
    assert re.search(f"^error: .*{expected}", line)


@of_the_example
def test_test_pictures_have_different_classes() -> None:
    """Otherwise comparing replies with predictions would prove little."""
    assert len({predict(encode(picture(i))).class_index for i in range(48)}) > 1


def test_a_finished_request_leaks_no_memory(server: Server) -> None:
    """Four kilobytes per request would go unnoticed in a test, but fill a machine within a day."""

    def resident() -> int:
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in processes(server.home))

    def send(count: int) -> None:
        with requests.Session() as session:
            for _ in range(count):
                assert session.post(f"{server.url}/classify", json={}, timeout=TIMEOUT).status_code == 400

    def growth() -> int:
        before = resident()
        send(3000)
        return resident() - before

    # At first the engines still measure their batches; a leak shows up every time.
    assert any(growth() < 3000 * 1024 for _ in range(4))


@pytest.mark.parametrize("topology", ["embedded", "runner"])
def test_an_engine_with_wrong_results_is_never_ready_and_logs_it_once(topology: str, tmp_path: Path) -> None:
    """As on a processor that computes differently; here, the reference outputs are altered instead."""
    path = shutil.copytree(ARTIFACT.path, tmp_path / "artifact")
    for suffix in ("", QUANTISED):
        with np.load(path / REFERENCE, allow_pickle=False) as kept:
            arrays = dict(kept)
        arrays["outputs" + suffix] += 5
        np.savez_compressed(path / REFERENCE, allow_pickle=False, **arrays)
    seal(path, ARTIFACT.card)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    home = tmp_path / "home"
    env = environment(home, TOPOLOGY=topology, WORKERS=1, RUNTIME="onnx-int8", MODEL=store_model(home, path))
    log = tmp_path / LOG

    def has_said_so() -> bool:
        return (
            requests.get(f"{url}/readyz", timeout=5).status_code == 503
            and "differs from the reference" in log.read_text()
        )

    with running(command(port), env, log, has_said_so):
        for _ in range(5):
            assert_error(post_raw(url), 503, "not_ready")
        assert requests.get(f"{url}/livez", timeout=5).status_code == 200
    lines = log.read_text()
    assert "Traceback" not in lines
    (critical,) = (line for line in lines.splitlines() if '"CRITICAL"' in line)
    assert json.loads(critical)["process"] == {"embedded": "api-1", "runner": "runner-1"}[topology]
