"""A service that really breaks raises a real alert, and resolves it once repaired; dashboards show a real run.

make e2e-alerts                # UPDATE=1 also draws docs/images and records the names of all metrics
apt-get install prometheus prometheus-alertmanager prometheus-node-exporter prometheus-blackbox-exporter
                prometheus-nginx-exporter nginx-light openssl
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from monitoring.grafana.dashboards import DASHBOARDS
from monitoring.grafana.render import answers, draw
from tests.live import REPOSITORY, processes, serve
from tests.monitoring.stack import Stack, running

IMAGES = [path.read_bytes() for path in sorted((REPOSITORY / "tests/images").glob("*.jpg"))]
NAMES = REPOSITORY / "tests/monitoring/metric-names.txt"
TRAFFIC_SECONDS, PAUSE = 150, 1
"""Longer than the longest window plus the baseline's offset."""
MINUTES = 4
"""Time range of the dashboards."""
NEEDS_GPU = {"GPU busy", "GPU memory used", "GPU temperature", "GPU power", "GPU last Xid"}
PANELS = [(name, panel) for name, board in DASHBOARDS.items() for panel in board["panels"]]


class Client(threading.Thread):
    """Sends images through Nginx until stopped, a quarter of them invalid; keeps going through an outage."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(daemon=True)
        self.url, self.certificate = f"https://127.0.0.1:{stack.ports['tls']}", str(stack.folder / "certificate.pem")
        self.stopped = threading.Event()

    def run(self) -> None:
        for image in itertools.cycle(IMAGES):
            if self.stopped.wait(PAUSE):
                return
            with suppress(requests.RequestException):
                self.post("/classify", [("image", image)])
                self.post("/classify/batch", [("images", each) for each in [*IMAGES, b"no image"]])
                for _ in range(3):
                    self.post("/classify", [("image", b"no image")])

    def post(self, path: str, files: list[tuple[str, bytes]]) -> None:
        requests.post(self.url + path, files=files, verify=self.certificate, timeout=60)


@pytest.fixture(scope="module")
def broken_later(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A service for this module's last test to break: its base URL and its home."""
    home = tmp_path_factory.mktemp("service")
    with serve("embedded", home, WORKERS=2) as url:
        yield url, home


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, broken_later: tuple[str, Path]) -> Iterator[Stack]:
    """The whole stack, under traffic that starts well before the first test."""
    url, _ = broken_later
    with running(tmp_path_factory.mktemp("stack"), url) as stack:
        client = Client(stack)
        client.start()
        time.sleep(TRAFFIC_SECONDS)
        yield stack
        client.stopped.set()
        client.join()


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=[f"{name}-{panel['title']}" for name, panel in PANELS])
def test_a_panel_shows_data(stack: Stack, board: str, panel: dict[str, Any]) -> None:
    found = answers(stack.url, panel, MINUTES)
    assert bool(found) == (panel["title"] not in NEEDS_GPU)


def test_every_query_of_a_panel_returns_data(stack: Stack) -> None:
    empty = [
        target["expr"]
        for _, panel in PANELS
        if panel["title"] not in NEEDS_GPU
        for target in panel["targets"]
        if not answers(stack.url, {**panel, "targets": [target]}, MINUTES)
    ]
    assert not empty


def test_no_rule_fails_to_evaluate(stack: Stack) -> None:
    groups = requests.get(f"{stack.url}/api/v1/rules", timeout=60).json()["data"]["groups"]
    assert not [(r["name"], r["lastError"]) for g in groups for r in g["rules"] if r["health"] != "ok"]


def test_recorded_metric_names_were_scraped(stack: Stack) -> None:
    names = requests.get(f"{stack.url}/api/v1/label/__name__/values", timeout=60).json()["data"]
    scraped = [name for name in names if ":" not in name and name not in ("ALERTS", "ALERTS_FOR_STATE")]
    if os.environ.get("UPDATE"):
        NAMES.write_text("\n".join(scraped) + "\n")
    ours = ("classifier_", "bentoml_", "nginx_", "probe_", "up")
    assert {n for n in NAMES.read_text().split() if n.startswith(ours)} <= set(scraped)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_can_be_drawn(stack: Stack, name: str, tmp_path: Path) -> None:
    folder = REPOSITORY / "docs/images" if os.environ.get("UPDATE") else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"dashboard-{name}.png"
    draw(stack.url, DASHBOARDS[name], path, MINUTES)
    assert 10_000 < path.stat().st_size < 300_000


def test_the_watchdog_reaches_the_dead_mans_switch(stack: Stack) -> None:
    assert json.loads(stack.received.wait_for("/deadman", "Watchdog"))["status"] == "firing"


def test_a_minor_alert_is_mailed(stack: Stack) -> None:
    mail = stack.received.wait_for("mail", "ClassifierInvalidRequests (info)")
    assert base64.b64encode(b"\0alerts@example.com\0the-word").decode() in mail
    assert "monitoring/runbooks/ClassifierInvalidRequests.md" in mail.replace("=\n", "")


def test_a_killed_service_pages_once_and_resolves_on_return(
    stack: Stack, broken_later: tuple[str, Path], tmp_path: Path
) -> None:
    while stack.ask('ALERTS{alertname="ClassifierDown"}'):  # on a machine too busy to answer a scrape in time
        time.sleep(1)
    time.sleep(10)  # until Alertmanager has resolved it too
    stack.received.forget()
    for pid in processes(broken_later[1]):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    page = json.loads(stack.received.wait_for("/pagerduty", "ClassifierDown"))
    assert page["event_action"] == "trigger"
    assert page["routing_key"] == "the-key"
    assert "No replica of classifier answers" in page["payload"]["custom_details"]["text"]
    assert "runbooks/ClassifierDown.md" in stack.received.wait_for("/slack", "[FIRING 1] ClassifierDown (critical)")

    # Alerts that follow from this one fire too, but are inhibited.
    while not stack.ask('ALERTS{alertname="EdgeProbeFailing", alertstate="firing"}'):
        time.sleep(1)
    time.sleep(10)
    assert not [
        body for _, body in stack.received.messages if re.search(r"ClassifierInst|ClassifierRepl|EdgeProbe", body)
    ]

    stack.received.forget()
    with serve("embedded", tmp_path / "home", WORKERS=2) as url:
        stack.point_to(url)
        stack.received.wait_for("/pagerduty", "ClassifierDown", '"resolve"')
        stack.received.wait_for("/slack", "[RESOLVED] ClassifierDown (critical)")
