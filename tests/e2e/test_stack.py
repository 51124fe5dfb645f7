"""The whole stack, run by Compose as in production: `make e2e-stack`.

Needs Docker with Compose and, if no registry can be reached, local images with the tags of deploy/compose.yaml.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import requests
import yaml

from tests.e2e.docker import ROOT, docker, jpeg, process_statuses
from tests.e2e.stack import (
    PROJECT,
    REPLICAS,
    Stack,
    address,
    assert_error,
    inspect,
    post,
    services,
    session,
    wait_until_healthy,
)
from tests.monitoring.stack import Received, local_alertmanager


def test_every_service_runs(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """All but those whose image this machine cannot get; those are printed."""
    missing = set(services()) - set(stack.services)
    if missing:
        with capsys.disabled():
            print(f"\nnot started, no image: {', '.join(sorted(missing))}")
    assert missing <= {"grafana"}
    for service in stack.services:
        assert len(stack.containers(service)) == (REPLICAS if service == "classifier" else 1), service


def test_every_target_is_up(stack: Stack) -> None:
    """Every scrape job whose exporter runs here has targets, all of them up; each replica is a target of its own."""
    jobs = yaml.safe_load((ROOT / "monitoring/prometheus/prometheus.yml").read_text())["scrape_configs"]
    overlays = {"gpu", "loki", "vector"}
    expected = {job["job_name"] for job in jobs} - overlays - (set(services()) - set(stack.services))
    assert {"classifier", "nginx", "node", "edge", "prometheus", "alertmanager"} <= expected
    deadline = time.monotonic() + 60
    while True:  # the first scrapes take one interval
        reply = requests.get(f"{stack.prometheus}/api/v1/targets", {"state": "active"}, timeout=10)
        targets = reply.json()["data"]["activeTargets"]
        states = [(target["labels"]["job"], target["health"]) for target in targets]
        up = [job for job, health in states if health == "up"]
        if len(up) == len(states) and set(up) == expected and up.count("classifier") == REPLICAS:
            return
        assert time.monotonic() < deadline, states
        time.sleep(1)


class Traffic:
    """Callers that post batches continuously, so that some requests are always in flight."""

    def __init__(self, stack: Stack, callers: int = 4, images: int = 24) -> None:
        self._stack = stack
        self._files = [("images", (f"{i}.jpg", jpeg(), "image/jpeg")) for i in range(images)]
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(callers)]
        self.outcomes: list[str] = []

    def _call(self) -> None:
        client = session()
        while not self._end.is_set():
            if self._stack.reloads_nginx:  # a reload closes idle connections even if a request is just arriving on one
                client = session()
            try:
                reply = client.post(f"{self._stack.url}/classify/batch", files=self._files, timeout=20)
                self.outcomes.append(
                    "ok" if reply.ok and len(reply.json()["results"]) == len(self._files) else reply.text
                )
            except requests.RequestException as error:
                self.outcomes.append(repr(error))
            self._end.wait(0.04)  # stays below the limit per address

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("way", ["kill", "stop"])
def test_a_lost_replica_fails_no_request(stack: Stack, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed, or told to stop, under traffic. Once it is back, at whatever address, it gets work again."""
    before = len(stack.logs("nginx"))
    victim = stack.containers("classifier")[0]
    with Traffic(stack) as traffic:
        time.sleep(3)
        docker(way, victim)
        time.sleep(7)
        docker("start", victim)
        wait_until_healthy(victim)
        stack.find_replicas()
        returned = len(traffic.outcomes)
        time.sleep(8)
    lines = stack.logs("nginx")[before:]
    retried = [line for line in lines if "," in line["upstream"]]
    with capsys.disabled():
        print(f"\n{way}: {len(traffic.outcomes)} requests, {len(retried)} of them asked a second replica")
    assert len(traffic.outcomes) > 200
    assert set(traffic.outcomes) == {"ok"}
    assert any(line["upstream"].endswith(address(victim)) for line in lines[returned:])
    if way == "kill":
        assert retried


def test_new_replicas_are_discovered(stack: Stack) -> None:
    stack.compose("up", "--detach", "--no-recreate", "--scale", f"classifier={REPLICAS + 1}", *stack.services)
    for identity in stack.containers("classifier"):
        wait_until_healthy(identity)
    stack.find_replicas()
    before = len(stack.logs("nginx"))
    with Traffic(stack):
        time.sleep(9)
    used = {line["upstream"] for line in stack.logs("nginx")[before:]}
    assert {address(identity) for identity in stack.containers("classifier")} <= used


def test_containers_are_hardened(stack: Stack) -> None:
    for identity in stack.containers():
        about = inspect(identity)
        host, name = about["HostConfig"], about["Name"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert not host["CapAdd"], name
        assert not host["Privileged"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["Memory"] > 0, name
        assert host["NanoCpus"] > 0, name
        assert host["PidsLimit"] > 0, name
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "5"}, name
        assert host["RestartPolicy"]["Name"] == "unless-stopped", name
        assert "docker.sock" not in json.dumps(about["Mounts"]), name
        for status in process_statuses(identity):
            assert "0" not in status["Uid"].split(), name
            assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, name
            assert status["NoNewPrivs"] == "1", name


def test_only_nginx_publishes_ports(stack: Stack) -> None:
    for identity in stack.containers():
        about = inspect(identity)
        service = about["Config"]["Labels"]["com.docker.compose.service"]
        hosts = {
            binding["HostIp"] for bindings in about["HostConfig"]["PortBindings"].values() for binding in bindings or []
        }
        if service in ("prometheus", "alertmanager", "grafana"):
            assert hosts == {"127.0.0.1"}, service
        elif service != "nginx":
            assert not hosts, service
            assert all(is_internal(network) for network in about["NetworkSettings"]["Networks"]), service


def is_internal(network: str) -> bool:
    return docker("network", "inspect", network, "--format", "{{.Internal}}") == "true"


def test_the_smoke_test_passes(stack: Stack) -> None:
    environment = {**os.environ, **stack.environment}
    done = subprocess.run((sys.executable, ROOT / "deploy/smoke.py"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == 4


@pytest.fixture
def received(stack: Stack) -> Iterator[Received]:
    """What Alertmanager sends, once it is told to send everything to this machine, its gateway, and to wait less."""
    (network,) = json.loads(docker("network", "inspect", f"{PROJECT}_operators"))
    received = Received(network["IPAM"]["Config"][0]["Gateway"])
    local_alertmanager(stack.alertmanager_config.parent, received, "/etc/alertmanager")
    assert requests.post(f"{stack.alertmanager}/-/reload", timeout=20).ok
    yield received
    received.close()


def test_losing_all_replicas_raises_an_alert(client: requests.Session, stack: Stack, received: Received) -> None:
    """The error has the common format, smoke names the failure, and people get the alert and later its resolution."""
    replicas = stack.containers("classifier")
    for identity in replicas:
        docker("kill", identity)
    replies = [post(client, stack) for _ in range(3)]
    for reply in replies[:-1]:  # the first ones may notice only by a connection timeout
        assert_error(reply, *((504, "deadline_exceeded") if reply.status_code == 504 else (502, "bad_gateway")))
    assert_error(replies[-1], 502, "bad_gateway")
    assert int(replies[-1].headers["Retry-After"]) >= 1
    environment = {**os.environ, **stack.environment}
    done = subprocess.run((sys.executable, ROOT / "deploy/smoke.py"), env=environment, capture_output=True, text=True)
    assert done.returncode > 0
    assert "FAIL  classify over TLS" in done.stdout

    page = json.loads(received.wait_for("/pagerduty", "ClassifierDown", '"trigger"'))
    assert page["payload"]["severity"] == "critical"
    for identity in replicas:
        docker("start", identity)
    received.wait_for("/pagerduty", "ClassifierDown", '"resolve"')
    for identity in replicas:
        wait_until_healthy(identity)
    stack.find_replicas()
    assert post(client, stack).status_code == 200
