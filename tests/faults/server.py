"""Helpers for the fault tests: a server's processes by service, and a request with one image."""

from __future__ import annotations

from pathlib import Path

import requests

from tests import live
from tests.faults.load import ONE_IMAGE

API, RUNNER = "classifier", "runner"


def workers(home: Path, service: str) -> list[int]:
    """Process ids of one service."""
    asked = f"--service-name\0{service}\0"
    return [pid for pid in live.processes(home) if asked in _command(pid)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def starts(home: Path, service: str) -> int:
    """How often a process of the service has started."""
    return (home / live.LOG).read_text().count(f'"Service {service} initialized"')


def classify(url: str, timeout: float = 30) -> requests.Response:
    return requests.post(
        f"{url}/classify", ONE_IMAGE.content, headers={"Content-Type": ONE_IMAGE.content_type}, timeout=timeout
    )
