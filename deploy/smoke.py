"""Checks from outside, as a caller, that the stack started by `make up` works: make smoke."""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = next((ROOT / "tests/images").glob("*.jpg"))
SECRETS = ROOT / "deploy/secrets"
HTTPS_PORT = int(os.environ.get("HTTPS_PORT", "443"))
PROMETHEUS_PORT = int(os.environ.get("PROMETHEUS_PORT", "9090"))
SECONDS = 20  # the time-out advised to callers; see nginx/snippets/proxy.conf


class SmokeError(Exception):
    """What is wrong, in a few words."""


def tls(secrets: Path = SECRETS) -> ssl.SSLContext:
    """Trusts Nginx's certificate, whatever its name, and presents a client certificate if there is one."""
    context = ssl.create_default_context(cafile=str(secrets / "tls_certificate"))
    context.check_hostname = False
    if certificate := os.environ.get("CLIENT_CERTIFICATE"):  # with the overlay mtls
        context.load_cert_chain(certificate, os.environ.get("CLIENT_KEY"))
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def ask(
    connection: HTTPConnection, method: str, path: str, body: bytes | None = None, key: str = ""
) -> tuple[int, bytes]:
    connection.request(method, path, body, {"Content-Type": "image/jpeg", "X-API-Key": key} if body else {})
    reply = connection.getresponse()
    return reply.status, reply.read()


def outside() -> HTTPSConnection:
    return HTTPSConnection("localhost", HTTPS_PORT, timeout=SECONDS, context=tls())


def api_key(secrets: Path = SECRETS) -> str:
    """Without the newline that an editor adds: Python's error about one in a header would reveal the key."""
    return (secrets / "api_key").read_text().strip()


def classifies() -> str:
    status, body = ask(outside(), "POST", "/classify", PICTURE.read_bytes(), api_key())
    if status != 200:
        raise SmokeError(f"{status}: {body.decode()}")
    answer = json.loads(body)
    return f"{answer['class_name']}, {answer['confidence']:.2f}, by {answer['model']}"


def asks_for_a_key() -> str:
    status, _ = ask(outside(), "GET", "/model")
    if status != 401:
        raise SmokeError(f"{status}: anyone may call" if status == 200 else f"{status}; expected 401")
    return "401"


def hides_metrics() -> str:
    status, _ = ask(outside(), "GET", "/metrics")
    if status != 404:
        raise SmokeError(
            f"{status}: /metrics can be reached from outside" if status == 200 else f"{status}; expected 404"
        )
    return "404"


def scraped() -> list[dict[str, str]]:
    """Prometheus' targets; one that has just started has the health ``unknown`` until its first scrape."""
    prometheus = HTTPConnection("localhost", PROMETHEUS_PORT, timeout=SECONDS)
    for _ in range(SECONDS):
        _, body = ask(prometheus, "GET", "/api/v1/targets?state=active")
        targets: list[dict[str, str]] = json.loads(body)["data"]["activeTargets"]
        if all(target["health"] != "unknown" for target in targets):
            break
        time.sleep(1)
    return targets


def targets_are_up() -> str:
    targets = scraped()
    down = [f"{target['scrapePool']} is {target['health']}" for target in targets if target["health"] != "up"]
    if down or not targets:
        raise SmokeError(", ".join(down) or "there are none")
    return f"{len(targets)} of {len(targets)}"


CHECKS: dict[str, Callable[[], str]] = {
    "classify over TLS": classifies,
    "key asked for": asks_for_a_key,
    "metrics hidden": hides_metrics,
    "targets up": targets_are_up,
}


def main() -> int:
    failed = 0
    for name, check in CHECKS.items():
        try:
            print(f"ok    {name:18} {check()}")
        except (SmokeError, OSError, HTTPException) as error:
            failed += 1
            print(f"FAIL  {name:18} {error}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
