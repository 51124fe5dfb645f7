"""Processes that are killed or told to stop, under load."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests

from tests import live
from tests.faults.load import RESTORED_SECONDS, seconds_until, traffic
from tests.faults.server import API, RUNNER, classify, starts, workers

CONTAINER = {"BENTOML_CONTAINERIZED": "true"}
"""Set in BentoML's images: it makes BentoML leave a dead worker unreplaced."""
CGROUP = Path("/sys/fs/cgroup/memory")
Say = Callable[[str], None]


@pytest.mark.parametrize("place", ["machine", "container"])
@pytest.mark.parametrize(
    ("topology", "service", "count"),
    [("embedded", API, 2), ("embedded", API, 1), ("runner", API, 2), ("runner", RUNNER, 2)],
)
def test_a_killed_process_is_replaced_and_loses_only_what_it_held(
    tmp_path: Path, topology: str, service: str, count: int, place: str, say: Say
) -> None:
    container = CONTAINER if place == "container" else {}
    with live.serve(topology, tmp_path, WORKERS=count, **container) as url:
        seconds_until(lambda: starts(tmp_path, API) == count, 60)
        before = starts(tmp_path, service)
        with traffic(url) as sent:
            since = sent.load.now()
            os.kill(workers(tmp_path, service)[0], signal.SIGKILL)
            until = sent.load.now()
            restored = seconds_until(lambda: starts(tmp_path, service) == before + 1, 60)
        held = sent.under_way(since, until)
        say(f"{topology}, {service} of {count}, {place}: back after {restored:.1f} s; {held} under way; {sent}")
        assert restored <= RESTORED_SECONDS
        assert proofs(tmp_path, service) == before + 1
        assert sent.failed <= held
        assert classify(url).status_code == 200
        values = live.samples(url)
        assert live.total(values, "classifier_queue_images") == 0
        assert live.total(values, "bentoml_service_request_in_progress", endpoint="/classify") == 0


def proofs(home: Path, service: str) -> int:
    """How often a process of the service has verified its engine."""
    message = {API: "ready", RUNNER: "proven"}[service]
    return (home / live.LOG).read_text().count(f'"message":"{message}"')


@pytest.mark.skipif(not os.access(CGROUP, os.W_OK), reason="by design: limiting memory as the kernel does needs root")
def test_a_process_out_of_memory_loses_only_that_request(tmp_path: Path, say: Say) -> None:
    """The kernel kills the process that decodes an image of 147 MB when 64 MiB are left."""
    large = live.encode(live.picture(0, 7000, 7000), "PNG", compress_level=1)
    with live.serve("embedded", tmp_path, WORKERS=2, MAX_IMAGE_BYTES=2**27, MAX_BODY_BYTES=2**27) as url:
        # Measuring the batch size needs memory too: wait until it is done.
        seconds_until(lambda: (tmp_path / live.LOG).read_text().count('"measured batches"') == 2, 60)
        with memory_limit(live.processes(tmp_path)[1:], 64 * 2**20) as group:
            with suppress(requests.ConnectionError):
                reply = requests.post(f"{url}/classify", large, headers={"Content-Type": "image/png"}, timeout=30)
                assert not reply.ok
            killed = (group / "memory.oom_control").read_text()
            restored = seconds_until(lambda: len(workers(tmp_path, API)) == 2 and classify(url).ok, 60)
        assert re.search("oom_kill [1-9]", killed), killed
        say(f"out of memory: 1 request lost, back after {restored:.1f} s")
        assert restored <= RESTORED_SECONDS


@contextmanager
def memory_limit(pids: list[int], more: int) -> Iterator[Path]:
    """A control group of these processes, which together may use ``more`` bytes beyond what they use now."""
    group = CGROUP / f"faults-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(more))  # memory in use stays charged to the old group
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (CGROUP / "cgroup.procs").write_text(pid)
        group.rmdir()


@pytest.mark.parametrize("topology", ["embedded", "runner"])
def test_sigterm_under_load_loses_no_accepted_request(tmp_path: Path, topology: str, say: Say) -> None:
    """Readiness fails while requests are still answered; then the port closes, and accepted requests are answered."""
    port = live.free_port()
    url = f"http://127.0.0.1:{port}"
    env = live.environment(tmp_path, TOPOLOGY=topology, RUNTIME="onnx-int8", WORKERS=2, DRAIN_SECONDS=2)
    log = tmp_path / live.LOG

    def ready() -> bool:
        return requests.get(f"{url}/readyz", timeout=5).ok

    with live.running(live.command(port), env, log, ready) as server:
        seconds_until(lambda: starts(tmp_path, API) == 2, 60)
        with traffic(url) as sent:
            server.send_signal(signal.SIGTERM)
            told = sent.load.now()
            unready = seconds_until(lambda: not ready(), 2)
            assert classify(url).status_code == 200
            code = server.wait(30)
            took = sent.load.now() - told
    records = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    accepted = sum(record.get("path") == "/classify" for record in records) - 1
    answered = sent.outcomes["200"]
    say(
        f"SIGTERM, {topology}: unready after {unready:.2f} s, exit {code} after {took:.1f} s; "
        f"{accepted} accepted, {answered} answered, {accepted - answered} lost; {sent}"
    )
    assert code == 0
    assert took < 10
    assert accepted == answered
    last = max(reply.due for reply in sent.load.replies if reply.outcome == "200")
    assert last > told + 1.5, "requests were taken while readiness was off"
    assert all(reply.outcome == "200" for reply in sent.load.replies if reply.due < told + 1.5)
