"""The servers under test: how to start each one, and what to send it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import requests

from model.store import SHIPPED
from tests import live
from tests.benchmark.results import BUNDLE, DEPENDS, EMBEDDED, ONE_REPLICA, ONE_WORKER, RUNNER, STACK, TWO_REPLICAS
from tests.benchmark.workloads import SAMPLE, VERDICT, Body, Pack, multipart, v2

PEERS = "tests.benchmark.peers"
VENVS = live.REPOSITORY / ".venv-bench"
PEERS_PYTHON, MLSERVER_PYTHON = (VENVS / name / "bin" / "python" for name in ("peers", "mlserver"))
BENTOML, PEER = "bentoml", "peer"
WORKERS = len(os.sched_getaffinity(0))
"""Workers of each peer and of the bundle. Apps with their own module take the number from ``peers/common.py``."""
SETTLE_SECONDS = 30.0

MULTIPART = multipart("image")


@dataclass(frozen=True)
class Server:
    """``command`` builds the command line for a port; ``pack`` and ``path`` apply to requests with a single image."""

    name: str
    kind: str
    python: Path
    command: Callable[[int], list[str]]
    packages: tuple[str, ...]
    settings: dict[str, object] = field(default_factory=dict)
    pack: Pack = MULTIPART
    path: str = "/classify"
    takes_batches: bool = False
    stop: int = signal.SIGTERM


class Running(NamedTuple):
    server: Server
    url: str
    pid: int


def _bundle(name: str, **settings: object) -> Server:
    """As shipped, except that the access log is off, as for every peer."""
    settings = {"RUNTIME": "onnx-int8", "LOG_REQUESTS": "false", **settings}
    return Server(name, BUNDLE, Path(sys.executable), live.command, ("bentoml",), settings, takes_batches=True)


def _replicas(name: str, count: int) -> Server:
    """Single-worker replicas behind Nginx: stands in for a service on several machines behind one address."""

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "tests.benchmark.replicas", str(port), str(count)]

    settings = {"RUNTIME": "onnx-int8", "LOG_REQUESTS": "false", "TOPOLOGY": "embedded", "WORKERS": 1}
    return Server(name, STACK, Path(sys.executable), command, ("bentoml",), settings, takes_batches=True)


def _bentoml(name: str, service: str, pack: Pack) -> Server:
    def command(port: int) -> list[str]:
        target = f"{PEERS}.bento_app:{service}"
        return [sys.executable, "-m", "bentoml", "serve", target, "--port", str(port), "--host", "127.0.0.1"]

    return Server(name, BENTOML, Path(sys.executable), command, ("bentoml",), pack=pack)


def _peer(name: str, packages: tuple[str, ...], *arguments: str, **options: Any) -> Server:
    def command(port: int) -> list[str]:
        return [str(PEERS_PYTHON), "-m", *(argument.format(port=port) for argument in arguments)]

    settings = {"RAY_USAGE_STATS_ENABLED": 0, "RAY_AUTH_MODE": "disabled"}
    return Server(name, PEER, PEERS_PYTHON, command, packages, settings, **options)


def _mlserver() -> Server:
    settings = {
        "MLSERVER_MODEL_NAME": "classifier",
        "MLSERVER_MODEL_IMPLEMENTATION": f"{PEERS}.mlserver_app.Classifier",
        "MLSERVER_MODEL_MAX_BATCH_SIZE": 32,
        "MLSERVER_MODEL_MAX_BATCH_TIME": 0.001,
        "MLSERVER_PARALLEL_WORKERS": WORKERS,
        "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_GRPC_PORT": 0,
        "MLSERVER_DEBUG": "false",
        "PYTHONPATH": live.REPOSITORY,
    }

    def command(port: int) -> list[str]:
        ports = [f"MLSERVER_HTTP_PORT={port}", f"MLSERVER_METRICS_PORT={live.free_port()}"]
        return ["env", *ports, str(MLSERVER_PYTHON.with_name("mlserver")), "start", "."]

    path = "/v2/models/classifier/infer"
    return Server("MLServer", PEER, MLSERVER_PYTHON, command, ("mlserver",), settings, pack=v2, path=path)


PATIENT = ("--timeout-worker-healthcheck", "30")
"""By default uvicorn kills a worker that is silent for five seconds, which happens when a busy machine starts it."""
EACH_CORE = ("--workers", str(WORKERS))
UVICORN = ("uvicorn", f"{PEERS}.fastapi_app:app", *EACH_CORE, "--no-access-log", *PATIENT, "--port", "{port}")
GUNICORN = ("gunicorn", f"{PEERS}.flask_app:app", *EACH_CORE, "--threads", "4", "--bind", "127.0.0.1:{port}")

ALL = (
    _bundle(EMBEDDED, TOPOLOGY="embedded"),
    _bundle(RUNNER, TOPOLOGY="runner"),
    _bundle(ONE_WORKER, TOPOLOGY="embedded", WORKERS=1),
    _replicas(ONE_REPLICA, 1),
    _replicas(TWO_REPLICAS, 2),
    _peer("FastAPI + uvicorn", ("fastapi", "uvicorn"), *UVICORN, takes_batches=True),
    _peer("Flask + gunicorn", ("flask", "gunicorn"), *GUNICORN, "--keep-alive", "30", takes_batches=True),
    _peer("LitServe", ("litserve",), f"{PEERS}.litserve_app", "{port}", stop=signal.SIGINT),
    _peer("Ray Serve", ("ray",), f"{PEERS}.rayserve_app", "{port}"),
    _mlserver(),
    _bentoml("BentoML, documented", "Single", multipart("images")),
    _bentoml(DEPENDS, "Depends", MULTIPART),
)


@contextmanager
def start(server: Server, home: Path) -> Iterator[Running]:
    """Start ``server`` and yield once it has classified the sample image correctly."""
    port = live.free_port()
    url = f"http://127.0.0.1:{port}"
    body = server.pack([SAMPLE.read_bytes()])

    def ready() -> bool:
        return _answers(url + server.path, body)

    env = live.environment(home, MODEL_DIRECTORY=SHIPPED, ORT_DISABLE_TELEMETRY=1, **server.settings)
    with live.running(server.command(port), env, home / live.LOG, ready, server.stop) as process:
        yield Running(server, url, process.pid)


def settle(running: Running, deadline: float) -> None:
    """Wait, at most ``SETTLE_SECONDS``, until the server classifies the sample image within ``deadline``.

    A server that keeps working for clients that have left would start the next load with the last one's queue.
    """
    body = running.server.pack([SAMPLE.read_bytes()])
    until = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < until:
        with suppress(requests.RequestException):
            if _answers(running.url + running.server.path, body, deadline):
                return
        time.sleep(0.1)  # refusals return at once: do not spin


def _answers(url: str, body: Body, seconds: float = 30.0) -> bool:
    reply = requests.post(url, data=body.content, headers={"Content-Type": body.content_type}, timeout=seconds)
    return reply.ok and VERDICT in reply.text


def memory(pid: int) -> float:
    """Proportional set size of a process and its descendants in MiB: shared pages count once."""
    return sum(_pss(member) for member in live.family(pid)) / 1024


def _pss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
