"""The stack of deploy/compose.yaml with two replicas and its own project name, ports and Nginx configuration."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import requests
import yaml

from tests import nginx
from tests.e2e.docker import ROOT, docker, has_image, jpeg
from tests.monitoring.stack import readable_by_debian

PROJECT = "classifier-e2e"
REPLICAS = 2
READY_SECONDS = 300
CERTIFICATE, API_KEY = ROOT / "deploy/secrets/tls_certificate", ROOT / "deploy/secrets/api_key"
STAND_INS = {
    "prom/blackbox-exporter": """
        FROM python:3.11-slim
        RUN apt-get update && apt-get install --yes --no-install-recommends prometheus-blackbox-exporter
        ENTRYPOINT ["prometheus-blackbox-exporter"]
    """
}
"""Built from Debian's package on our own image's base, where the public image is out of reach."""


@dataclass(frozen=True)
class Stack:
    command: tuple[str, ...]
    environment: dict[str, str]
    services: tuple[str, ...]
    alertmanager_config: Path

    def compose(self, *arguments: str) -> None:
        environment = {**os.environ, **self.environment}
        done = subprocess.run((*self.command, *arguments), env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def url(self) -> str:
        return f"https://localhost:{self.environment['HTTPS_PORT']}"

    @property
    def prometheus(self) -> str:
        return f"http://localhost:{self.environment['PROMETHEUS_PORT']}"

    @property
    def alertmanager(self) -> str:
        return f"http://localhost:{self.environment['ALERTMANAGER_PORT']}"

    @cached_property
    def nginx_version(self) -> tuple[int, ...]:
        return nginx.version(docker("exec", self.container("nginx"), "nginx", "-v"))

    def containers(self, service: str | None = None) -> list[str]:
        """Ids of the running containers."""
        labels = [f"label=com.docker.compose.project={PROJECT}"]
        labels += [f"label=com.docker.compose.service={service}"] if service else []
        return docker(
            "ps", "--quiet", "--no-trunc", *(part for label in labels for part in ("--filter", label))
        ).split()

    def container(self, service: str) -> str:
        return self.containers(service)[0]

    def logs(self, service: str) -> list[dict[str, Any]]:
        """The JSON lines logged by all containers of ``service``."""
        lines = [line for identity in self.containers(service) for line in docker("logs", identity).splitlines()]
        return [json.loads(line) for line in lines if line.startswith("{")]

    @property
    def reloads_nginx(self) -> bool:
        """Whether its Nginx is too old to discover replicas by itself."""
        return self.nginx_version < nginx.RESOLVES

    def find_replicas(self) -> None:
        """Reload an Nginx that does not discover new replicas by itself."""
        if self.reloads_nginx:
            docker("exec", self.container("nginx"), "nginx", "-s", "reload")


def inspect(identity: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(docker("inspect", identity))[0]
    return document


def address(identity: str) -> str:
    """``host:port`` of a replica, as Nginx logs it."""
    return f"{inspect(identity)['NetworkSettings']['Networks'][f'{PROJECT}_service']['IPAddress']}:3000"


def wait_until_healthy(identity: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if inspect(identity)["State"].get("Health", {"Status": "healthy"})["Status"] == "healthy":
            return
        time.sleep(0.5)
    raise AssertionError(f"not healthy after {READY_SECONDS} s\n{docker('logs', '--tail', '50', identity)}")


@contextmanager
def running(image: str, folder: Path) -> Iterator[Stack]:
    """``folder`` receives the configurations of Nginx and Alertmanager."""
    subprocess.run(ROOT / "deploy/secrets.sh", check=True)
    images = {name: s["image"] for name, s in services().items() if name not in ("classifier", "nginx")}
    proxy = nginx_image()
    alertmanager = alertmanager_configuration(folder / "alertmanager")
    stack = Stack(
        command=command(),
        environment={
            "CLASSIFIER_IMAGE": image,
            "REPLICAS": str(REPLICAS),
            "NGINX_IMAGE": proxy,
            "NGINX_CONFIG": str(nginx.configuration(folder / "nginx", nginx.version(run(proxy, "nginx", "-v")))),
            "ALERTMANAGER_CONFIG": str(alertmanager.parent),
            **{name: free_port() for name in ("HTTP_PORT", "HTTPS_PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT")},
            "GRAFANA_PORT": free_port(),
            "COMPOSE_HTTP_TIMEOUT": str(READY_SECONDS),  # docker-compose 1.29 gives up after 60 s on a busy machine
        },
        services=("classifier", "nginx", *(name for name, tag in images.items() if obtain(tag))),
        alertmanager_config=alertmanager,
    )
    try:
        stack.compose("up", "--detach", *stack.services)
        for identity in stack.containers():
            wait_until_healthy(identity)
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "5")


def program() -> tuple[str, ...]:
    """Compose v2 if it is installed, otherwise docker-compose 1.29."""
    modern = subprocess.run(("docker", "compose", "version"), capture_output=True).returncode == 0
    return ("docker", "compose") if modern else ("docker-compose",)


def command() -> tuple[str, ...]:
    files = (ROOT / "deploy/compose.yaml", ROOT / "deploy/compose.replicas.yaml")
    return (*program(), "--project-name", PROJECT, *(str(part) for file in files for part in ("--file", file)))


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    return found


def nginx_image() -> str:
    """The pinned image, or a local one of the same tag if no registry can be reached."""
    pinned = os.environ.get("NGINX_IMAGE") or services()["nginx"]["image"].removeprefix("${NGINX_IMAGE:-").rstrip("}")
    tag: str = pinned.split("@")[0]
    return tag if has_image(tag) else pinned


def obtain(image: str) -> bool:
    if not has_image(image):
        docker("pull", "--quiet", image, code=None)
    if not has_image(image) and image.split(":")[0] in STAND_INS:
        build(image, STAND_INS[image.split(":")[0]])
    return has_image(image)


def build(tag: str, dockerfile: str) -> None:
    command = ("docker", "build", "--quiet", "--network", "host", "--tag", tag, "-")
    subprocess.run(command, input=dockerfile, text=True, check=True, env={**os.environ, "DOCKER_BUILDKIT": "0"})


def alertmanager_configuration(folder: Path) -> Path:
    """A copy of monitoring/alertmanager that Debian's Alertmanager can also read; returns its main file."""
    shutil.copytree(ROOT / "monitoring/alertmanager", folder)
    file = folder / "alertmanager.yml"
    file.write_text(readable_by_debian(file.read_text(), "http://localhost:9"))
    return file


def run(image: str, *arguments: str) -> str:
    return docker("run", "--rm", "--entrypoint", arguments[0], image, *arguments[1:])


def free_port() -> str:
    with socket.create_server(("localhost", 0)) as server:
        return str(server.getsockname()[1])


def session() -> requests.Session:
    """Trusts only the local certificate, and sends the key created by `make secrets`."""
    client = requests.Session()
    client.verify = str(CERTIFICATE)
    client.trust_env = False  # otherwise REQUESTS_CA_BUNDLE takes precedence
    client.headers["X-API-Key"] = API_KEY.read_text()
    return client


def post(client: requests.Session, stack: Stack, **headers: str) -> requests.Response:
    sent = {"Content-Type": "image/jpeg", **headers}
    return client.post(f"{stack.url}/classify", jpeg(), headers=sent, timeout=20)


def assert_error(reply: requests.Response, status: int, code: str) -> None:
    assert (reply.status_code, reply.headers["Content-Type"]) == (status, "application/json"), reply.text
    error = reply.json()["error"]
    assert error["code"] == code == reply.headers["X-Error-Code"]
    assert error["message"]
    assert error["request_id"] == reply.headers["X-Request-Id"]
