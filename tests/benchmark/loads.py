"""One load on one server: closed by wrk, open by ``tests.benchmark.openloop``. Keeps the generator's cost."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmark.workloads import Pack, Workload

SCRIPT = Path(__file__).with_name("wrk.lua")
TIMEOUT = 10
"""Seconds after which the closed loop counts a reply as an error."""


class Target:
    """A workload packed for one server, in files that both load generators read."""

    def __init__(self, url: str, workload: Workload, pack: Pack, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.url, self.images_per_request = url, workload.images_per_request
        self.files = [directory / f"{workload.name}-{i}.body" for i in range(len(workload.requests))]
        for file, images in zip(self.files, workload.requests, strict=True):
            self.content_type, content = pack(images)
            file.write_bytes(content)


def closed(target: Target, connections: int, seconds: int) -> dict[str, Any]:
    """``connections`` clients, each sending its next request as soon as it has its reply. Times in seconds."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={TIMEOUT}s", "-s", str(SCRIPT)]
    measured, share = _run([*command, target.url, "--", target.content_type, *map(str, target.files)])
    replies, status_errors = measured["replies"], measured["status_errors"]
    lost = sum(measured[kind] for kind in ("connect", "read", "write", "timeout"))
    return {
        "connections": connections,
        "rate": (replies - status_errors) / (measured["microseconds"] / 1e6),
        "replies": replies,
        "errors": status_errors + lost,
        "error_kinds": {"status": status_errors, "lost": lost},
        **{name: measured[name] / 1e6 for name in ("p50", "p95", "p99", "max")},
        "generator_cpu": share,
    }


def opened(target: Target, rate: float, seconds: float, deadline: float) -> dict[str, Any]:
    """Send ``rate`` requests per second, whether or not they are answered."""
    command = [sys.executable, "-m", "tests.benchmark.openloop", target.url, str(target.files[0]), target.content_type]
    options = {"rate": rate, "seconds": seconds, "deadline": deadline}
    measured, share = _run(command + [f"--{name}={value:g}" for name, value in options.items()])
    return {**measured, "generator_cpu": share}


def _run(command: list[str]) -> tuple[dict[str, Any], float]:
    """The last line of output, parsed as JSON, and the share of one core that the command used."""
    before, started = _cpu_seconds(), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_raise_limit)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout}{done.stderr}")
    share = (_cpu_seconds() - before) / (time.monotonic() - started)
    return json.loads(done.stdout.strip().splitlines()[-1]), share


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _raise_limit() -> None:
    """Raise the limit on open files to the maximum: an open loop may need thousands of connections."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
