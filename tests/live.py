"""Runs the real server in a process of its own, with helpers to talk to it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
START_SECONDS, STOP_SECONDS = 120.0, 30.0
"""Generous: tests may share two cores with other work."""
LIMITS = {"MAX_BODY_BYTES": 2_000_000, "MAX_IMAGE_BYTES": 1_000_000, "MAX_REQUEST_IMAGES": 64, "MAX_QUEUE": 1024}
"""Settings of the servers that tests share; low enough to exceed without sending much."""
LOG, PID = "server.log", "server.pid"
"""Files in a server's home, for tests that read its log or look at its processes."""


class Server(NamedTuple):
    """A running server: its base URL, its topology, and the folder of its BentoML home and log."""

    url: str
    topology: str
    home: Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(home: Path, **settings: Any) -> dict[str, str]:
    """The caller's environment, stripped of all settings of the service, plus ``settings``."""
    kept = {"PATH", "HOME", "LANG", "TMPDIR", "CUDA_VISIBLE_DEVICES"}
    inherited = {name: value for name, value in os.environ.items() if name in kept}
    chosen = {name: str(value) for name, value in settings.items()}
    return {**inherited, "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True", **chosen}


def command(port: int) -> list[str]:
    return [sys.executable, "-m", "bentoml", "serve", "service:Classifier", "--port", str(port), "--host", "127.0.0.1"]


def python(
    home: Path, *arguments: object, code: int = 0, cwd: Path = REPOSITORY, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python with ``settings`` and its own BentoML home in ``home``, and check its exit status."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(home, **settings),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def store_model(home: Path, artifact: Path) -> str:
    """Import an artifact into the model store in ``home``; returns its tag."""
    return python(home, "-m", "model.store", "import", artifact).stdout.strip()


def failed_start(
    home: Path, port: int | None = None, preexec_fn: Callable[[], None] | None = None, **settings: Any
) -> list[str]:
    """What a server that cannot start with ``settings`` prints, line by line."""
    done = subprocess.run(
        command(port or free_port()),
        cwd=REPOSITORY,
        env=environment(home, **settings),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        preexec_fn=preexec_fn,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()


@contextmanager
def serve(topology: str, home: Path, **settings: Any) -> Iterator[str]:
    """Start the server with ``settings`` and its own BentoML home in ``home``; yields its base URL once it is ready."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {"TOPOLOGY": topology, "RUNTIME": "onnx-int8", "WORKERS": 2, "MAX_WAIT": START_SECONDS, **settings}
    with running(command(port), environment(home, **settings), home / LOG, lambda: is_ready(url)) as process:
        (home / PID).write_text(str(process.pid))
        yield url


def await_workers(home: Path, count: int = 2) -> None:
    """Wait until ``count`` API workers of the server with this home have logged that they are ready."""
    deadline = time.monotonic() + START_SECONDS
    wanted = [f"api-{worker}" for worker in range(1, count + 1)]
    while (told := _ready_workers(home / LOG)) != wanted:
        assert time.monotonic() < deadline, told
        time.sleep(0.1)


def _ready_workers(log: Path) -> list[str]:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]
    return sorted(record["process"] for record in map(json.loads, lines) if record["message"] == "ready")


def is_ready(url: str) -> bool:
    return requests.get(f"{url}/readyz", timeout=5).status_code == HTTPStatus.OK


@contextmanager
def running(
    argv: list[str],
    env: dict[str, str],
    log: Path,
    is_ready: Callable[[], bool],
    stop: int = signal.SIGTERM,
    cwd: Path = REPOSITORY,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run any server, logging to ``log``; yields its process once ``is_ready``, then ends it and its children."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_ready(process, is_ready, log)
        yield process
    finally:
        _stop(process, stop)


def _wait_until_ready(process: subprocess.Popen[bytes], is_ready: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}:\n{tail(log)}")
        with suppress(requests.RequestException):
            if is_ready():
                return
        time.sleep(0.1)
    raise AssertionError(f"the server was not ready within {START_SECONDS} s:\n{tail(log)}")


def _stop(process: subprocess.Popen[bytes], how: int) -> None:
    """Signal the process and wait; kill whatever remains. A process that outlives its server is an error."""
    started = family(process.pid)
    try:
        process.send_signal(how)
        process.wait(STOP_SECONDS)
        deadline = time.monotonic() + 5
        while (left := [pid for pid in started if _alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"processes {left} outlived their server"
    finally:
        for pid in started:
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _status(pid: int) -> tuple[str, int]:
    """State and parent of a process; ``("", 0)`` if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return fields[0], int(fields[1])


def _alive(pid: int) -> bool:
    return _status(pid)[0] not in ("", "Z")


def family(pid: int) -> list[int]:
    """A process and all its descendants; the server's workers have their own process groups."""
    parents = {
        int(entry.name): _status(int(entry.name))[1] for entry in Path("/proc").iterdir() if entry.name.isdigit()
    }
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def processes(home: Path) -> list[int]:
    """All processes of the server with this home."""
    return family(int((home / PID).read_text()))


def picture(seed: int = 0, height: int = 32, width: int = 32) -> Image.Image:
    """A smooth random picture: any classifier would see pure noise as all the same."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header announces a size, with almost no data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def assert_error(response: requests.Response, status: int, code: str) -> None:
    """Check that the reply is an error in the common format."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message", "request_id"}
    assert body["error"]["code"] == code
    assert body["error"]["message"]
    assert "Traceback" not in response.text
    assert body["error"]["request_id"] == response.headers["X-Request-ID"]


_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)$")


def samples(url: str) -> dict[str, float]:
    """Every series of ``/metrics`` with its value, keyed by name and labels as written there."""
    matches = (_SAMPLE.match(line) for line in requests.get(f"{url}/metrics", timeout=30).text.splitlines())
    return {match[1] + (match[2] or ""): float(match[3]) for match in matches if match}


def total(values: dict[str, float], name: str, **labels: str) -> float:
    """The sum over all series of ``name`` that carry ``labels``."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        value
        for series, value in values.items()
        if series.split("{")[0] == name and all(label in series for label in wanted)
    )
