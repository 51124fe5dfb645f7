"""The parts of the benchmark that must not lie: the open loop counts every reply, and verdicts follow the numbers."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark import __main__ as benchmark
from tests.benchmark import bars, loads, report, servers
from tests.benchmark.results import EMBEDDED, TWO_REPLICAS, Results, without_folders
from tests.benchmark.workloads import SAMPLE, VERDICT, small
from tests.live import REPOSITORY, Server, environment, free_port, python


class Silent(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, status: int, content: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


class EveryFourthIsRefused(Silent):
    numbers = count()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(429 if next(self.numbers) % 4 == 0 else 200)


class Overloaded(Silent):
    """Answers only once the queue of an earlier load is drained."""

    until = 0.0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(max(0.0, self.until - time.monotonic()))
        self.reply(200, VERDICT.encode())


@contextmanager
def serving(handler: type[Silent]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def refusing() -> Iterator[str]:
    with serving(EveryFourthIsRefused) as url:
        yield f"{url}/classify"


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tests.benchmark.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_the_open_loop_offers_the_requested_rate_and_counts_every_reply(refusing: str) -> None:
    done = run("openloop", refusing, SAMPLE, "image/jpeg", "--rate", 30, "--seconds", 6, "--deadline", 5)
    measured = json.loads(done.stdout)
    refused, accepted = measured["outcomes"].pop("429"), measured["outcomes"].pop("200")
    assert measured["outcomes"] == {}
    assert measured["offered"] == pytest.approx(30, rel=0.3)  # Poisson: 180 expected, with a standard deviation of 13
    assert refused + accepted == round(6 * measured["offered"])
    assert refused == -(-(refused + accepted) // 4)
    assert measured["p50"] <= measured["p99"]


def test_the_open_loop_reports_lost_connections() -> None:
    done = run("openloop", "http://127.0.0.1:9/", SAMPLE, "image/jpeg", "--rate", 20, "--seconds", 2)
    measured = json.loads(done.stdout)
    assert set(measured["outcomes"]) == {"connection lost"}
    assert measured["good"] == 0


def test_every_overload_starts_without_the_previous_queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun_with_a_queue = []

    def opened(*arguments: object) -> dict[str, Any]:
        begun_with_a_queue.append(time.monotonic() < Overloaded.until)
        Overloaded.until = time.monotonic() + 1
        return {"offered": 1, "good": 1, "outcomes": {}}

    monkeypatch.setattr(loads, "opened", opened)
    monkeypatch.setattr(benchmark, "OVERLOADS", (1.0, 2.0))
    options = argparse.Namespace(seconds=1, deadline=0.2)
    record = {"closed": [{"workload": "small", "rate": 1}], "open": []}
    Overloaded.until = time.monotonic() + 1
    with serving(Overloaded) as url:
        running = servers.Running(servers.ALL[0], url, 0)
        benchmark._open_loops(running, small(), tmp_path, options, benchmark.Progress(1), record)
    assert begun_with_a_queue == [False, False]
    assert len(record["open"]) == 2


def test_waiting_for_a_server_to_settle_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "SETTLE_SECONDS", 1.0)
    started = time.monotonic()
    servers.settle(servers.Running(servers.ALL[0], "http://127.0.0.1:9", 0), 0.2)
    assert 1 <= time.monotonic() - started < 10


def test_replicas_stop_on_sigterm(tmp_path: Path) -> None:
    """A plain server stands in for the replica, which must not inherit a blocked signal. Nginx is left out."""
    code = """
import contextlib, sys
from tests import live, nginx
from tests.benchmark import replicas

@contextlib.contextmanager
def before(*arguments):
    yield print("ready", flush=True)

nginx.before = before
live.command = lambda port: [sys.executable, "-m", "http.server", str(port)]
live.is_ready = lambda url: live.requests.get(url, timeout=5).ok
replicas.main()
"""
    command = [sys.executable, "-c", code, str(free_port()), "1"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(tmp_path), stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_every_peer_has_one_worker_per_core_and_no_access_log(tmp_path: Path) -> None:
    code = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from model.store import SHIPPED
os.environ["MODEL_DIRECTORY"] = str(SHIPPED)
from tests.benchmark import servers
from tests.benchmark.peers import bento_app
for arguments in (servers.UVICORN, servers.GUNICORN):
    assert arguments[arguments.index("--workers") + 1] == "1", arguments
(mlserver,) = (server for server in servers.ALL if server.name == "MLServer")
assert mlserver.settings["MLSERVER_PARALLEL_WORKERS"] == 1
for service in (bento_app.Single, bento_app.Depends, bento_app.Model):
    assert service.config["workers"] == 1, service.config
    assert not service.config["logging"]["access"]["enabled"], service.config
"""
    python(tmp_path, "-c", code)


def test_the_report_says_how_photographs_are_decoded() -> None:
    raw = {"records": [record(EMBEDDED, "bundle", 1, 0.02)], "options": {"deadline": "1"}}
    assert "decodes a large JPEG at a fraction of its size" in "\n".join(report.larger(Results(raw)))


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
def test_a_target_is_judged_by_the_medians_of_all_rounds(rate: float, met: str) -> None:
    rounds = [record(EMBEDDED, "bundle", r, 0.02) for r in (1, rate, 9999)]
    peers = [record("peer", "peer", 1000, 0.03), record("slow", "peer", 10, 0.5)]
    behind_nginx = record(TWO_REPLICAS, "stack", 5000, 0.01)  # also ours, so not a peer
    raw = {"records": [*rounds, *peers, behind_nginx], "options": {"deadline": "1"}, "ceiling": {"small": {"1": 2000}}}
    verdicts = {what: (measured, met) for what, measured, _, met in bars.judge(Results(raw))}
    assert verdicts["small, 64 connections, requests/s against peer"] == (f"{rate / 1000:.2f} x", met)


def test_paths_of_the_machine_are_removed() -> None:
    problem = "Command '['/home/me/.venv/bin/python', '-m', 'a.b:C', '.']' of http://127.0.0.1:9/v2/models took 1/2 s"
    assert without_folders(problem) == problem.replace("/home/me/.venv/bin/", "")
