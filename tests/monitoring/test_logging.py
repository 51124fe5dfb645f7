"""Log lines become searchable events: make check-monitoring. tests/e2e checks the same for the lines of a real run."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest
import yaml

from monitoring.grafana.logs import DASHBOARD
from tests.live import REPOSITORY
from tests.monitoring.vrl import events, from_audit, from_docker

VECTOR = yaml.safe_load((REPOSITORY / "monitoring/logging/vector.yaml").read_text())
COMPOSE = yaml.safe_load((REPOSITORY / "deploy/compose.logs.yaml").read_text())
LOKI = VECTOR["sinks"]["loki"]
AUDIT = {"time": "2026-01-31T11:59:58.123+00:00", "request_id": "a1", "key": "first", "client": "192.0.2.1"}


def one(line: dict[str, Any]) -> dict[str, Any]:
    (event,) = events([line])
    return event


def test_a_service_log_line_becomes_an_event() -> None:
    line = {"level": "INFO", "logger": "classifier.access", "request_id": "a1", "path": "/classify", "status": 200}
    event = one(from_docker("classifier", json.dumps({**line, "ms": 3.5})))
    assert json.loads(event.pop("message")) == {**line, "ms": 3.5}
    assert event.pop("timestamp").startswith("2026-01-31T12:00:00.5")
    assert event == {
        "service": "classifier",
        "level": "info",
        "request_id": "a1",
        "path": "/classify",
        "status": "200",
        "seconds": "0.0035",
    }


def test_an_audit_line_keeps_its_own_time() -> None:
    event = one(from_audit(json.dumps({**AUDIT, "path": "/model", "status": 403, "code": "forbidden", "images": []})))
    assert event["timestamp"].startswith("2026-01-31 11:59:58.123")
    assert event["message"].endswith('"images": []}')
    wanted = {"service": "audit", "level": "info", "key": "first", "client": "192.0.2.1", "code": "forbidden"}
    assert wanted.items() <= event.items()


@pytest.mark.parametrize(
    ("service", "line", "level"),
    [
        ("nginx", '{"status": 200, "seconds": 0.01}', "info"),
        ("nginx", '{"status": 429, "seconds": 0}', "warning"),
        ("nginx", '{"status": 502, "seconds": 1.0}', "error"),
        ("nginx", "2026/01/31 12:00:00 [warn] 7#7: *1 limiting requests, excess: 200.9", "warning"),
        ("nginx", "2026/01/31 12:00:00 [crit] 7#7: no memory", "critical"),
        ("nginx", "2026/01/31 12:00:00 [alert] 7#7: 512 worker_connections are not enough", "critical"),
        ("nginx", "nginx: configuration file test failed", "error"),
        ("classifier", '{"level": "CRITICAL", "message": "not ready"}', "critical"),
        ("classifier", "Traceback (most recent call last):", "info"),
        ("classifier", "[1, 2]", "info"),
        ("classifier", "", "info"),
    ],
)
def test_every_line_gets_a_level(service: str, line: str, level: str) -> None:
    event = one(from_docker(service, line))
    assert (event["level"], event.get("message", "")) == (level, line)


def test_shipped_fields_are_those_made_and_queried() -> None:
    made = one(from_audit(json.dumps({**AUDIT, "path": "/x", "status": 400, "code": "y", "seconds": 1.5})))
    sent = {**LOKI["labels"], **LOKI["structured_metadata"]}
    assert sent == {name: f"{{{{ {name} }}}}" for name in sent}
    assert sent.keys() == made.keys() - {"message", "timestamp"}
    queries = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    assert set(re.findall(r"(\w+)(?:=~|!=|=)", queries)) <= sent.keys()


def test_ports_and_paths_agree_across_files() -> None:
    vector, loki = COMPOSE["services"]["vector"], COMPOSE["services"]["loki"]
    port = VECTOR["sources"]["containers"]["address"].split(":")[1]
    assert vector["ports"] == [f"127.0.0.1:{port}:{port}"]
    for shipped in ("classifier", "nginx"):
        options = COMPOSE["services"][shipped]["logging"]["options"]
        assert options["fluentd-address"] == f"127.0.0.1:{port}"
        assert options["tag"] == shipped
    config = yaml.safe_load((REPOSITORY / "monitoring/logging/loki.yaml").read_text())
    jobs = yaml.safe_load((REPOSITORY / "monitoring/prometheus/prometheus.yml").read_text())["scrape_configs"]
    found = {job["job_name"]: job["dns_sd_configs"] for job in jobs if job["job_name"] in ("loki", "vector")}
    scraped = {name: each["port"] for name, (each,) in found.items() if each["names"] == [name]}
    listen = int(VECTOR["sinks"]["prometheus"]["address"].split(":")[1])
    assert scraped == {"loki": config["server"]["http_listen_port"], "vector": listen}
    assert LOKI["endpoint"] == f"http://loki:{scraped['loki']}"
    assert config["limits_config"]["retention_period"].strip("${}") in loki["environment"]
    assert "/etc/vector" in vector["volumes"][0]
    assert VECTOR["transforms"]["lines"]["file"] == "/etc/vector/lines.vrl"


def test_dashboard_queries_parse() -> None:
    """By Grafana's LogQL grammar, after replacing $__auto with a duration as Grafana does."""
    queries = [target["expr"].replace("$__auto", "5m") for panel in DASHBOARD["panels"] for target in panel["targets"]]
    done = subprocess.run(
        ("node", REPOSITORY / "tests/node/logql.mjs"), input="\n".join(queries), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
