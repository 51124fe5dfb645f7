"""The whole stack, run by Compose as in production and asked from outside: `make e2e-stack`.

Needs Docker with Compose and, where no registry is reached, local images of the tags in deploy/compose.yaml.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import requests
import yaml

from settings import Settings
from tests.e2e.docker import ROOT, docker, jpeg, process_statuses
from tests.e2e.stack import (
    CERTIFICATE,
    REPLICAS,
    Stack,
    address,
    inspect,
    running,
    services,
    session,
    wait_until_healthy,
)

MAX_BODY_BYTES = Settings.model_fields["max_body_bytes"].default
CONNECTIONS = 64
"""One address may have these under way: limit_conn."""


@pytest.fixture(scope="module")
def stack(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(image, tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> requests.Session:
    return session()


def post(client: requests.Session, stack: Stack, **headers: str) -> requests.Response:
    sent = {"Content-Type": "image/jpeg", **headers}
    return client.post(f"{stack.url}/classify", jpeg(), headers=sent, timeout=20)


def assert_error(reply: requests.Response, status: int, code: str) -> None:
    assert (reply.status_code, reply.headers["Content-Type"]) == (status, "application/json"), reply.text
    error = reply.json()["error"]
    assert error["code"] == code == reply.headers["X-Error-Code"]
    assert error["message"]
    assert error["request_id"] == reply.headers["X-Request-Id"]


def test_every_service_runs(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """All but those whose image this machine cannot get, which is said."""
    missing = set(services()) - set(stack.services)
    if missing:
        with capsys.disabled():
            print(f"\nnot started, no image: {', '.join(sorted(missing))}")
    assert missing <= {"grafana"}
    for service in stack.services:
        assert len(stack.containers(service)) == (REPLICAS if service == "classifier" else 1), service


def test_every_target_is_up(stack: Stack) -> None:
    """Every scrape job whose exporter runs here has targets; every target is up; each replica is one."""
    jobs = yaml.safe_load((ROOT / "monitoring/prometheus/prometheus.yml").read_text())["scrape_configs"]
    expected = {job["job_name"] for job in jobs} - {"gpu"} - (set(services()) - set(stack.services))
    assert {"classifier", "nginx", "node", "prometheus", "alertmanager"} <= expected
    deadline = time.monotonic() + 60
    while True:  # the first scrapes take an interval
        reply = requests.get(f"{stack.prometheus}/api/v1/targets", {"state": "active"}, timeout=10)
        targets = reply.json()["data"]["activeTargets"]
        states = [(target["labels"]["job"], target["health"]) for target in targets]
        up = [job for job, health in states if health == "up"]
        if len(up) == len(states) and set(up) == expected and up.count("classifier") == REPLICAS:
            return
        assert time.monotonic() < deadline, states
        time.sleep(1)


def test_classifies_over_tls(client: requests.Session, stack: Stack) -> None:
    reply = post(client, stack)
    assert reply.status_code == 200, reply.text
    assert reply.json()["confidence"] == max(reply.json()["all_probabilities"].values())


def test_nothing_is_served_in_the_clear(stack: Stack) -> None:
    plain = f"http://localhost:{stack.environment['HTTP_PORT']}/classify"
    reply = requests.post(plain, jpeg(), allow_redirects=False, timeout=20)
    assert (reply.status_code, reply.headers["Location"]) == (308, "https://localhost/classify")


def handshake(stack: Stack, version: ssl.TLSVersion) -> str | None:
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # this side would speak TLS 1.1
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("localhost", int(stack.environment["HTTPS_PORT"])), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        return connection.version()


def test_tls_versions(stack: Stack) -> None:
    assert handshake(stack, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert handshake(stack, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_old_tls_is_refused(stack: Stack) -> None:
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol[_ ]version"):
        handshake(stack, ssl.TLSVersion.TLSv1_1)


def test_request_id_from_end_to_end(client: requests.Session, stack: Stack) -> None:
    sent = f"e2e-{time.time_ns()}"
    reply = post(client, stack, **{"X-Request-Id": sent})
    assert reply.headers["X-Request-Id"] == reply.json()["request_id"] == sent
    (outside,) = [line for line in stack.logs("nginx") if line["request_id"] == sent]
    assert (outside["path"], outside["status"], outside["upstream_status"]) == ("/classify", 200, "200")
    assert float(outside["upstream_seconds"]) <= outside["seconds"] + 0.002  # Nginx rounds to ms
    assert [line["status"] for line in stack.logs("classifier") if line.get("request_id") == sent] == [200]


@pytest.mark.parametrize("bad", ["no spaces", 'quote"', "x" * 65])
def test_bad_request_ids_are_replaced(client: requests.Session, stack: Stack, bad: str) -> None:
    reply = client.get(f"{stack.url}/nowhere", headers={"X-Request-Id": bad}, timeout=20)
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["X-Request-Id"])
    assert_error(reply, 404, "not_found")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/metrics",
        "/docs.json",
        "/schema.json",
        "/healthz",
        "/stub_status",
        "/_error",
        "/classify/",
    ],
)
def test_inner_paths_are_not_found(client: requests.Session, stack: Stack, path: str) -> None:
    assert_error(client.get(f"{stack.url}{path}", timeout=20), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/classify", "POST"),
        ("PUT", "/classify/batch", "POST"),
        ("POST", "/model", "GET, HEAD"),
        ("DELETE", "/readyz", "GET, HEAD"),
    ],
)
def test_other_methods_are_refused(client: requests.Session, stack: Stack, method: str, path: str, allow: str) -> None:
    reply = client.request(method, f"{stack.url}{path}", timeout=20)
    assert_error(reply, 405, "method_not_allowed")
    assert reply.headers["Allow"] == allow


@pytest.mark.parametrize("path", ["/model", "/livez", "/readyz"])
def test_open_paths(client: requests.Session, stack: Stack, path: str) -> None:
    assert client.get(f"{stack.url}{path}", timeout=20).status_code == 200
    assert client.head(f"{stack.url}{path}", timeout=20).status_code == 200


@pytest.mark.parametrize("path", ["/model", "/nowhere"])
def test_security_headers(client: requests.Session, stack: Stack, path: str) -> None:
    headers = client.get(f"{stack.url}{path}", timeout=20).headers
    assert headers["Server"] == "nginx"  # no version
    for name, part in {
        "Strict-Transport-Security": "max-age=",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'",
        "Cache-Control": "no-store",
    }.items():
        assert part in headers[name]


def test_body_limit_is_the_services(client: requests.Session, stack: Stack) -> None:
    """One byte more is refused by Nginx; the limit itself reaches the service, which refuses so large an image."""
    sent = {"Content-Type": "image/jpeg"}
    assert_error(
        client.post(f"{stack.url}/classify", b"x" * (MAX_BODY_BYTES + 1), headers=sent, timeout=60), 413, "too_large"
    )
    chunks = (b"x" * 2**20 for _ in range(MAX_BODY_BYTES // 2**20 + 1))
    assert_error(client.post(f"{stack.url}/classify", chunks, headers=sent, timeout=60), 413, "too_large")
    assert_error(
        client.post(f"{stack.url}/classify", b"x" * MAX_BODY_BYTES, headers=sent, timeout=60), 413, "too_large"
    )
    from_nginx = [line["upstream_status"] for line in stack.logs("nginx") if line["status"] == 413]
    assert from_nginx == ["", "", "413"]


def test_garbage_has_the_form_of_errors(stack: Stack) -> None:
    with opened(stack) as connection:
        connection.sendall(b"garbage\r\n\r\n")
        head, body = connection.makefile("rb").read().split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "invalid_request"


@contextmanager
def opened(stack: Stack) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    with (
        socket.create_connection(("localhost", int(stack.environment["HTTPS_PORT"])), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        yield connection


def test_connection_limit(client: requests.Session, stack: Stack) -> None:
    with ExitStack() as opening:
        for _ in range(CONNECTIONS):
            connection = opening.enter_context(opened(stack))
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        time.sleep(0.5)
        reply = post(client, stack)
    assert_error(reply, 429, "too_many_requests")
    assert int(reply.headers["Retry-After"]) >= 1
    time.sleep(0.5)
    assert post(client, stack).status_code == 200


def test_request_limit(stack: Stack) -> None:
    """600 at once: the burst passes, the rest is told to come back, and after the time named it may."""
    own = threading.local()

    def get(_: int) -> requests.Response:
        own.client = getattr(own, "client", None) or session()
        return own.client.get(f"{stack.url}/livez", timeout=20)

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(get, range(600)))
    refused = [reply for reply in replies if reply.status_code == 429]
    assert {reply.status_code for reply in replies} == {200, 429}
    assert len(replies) - len(refused) >= 200
    assert_error(refused[0], 429, "too_many_requests")
    time.sleep(int(refused[0].headers["Retry-After"]))
    assert session().get(f"{stack.url}/livez", timeout=20).status_code == 200
    time.sleep(2)  # until the burst is free for the tests that follow


class Traffic:
    """Callers that post batches without a pause: some requests are always under way."""

    def __init__(self, stack: Stack, callers: int = 4, images: int = 24) -> None:
        self._stack = stack
        self._files = [("images", (f"{i}.jpg", jpeg(), "image/jpeg")) for i in range(images)]
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(callers)]
        self.outcomes: list[str] = []

    def _call(self) -> None:
        client = session()
        while not self._end.is_set():
            try:
                reply = client.post(f"{self._stack.url}/classify/batch", files=self._files, timeout=20)
                self.outcomes.append(
                    "ok" if reply.ok and len(reply.json()["results"]) == len(self._files) else reply.text
                )
            except requests.RequestException as error:
                self.outcomes.append(repr(error))
            self._end.wait(0.04)  # stays below the limit of one address

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
    """Killed, or told to stop, under traffic; when it is back, with whatever address, it has work again."""
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


def test_more_replicas_are_found(stack: Stack) -> None:
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


def test_only_nginx_is_published(stack: Stack) -> None:
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


def test_smoke(stack: Stack) -> None:
    environment = {**os.environ, **stack.environment}
    done = subprocess.run((sys.executable, ROOT / "deploy/smoke.py"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == 3


def test_without_replicas(client: requests.Session, stack: Stack) -> None:
    """Last: nothing answers afterwards. The error has the form, and smoke says what fails."""
    for identity in stack.containers("classifier"):
        docker("kill", identity)
    replies = [post(client, stack) for _ in range(3)]
    for reply in replies[:-1]:  # the first ones may find out by a connection that times out
        assert_error(reply, *((504, "deadline_exceeded") if reply.status_code == 504 else (502, "bad_gateway")))
    assert_error(replies[-1], 502, "bad_gateway")
    assert int(replies[-1].headers["Retry-After"]) >= 1
    environment = {**os.environ, **stack.environment}
    done = subprocess.run((sys.executable, ROOT / "deploy/smoke.py"), env=environment, capture_output=True, text=True)
    assert done.returncode > 0
    assert "FAIL  classify over TLS" in done.stdout
