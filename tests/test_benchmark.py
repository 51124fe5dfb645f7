"""The parts of the benchmark that must not lie: the open loop counts every reply, and the bars judge by the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark import bars
from tests.benchmark.results import EMBEDDED, TWO_REPLICAS, Results
from tests.benchmark.workloads import SAMPLE
from tests.live import REPOSITORY, Server


class EveryFourthIsRefused(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    numbers = count()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(429 if next(self.numbers) % 4 == 0 else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), EveryFourthIsRefused) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/classify"
        server.shutdown()
        thread.join()


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tests.benchmark.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_the_open_loop_offers_what_it_is_told_and_counts_every_reply(refusing: str) -> None:
    done = run("openloop", refusing, SAMPLE, "image/jpeg", "--rate", 30, "--seconds", 6, "--deadline", 5)
    measured = json.loads(done.stdout)
    refused, accepted = measured["outcomes"].pop("429"), measured["outcomes"].pop("200")
    assert measured["outcomes"] == {}
    assert measured["offered"] == pytest.approx(30, rel=0.3)  # Poisson: 180 expected, standard deviation 13
    assert refused + accepted == round(6 * measured["offered"])
    assert refused == -(-(refused + accepted) // 4)
    assert measured["p50"] <= measured["p99"]


def test_the_open_loop_says_when_nobody_answers() -> None:
    done = run("openloop", "http://127.0.0.1:9/", SAMPLE, "image/jpeg", "--rate", 20, "--seconds", 2)
    measured = json.loads(done.stdout)
    assert set(measured["outcomes"]) == {"connection lost"}
    assert measured["good"] == 0


def test_the_client_reports_statuses_and_percentiles(embedded: Server) -> None:
    done = run("client", embedded.url, SAMPLE, "-n", 20, "-c", 4)
    assert done.returncode == 0, done.stderr
    assert "replies: 200: 20" in done.stdout
    assert "p99" in done.stdout


def test_the_client_fails_when_a_reply_is_an_error(embedded: Server) -> None:
    done = run("client", embedded.url, Path(__file__), "-n", 3, "-c", 1)
    assert done.returncode == 1
    assert "replies: 415: 3" in done.stdout


def record(name: str, kind: str, rate: float, p99: float) -> dict[str, Any]:
    run = {"workload": "small", "connections": 64, "rate": rate, "p50": 0.01, "p99": p99, "replies": 100, "errors": 0}
    return {"name": name, "kind": kind, "closed": [run | {"images_per_second": rate}], "open": [], "versions": {}}


@pytest.mark.parametrize(("rate", "met"), [(1600, "yes"), (1400, "**no**")])
def test_a_bar_is_judged_by_the_medians_of_all_rounds(rate: float, met: str) -> None:
    rounds = [record(EMBEDDED, "bundle", r, 0.02) for r in (1, rate, 9999)]
    peers = [record("peer", "peer", 1000, 0.03), record("slow", "peer", 10, 0.5)]
    behind_nginx = record(TWO_REPLICAS, "stack", 5000, 0.01)  # ours as well, and no peer
    raw = {"records": [*rounds, *peers, behind_nginx], "options": {"deadline": "1"}, "ceiling": {"small": {"1": 2000}}}
    verdicts = {what: (measured, met) for what, measured, _, met in bars.judge(Results(raw))}
    assert verdicts["small, 64 connections, requests/s against peer"] == (f"{rate / 1000:.2f} x", met)
