"""Prometheus, Alertmanager, the exporters, Nginx and receivers, run as processes beside the real service.

They use generated copies of the committed configuration, with other addresses and shorter times, otherwise unchanged.
"""

from __future__ import annotations

import json
import re
import shutil
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.live import REPOSITORY, free_port, tail

MONITORING = REPOSITORY / "monitoring"
START_SECONDS = 180.0
TICK = "5s"
"""Interval of scrapes and of rule evaluations."""
FASTER = 20
"""Divides waiting times and windows. Windows still hold a few scrapes, and end before the test does."""
MIN_WINDOW, MAX_WINDOW, OFFSET = 30, 90, 30
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(duration: str) -> float:
    return float(duration[:-1]) * _UNITS[duration[-1]]


def _window(match: re.Match[str]) -> str:
    return f"[{min(max(seconds(match[1]) / FASTER, MIN_WINDOW), MAX_WINDOW):.0f}s]"


def faster_rules(document: dict[str, Any]) -> dict[str, Any]:
    for group in document["groups"]:
        group["interval"] = TICK
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"offset \w+", f"offset {OFFSET}s", re.sub(r"\[(\w+)\]", _window, rule["expr"]))
            for key in {"for", "keep_firing_for"} & rule.keys():
                rule[key] = f"{seconds(rule[key]) / FASTER:.0f}s"
    return document


def local_prometheus(folder: Path, ports: dict[str, int]) -> Path:
    """``ports`` by job; the file ``classifier.json`` lists the classifier's replicas."""
    config = yaml.safe_load((MONITORING / "prometheus/prometheus.yml").read_text())
    config["global"].update(scrape_interval=TICK, scrape_timeout=TICK, evaluation_interval=TICK)
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{ports['alertmanager']}"]
    for job in config["scrape_configs"]:
        name = job["job_name"]
        for discovery in {"dns_sd_configs", "static_configs"} & job.keys():
            del job[discovery]
        if name == "classifier":
            job["file_sd_configs"] = [{"files": ["classifier.json"], "refresh_interval": "1s"}]
        elif name in ports:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[name]}"]}]
        if name == "edge":
            job["params"]["target"] = [f"https://127.0.0.1:{ports['tls']}/readyz"]
    (folder / "rules").mkdir()
    for path in (MONITORING / "prometheus/rules").glob("*.yml"):
        (folder / "rules" / path.name).write_text(yaml.safe_dump(faster_rules(yaml.safe_load(path.read_text()))))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    return folder / "prometheus.yml"


def readable_by_debian(config: str, url: str) -> str:
    """Debian 12 has Alertmanager 0.25, which lacks ``url_file`` for webhooks (0.26): the only key that differs."""
    changed, count = re.subn(r"url_file: /run/secrets/deadman_url", f"url: {url}", config)
    assert count == 1
    return changed


def local_alertmanager(folder: Path, received: Received, seen_as: str) -> Path:
    """Route everything to ``received``. ``folder``, which Alertmanager sees as ``seen_as``, holds the secrets."""
    receiver = f"http://{received.host}:{received.http.server_address[1]}"
    for name, secret in {
        "slack_url": f"{receiver}/slack",
        "pagerduty_key": "the-key",
        "smtp_password": "the-word",
    }.items():
        (folder / name).write_text(secret)
    text = readable_by_debian((MONITORING / "alertmanager/alertmanager.yml").read_text(), f"{receiver}/deadman")
    config = yaml.safe_load(text.replace("/run/secrets", seen_as))
    config["global"].update(
        # Passwords are sent unencrypted only to `localhost`.
        smtp_smarthost=f"{received.host.replace('127.0.0.1', 'localhost')}:{received.smtp.server_address[1]}",
        smtp_require_tls=False,
        pagerduty_url=f"{receiver}/pagerduty",
    )
    for route in [config["route"], *config["route"]["routes"]]:
        route.update(
            group_wait="1s", group_interval="2s", repeat_interval="10s" if "deadman" in route.values() else "1h"
        )
    shutil.copytree(MONITORING / "alertmanager/templates", folder / "templates", dirs_exist_ok=True)
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
    return folder / "alertmanager.yml"


class Received:
    """What reached the receivers: (path, body) over HTTP, ("mail", text) over SMTP."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host, self.messages = host, list[tuple[str, str]]()
        received = self

        class Http(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                received.messages.append((self.path, body))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}" if self.path == "/pagerduty" else b"ok")

            def log_message(self, *args: Any) -> None:
                """Keep requests out of the tests' output."""

        class Smtp(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                received.messages.append(("mail", self._converse()))

            def _converse(self) -> str:
                """As much of RFC 5321 as a well-behaved client needs."""
                said: list[str] = []
                self.wfile.write(b"220 test\r\n")
                while line := self.rfile.readline().decode().strip():
                    verb = line.split()[0].upper()
                    said.append(line)
                    answers = {
                        "EHLO": "250-test\r\n250 AUTH PLAIN",
                        "AUTH": "235 in",
                        "DATA": "354 go on",
                        "QUIT": "221 bye",
                    }
                    self.wfile.write(f"{answers.get(verb, '250 ok')}\r\n".encode())
                    if verb == "DATA":
                        said += iter(lambda: self.rfile.readline().decode().rstrip("\r\n"), ".")
                        self.wfile.write(b"250 taken\r\n")
                    if verb == "QUIT":
                        break
                return "\n".join(said)

        self.http = ThreadingHTTPServer((host, 0), Http)
        self.smtp = socketserver.ThreadingTCPServer((host, 0), Smtp)
        for server in (self.http, self.smtp):
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def close(self) -> None:
        for server in (self.http, self.smtp):
            server.shutdown()
            server.server_close()

    def forget(self) -> None:
        self.messages.clear()

    def wait_for(self, where: str, *parts: str, limit: float = 240) -> str:
        """Wait for a message to ``where`` that contains all of ``parts``, and return it."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            for path, body in list(self.messages):
                if path == where and all(part in body for part in parts):
                    return body
            time.sleep(0.5)
        raise AssertionError(
            f"nothing to {where} with {parts} among:\n" + "\n".join(f"{p}: {b}" for p, b in self.messages)
        )


class Stack:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        jobs = ("prometheus", "alertmanager", "node", "nginx", "edge")
        self.ports = {name: free_port() for name in (*jobs, "tls", "status")}
        self.received = Received()
        self.url = f"http://127.0.0.1:{self.ports['prometheus']}"

    def point_to(self, classifier: str) -> None:
        """Make this replica the one that Prometheus scrapes and that Nginx forwards to."""
        host = classifier.removeprefix("http://")
        (self.folder / "classifier.new").write_text(json.dumps([{"targets": [host]}]))
        (self.folder / "classifier.new").replace(self.folder / "classifier.json")
        (self.folder / "upstream.conf").write_text(f"proxy_pass {classifier};")
        with suppress(FileNotFoundError):
            subprocess.run(["kill", "-HUP", (self.folder / "nginx.pid").read_text().strip()], check=True)

    def ask(self, expr: str) -> list[dict[str, Any]]:
        reply = requests.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=60).json()
        result: list[dict[str, Any]] = reply["data"]["result"]
        return result

    def commands(self) -> dict[str, list[str]]:
        at = {name: f"127.0.0.1:{port}" for name, port in self.ports.items()}
        folder = str(self.folder)
        config = local_alertmanager(self.folder, self.received, folder)
        return {
            "nginx": ["nginx", "-p", folder, "-c", str(self._nginx()), "-g", "daemon off;"],
            "nginx-exporter": [
                "prometheus-nginx-exporter",
                f"-web.listen-address={at['nginx']}",
                f"-nginx.scrape-uri=http://{at['status']}/stub_status",
                "-nginx.retries=30",  # until Nginx listens
            ],
            "node-exporter": [
                "prometheus-node-exporter",
                f"--web.listen-address={at['node']}",
                *("--no-collector.netclass", "--no-collector.netdev"),
            ],
            "blackbox-exporter": [
                "prometheus-blackbox-exporter",
                f"--web.listen-address={at['edge']}",
                f"--config.file={MONITORING / 'blackbox/blackbox.yml'}",
            ],
            "alertmanager": [
                "prometheus-alertmanager",
                f"--config.file={config}",
                f"--web.listen-address={at['alertmanager']}",
                f"--storage.path={folder}/alertmanager",
                "--cluster.listen-address=",
            ],
            "prometheus": [
                "prometheus",
                f"--config.file={local_prometheus(self.folder, self.ports)}",
                f"--web.listen-address={at['prometheus']}",
                f"--storage.tsdb.path={folder}/prometheus",
            ],
        }

    def _nginx(self) -> Path:
        """TLS and a status page only: the Compose tests cover the shipped configuration."""
        subprocess.run(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 90 -subj /CN=localhost "
            f"-addext subjectAltName=IP:127.0.0.1 "
            f"-keyout {self.folder}/key.pem -out {self.folder}/certificate.pem",
            shell=True,
            check=True,
            capture_output=True,
        )
        config = self.folder / "nginx.conf"
        config.write_text(f"""
            pid nginx.pid; error_log stderr; worker_processes 1; events {{}}
            http {{
              access_log off; client_body_buffer_size 1m;
              proxy_buffering off;
              client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
              server {{
                listen 127.0.0.1:{self.ports["tls"]} ssl;
                ssl_certificate certificate.pem; ssl_certificate_key key.pem;
                location / {{ include upstream.conf; }}
              }}
              server {{ listen 127.0.0.1:{self.ports["status"]}; location = /stub_status {{ stub_status; }} }}
            }}""")
        return config


@contextmanager
def running(folder: Path, classifier: str) -> Iterator[Stack]:
    """The stack around the service at ``classifier``, once Prometheus has scraped every target."""
    stack = Stack(folder)
    stack.point_to(classifier)
    with ExitStack() as exit_stack:
        exit_stack.callback(stack.received.close)
        for name, command in stack.commands().items():
            log = exit_stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
            exit_stack.callback(_stop, process)
        _wait_until_scraped(stack)
        yield stack


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_scraped(stack: Stack) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(requests.RequestException, KeyError):
            if len(stack.ask("up == 1")) == 6 and stack.ask("probe_success == 1 and on () nginx_up == 1"):
                return
        time.sleep(1)
    logs = "\n".join(f"{path.name}:\n{tail(path, 5)}" for path in stack.folder.glob("*.log"))
    raise AssertionError(f"not every target was up within {START_SECONDS} s:\n{logs}")
