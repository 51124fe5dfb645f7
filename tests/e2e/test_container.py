"""The CPU image, built and run as in production: non-root, no capabilities, only /tmp writable.

make e2e                # builds the image if it is missing
make image-cpu e2e      # rebuilds it
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import requests

from tests.e2e.docker import docker, has_image, jpeg, process_statuses

BASE_IMAGE = "python:3.11-slim"
MAX_OVER_BASE = 500e6
READY_SECONDS = 120
STOP_SECONDS = 30
RESTORED_SECONDS = 10
HARDENED = (
    *("--read-only", "--tmpfs", "/tmp", "--env", "BENTOML_HOME=/tmp/bentoml"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
)


@dataclass(frozen=True)
class Container:
    id: str
    url: str
    seconds_to_ready: float

    def run(self, script: str, code: int | None = 0) -> str:
        return docker("exec", self.id, "sh", "-c", script, code=code)


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[Container]:
    started = time.monotonic()
    identity = docker("run", "--detach", "--publish", "127.0.0.1::3000", *HARDENED, image)
    try:
        address = docker("port", identity, "3000").splitlines()[0]
        wait_until_ready(identity, f"http://{address}")
        yield Container(identity, f"http://{address}", time.monotonic() - started)
    finally:
        docker("rm", "--force", identity)


def wait_until_ready(identity: str, url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            if requests.get(f"{url}/readyz", timeout=5).ok:
                return
        except (requests.ConnectionError, requests.Timeout):  # the socket opens before its workers are ready
            pass
        time.sleep(0.1)
    pytest.fail(f"not ready after {READY_SECONDS} s\n{docker('logs', identity)}")


def test_it_classifies(container: Container) -> None:
    reply = requests.post(f"{container.url}/classify", files={"image": ("disc.jpg", jpeg(), "image/jpeg")}, timeout=30)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    card = requests.get(f"{container.url}/model", timeout=30).json()
    probabilities = answer["all_probabilities"]
    assert answer["class_name"] == card["classes"][answer["predicted_class"]]
    assert answer["model"] == f"{card['name']}:{card['version']}"
    assert answer["confidence"] == max(probabilities.values())
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
    assert card["runtime"] == "onnx-int8"


def test_a_broken_image_is_a_client_error(container: Container) -> None:
    body = jpeg()[:100]
    reply = requests.post(f"{container.url}/classify", body, headers={"Content-Type": "image/jpeg"}, timeout=30)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_image")


def test_it_exposes_metrics(container: Container) -> None:
    requests.post(f"{container.url}/classify", jpeg(), headers={"Content-Type": "image/jpeg"}, timeout=30)
    lines = requests.get(f"{container.url}/metrics", timeout=30).text.splitlines()
    for metric in ("classifier_model_info{", "classifier_images_total{", "classifier_stage_seconds_count{"):
        assert any(line.startswith(metric) for line in lines), metric


def test_it_runs_without_privileges(container: Container) -> None:
    statuses = process_statuses(container.id)
    assert len(statuses) >= 2  # the parent and its workers
    for status in statuses:
        assert "0" not in status["Uid"].split()
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
    assert "Read-only file system" in container.run("touch /home/bentoml/bento/src/service.py", code=1)


def test_it_contains_neither_torch_nor_compilers(container: Container) -> None:
    packages = {package["name"] for package in json.loads(container.run("uv pip list --quiet --format json"))}
    assert {"bentoml", "onnxruntime"} <= packages
    assert not packages & {"torch", "torchvision", "triton", "nvidia-cublas"}
    assert container.run("command -v cc gcc g++ make git", code=None) == ""


def test_it_sends_no_usage_statistics(container: Container) -> None:
    """ONNX Runtime's telemetry warns on a read-only disk; if it is active, it does so when a model is loaded."""
    assert "loaded" in docker("logs", container.id)
    assert "telemetry" not in docker("logs", container.id)


def test_the_image_adds_little_to_its_base(
    container: Container, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    size = image_size(image)
    over_base = size - image_size(BASE_IMAGE)
    resident = [int(status["VmRSS"].split()[0]) / 1024 for status in process_statuses(container.id)]
    with capsys.disabled():
        print(
            f"\n{image}: {size / 1e6:.0f} MB, {over_base / 1e6:.0f} MB over {BASE_IMAGE}; "
            f"ready after {container.seconds_to_ready:.1f} s; "
            f"resident: {', '.join(f'{mib:.0f}' for mib in sorted(resident))} MiB"
        )
    assert over_base <= MAX_OVER_BASE


def image_size(name: str) -> int:
    """Bytes. Pulls the base image if only the builder has it."""
    if not has_image(name):
        docker("pull", "--quiet", name)
    return int(docker("image", "inspect", name, "--format", "{{.Size}}"))


def test_a_killed_worker_is_replaced(container: Container) -> None:
    """In a container, BentoML itself would leave it dead, unless it was the last."""
    find = "grep -l -e '[-]-worker-id' /proc/[0-9]*/cmdline | cut -d / -f 3"
    before = container.run(find).split()
    ups = docker("logs", container.id).count("Service classifier initialized")
    container.run(f"kill -9 {before[0]}")
    deadline = time.monotonic() + RESTORED_SECONDS
    while docker("logs", container.id).count("Service classifier initialized") == ups:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    after = container.run(find).split()
    assert len(after) == len(before)
    assert before[0] not in after


def test_it_stops_on_sigterm(container: Container) -> None:
    """Runs last, because it stops the container."""
    docker("stop", "--time", str(STOP_SECONDS), container.id)
    assert docker("inspect", container.id, "--format", "{{.State.ExitCode}} {{.State.OOMKilled}}") == "0 false"
