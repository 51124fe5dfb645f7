"""This run's log lines, processed as Vector would; needs none of the logging images: `make e2e-stack`."""

from __future__ import annotations

import json
import time

import requests

from tests.e2e.docker import docker
from tests.e2e.stack import Stack, post
from tests.monitoring.vrl import events, from_audit, from_docker


def lines(stack: Stack, service: str) -> list[str]:
    return [line for identity in stack.containers(service) for line in docker("logs", identity).splitlines()]


def test_a_request_is_found_by_its_id_in_all_three_logs(client: requests.Session, stack: Stack) -> None:
    sent = f"found-{time.time_ns()}"
    post(client, stack, **{"X-Request-Id": sent})
    client.get(f"{stack.url}/nowhere", timeout=20)
    time.sleep(1)  # a thread writes the audit log
    audit = docker("exec", stack.container("classifier"), "sh", "-c", "cat /audit/*.jsonl").splitlines()
    given = [
        *(from_docker(service, line) for service in ("classifier", "nginx") for line in lines(stack, service)),
        *map(from_audit, audit),
    ]
    made = events(given)
    found = [event for event in made if event.get("request_id") == sent]
    assert sorted(event["service"] for event in found) == ["audit", "classifier", "nginx"]
    assert {(event["path"], event["status"]) for event in found} == {("/classify", "200")}
    for before, event in zip(given, made, strict=True):
        line = before.get("log") or before["message"]
        assert event["level"] in {"debug", "info", "warning", "error", "critical"}, line
        if line.startswith("{") and "status" in (fields := json.loads(line)):
            assert (event["status"], event["path"]) == (str(fields["status"]), fields["path"]), line
